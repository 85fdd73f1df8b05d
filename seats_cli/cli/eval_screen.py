"""What a person sees of a sweep: progress with the time that is left, and tables of its rows."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from seats_cli.cli.console import Table, Terminal
from seats_cli.cli.tables import NONE, percent, seconds

if TYPE_CHECKING:
    from seats_cli.lab.results import Row

Progress = Callable[[int, int], None]
LINE_EVERY_S = 30.0  # where nobody watches
FIRST_LINE_S = 10.0
MOST_NAMES = 3  # of rows that share a note
FEWEST = 20  # answers, or 2% of all: a clip's first answer waits for the clip, the others do not


class EvalTerminal(Terminal):
    """A terminal that also shows how far a long run is, and draws tables on stdout for a person."""

    @classmethod
    def like(cls, terminal: Terminal) -> "EvalTerminal":
        """One on the same streams, with the same switches."""
        made = cls()
        made.out, made.err = terminal.out, terminal.err
        made.quiet, made.verbose, made.debug = terminal.quiet, terminal.verbose, terminal.debug
        return made

    def report(self, table: Table) -> None:
        """Write a table that was asked for to stdout: drawn for a person, aligned words for a pipe."""
        self.stop_progress()
        if not self.streams_answers:
            super().report(table)
            return
        screen = Terminal()
        screen.err = self.out
        screen.table(table)

    @contextmanager
    def counting(self, what: str) -> Iterator[Progress]:
        """Inside, `(done, total)` shows how much is done and how long the rest will take: a bar on a screen,
        else a line now and then."""
        clock = Remaining()
        if self.quiet:
            yield lambda *_: None
        elif not self.is_watched or self._console().is_dumb_terminal:
            spoken = clock.started + FIRST_LINE_S - LINE_EVERY_S

            def say(done: int, total: int) -> None:
                nonlocal spoken
                left = clock.left(done, total)
                if done < total and clock.now() - spoken >= LINE_EVERY_S:
                    spoken = clock.now()
                    self._tell(f"{done} of {total} {what}{left}")

            yield say
        else:
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bars

            spinner = "dots" if self._console().encoding.startswith("utf") else "line"
            columns = (
                SpinnerColumn(spinner),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
            )
            self._progress = Bars(
                *columns, TextColumn("{task.fields[left]}"), console=self._console(), transient=True
            )
            bar = self._progress.add_task("loading the model", total=None, left="")

            def draw(done: int, total: int) -> None:
                if self._progress is not None:
                    left = clock.left(done, total)
                    self._progress.update(
                        bar, description=what, completed=done, total=total, left=left.removeprefix(", ")
                    )

            self._progress.start()
            try:
                yield draw
            finally:
                self.stop_progress()


class Remaining:
    """How long a run will still take, from how fast it went since its first count."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.started = now()
        self._first: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        """ ", 3 min left"; empty while there is too little to tell it from."""
        moment = self.now()
        if self._first is None:
            self._first = moment, done
        since, at_first = self._first
        if done - at_first < max(FEWEST, total // 50) or done >= total:
            return ""
        return f", {span((moment - since) * (total - done) / (done - at_first))} left"


def span(duration_s: float) -> str:
    """Seconds below a minute, minutes below an hour, then hours and minutes."""
    if duration_s < 59.5:
        return f"{max(1, round(duration_s))} s"
    minutes = round(duration_s / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def counted(n: int, noun: str) -> str:
    """ "1 answer", "2 answers"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def result_tables(rows: Sequence["Row"], title: str, varied: Sequence[str]) -> list[Table]:
    """Accuracy and cost by setting, then accuracy by family. `varied`: the keys of --vary."""
    against = next((row.against.method for row in rows if row.against), "full")
    columns = ["method", "ratio", *varied, "accuracy", "% of full"]
    columns += [f"points over {against}"] if against != "full" else []
    columns += ["kept", "compute", "time", "n"]
    lines = []
    for row in rows:
        line = [*_names(row, varied), _interval(row.accuracy, row.low, row.high)]
        line.append(_interval(row.of_full, row.of_full_low, row.of_full_high))
        if against != "full":
            line.append(_points(row))
        line += [percent(row.retention), percent(row.compute_ratio), seconds(row.seconds), str(row.n)]
        lines.append(tuple(line))
    n_names = 2 + len(varied)
    told = f"{title}; in brackets 95% intervals over clips"
    tables = [Table(told, tuple(columns), tuple(lines), n_names=n_names)]
    families = list(dict.fromkeys(family for row in rows for family in row.families))
    rates = any(row.wer is not None for row in rows)
    if len(families) > 1 or rates:
        heads = ["method", "ratio", *varied, *families, *(["word errors"] if rates else [])]
        lines = []
        for row in rows:
            line = [*_names(row, varied), *(_number(row.families.get(family)) for family in families)]
            lines.append((*line, *([_number(row.wer)] if rates else [])))
        tables.append(Table("accuracy by family, %", tuple(heads), tuple(lines), n_names=n_names))
    return tables


def row_notes(rows: Sequence["Row"]) -> list[str]:
    """What stands under the tables: the reasons of rows without numbers, or with fewer than the others. What
    holds for several rows is said once."""
    told: dict[str, list[str]] = {}
    for row in rows:
        name = row.setting.name
        if row.error is not None:
            some = "" if not row.n else f" {row.unplanned} of {row.unplanned + row.n + row.failed} questions:"
            told.setdefault(f"not possible{' for' + some if some else ':'} {row.error}", []).append(name)
        if row.failed:
            lost = f"{counted(row.failed, 'question')} failed, in no number here"
            told.setdefault(lost, []).append(name)
    return [f"{_who(names, len(rows))}: {what}" for what, names in told.items()]


def _who(names: Sequence[str], n_rows: int) -> str:
    """Rows by name, a few of them; all where it is all."""
    if len(names) == n_rows > 1:
        return "every row"
    more = f"; {counted(len(names) - MOST_NAMES, 'row')} more" if len(names) > MOST_NAMES else ""
    return "; ".join(names[:MOST_NAMES]) + more


def _names(row: "Row", varied: Sequence[str]) -> list[str]:
    known: Mapping[str, str | None] = {"preset": row.preset, **row.settings}
    return [row.method, f"{row.ratio:g}", *(known.get(key) or NONE for key in varied)]


def _number(share: float | None) -> str:
    return NONE if share is None else "100" if share == 1 else f"{100 * share:.1f}"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "n/a"
    return _number(value) if low is None else f"{_number(value)} ({_number(low)}-{_number(high)})"


def _points(row: "Row") -> str:
    found = row.against
    if found is None or found.points is None:
        return NONE
    if found.low is None or found.high is None:
        return f"{found.points:+.1f}"
    return f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
