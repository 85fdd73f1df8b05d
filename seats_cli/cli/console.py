"""What a person or a pipe reads: the only module of this room that writes to stdout or stderr.

stdout carries the answer or the document that was asked for, stderr everything else. Where stderr is not a
terminal nothing is drawn: no colour, no boxes, no spinner, and rich is not even imported.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from seats_cli.errors import SeatsError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads (blank in a list of facts); numbers stand to the right.

    n_names: how many columns, the first ones, say what a row is; the others may move to a table of their own
        where the screen is narrow. What could disturb a terminal is written out, in all of it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool = True
    n_names: int = 1

    def __post_init__(self) -> None:
        """Frozen: what stands in it is what is shown."""
        for name, value in (
            ("title", printable(self.title)),
            ("columns", tuple(map(_cell, self.columns))),
            ("rows", tuple(tuple(map(_cell, row)) for row in self.rows)),
        ):
            object.__setattr__(self, name, value)


class Terminal:
    """The two streams of a run. `quiet` hides notes and progress, `verbose` adds reasons."""

    def __init__(self) -> None:
        self.quiet = False
        self.verbose = False
        self.debug = False
        self._before_leaving: list[Callable[[], None]] = []
        self.subject: str | None = (
            None  # the file in hand, where there are several: notes and warnings name it
        )
        self.out: TextIO = sys.stdout
        self.err: TextIO = sys.stderr
        self._warned: set[str] = set()
        self._mid_line = False
        self._rich: Console | None = None
        self._progress: Progress | None = None

    # --- stdout -------------------------------------------------------------------------------------------
    @property
    def streams_answers(self) -> bool:
        """Whether a person watches stdout, so that an answer is shown word by word."""
        return _is_terminal(self.out)

    def answer_piece(self, text: str) -> None:
        """Write a piece of the answer as it comes, without a line end."""
        self.stop_progress()
        if text:
            self._mid_line = not text.endswith(
                "\n"
            )  # first, so that an interruption while writing finds it set
        self._write(self.out, printable(text) if self.streams_answers else text)

    def end_answer(self) -> None:
        """Finish the line of an answer that was written in pieces."""
        if self._mid_line:
            self._write(self.out, "\n")
        self._mid_line = False

    def answer(self, text: str) -> None:
        """Write a whole answer and a line end."""
        self.answer_piece(text)
        self._mid_line = True
        self.end_answer()

    def record(self, text: str) -> None:
        """Write one of many records, with its line end; a bar stays where stdout is not the same screen."""
        if self.streams_answers:
            self.answer_piece(text)
        else:
            self._write(self.out, text)

    def document(self, value: Mapping[str, Any]) -> None:
        """Write one JSON document; non-ASCII letters are escaped where stdout cannot carry them."""
        ascii_only = not _encoding(self.out).startswith("utf")
        text = json.dumps(value, indent=2, ensure_ascii=ascii_only, allow_nan=False)
        self._write(self.out, json_printable(text) + "\n")

    def report(self, table: Table) -> None:
        """Write a table that is itself what was asked for (`seats doctor`) to stdout."""
        self._write(self.out, plain_table(table) + "\n")

    # --- stderr -------------------------------------------------------------------------------------------
    @property
    def is_watched(self) -> bool:
        """Whether a person watches stderr."""
        return _is_terminal(self.err)

    def note(self, message: str) -> None:
        """Something worth knowing; hidden by --quiet."""
        if not self.quiet:
            self._tell(self._about(message))

    def detail(self, message: str) -> None:
        """The reason for an automatic choice; shown by --verbose."""
        if self.verbose:
            self._tell(message, style="dim")

    def warn(self, message: str) -> None:
        """A fallback or a loss; each is said once a run, --quiet or not."""
        message = self._about(message)
        if message not in self._warned:
            self._warned.add(message)
            self._tell(f"warning: {message}", style="yellow")

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Without notes and details inside: what runs has told them already."""
        quiet, verbose = self.quiet, self.verbose
        self.quiet, self.verbose = True, False
        try:
            yield
        finally:
            self.quiet, self.verbose = quiet, verbose

    def _about(self, message: str) -> str:
        named = self.subject is not None and self.subject not in message
        return f"{self.subject}: {message}" if named else message

    def error(self, error: SeatsError, *, about: str | None = None) -> None:
        """What went wrong and what to do next; `about` names the file, unless the message does already."""
        message = str(error)
        if about is not None and about not in message:
            message = f"{about}: {message}"
        self._tell(f"error: {message}", style="red")
        if error.hint:
            self._tell(f"hint: {error.hint}")
        if self.debug:
            self.traceback(error)

    def traceback(self, error: BaseException) -> None:
        """The way to an error, for --debug."""
        self._write(self.err, "".join(traceback.format_exception(error)))

    def table(self, table: Table) -> None:
        """Draw a table on stderr: boxes for a person, aligned words for a file."""
        if not self.is_watched:
            self._write(self.err, plain_table(table) + "\n")
            return
        from rich import box
        from rich.table import Table as RichTable

        title: str | None = table.title
        for part in narrower(table, self._console().width):
            # Rich falls back to ASCII lines by itself where the stream cannot encode the others.
            drawn = RichTable(title=title, title_justify="left", title_style="bold", box=box.ROUNDED)
            for index, column in enumerate(part.columns):
                value = part.numbers and index >= part.n_names
                right = part.numbers and index > 0
                drawn.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=value)
            for row in part.rows:
                drawn.add_row(*row)
            self._console().print(drawn)
            title = None

    # --- progress -----------------------------------------------------------------------------------------
    @contextmanager
    def progress(self) -> Iterator[OnStage | None]:
        """Bars by stage on stderr while the block runs, then gone. None where nobody watches or --quiet."""
        if self.quiet or not self.is_watched or self._console().is_dumb_terminal:
            yield None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        console = self._console()
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        columns = (
            SpinnerColumn(spinner),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        tasks: dict[str, Any] = {}

        def on_stage(name: str, done: int, total: int) -> None:
            if self._progress is None:  # the answer has begun: its words own the screen now
                return
            if name not in tasks:
                tasks[name] = self._progress.add_task(name.replace("_", " "), total=total or None)
            self._progress.update(tasks[name], completed=done, total=total or None)

        self._progress.start()
        try:
            yield on_stage
        finally:
            self.stop_progress()

    @contextmanager
    def bar(self, total: int, *, beside_answers: bool) -> Iterator[Callable[[str, int], None] | None]:
        """One bar on stderr while the block runs: `(what, done)` moves it. None where it would draw for
        nobody, or, with `beside_answers` on stdout, over these on the same screen."""
        on_screen = self.is_watched and not (beside_answers and self.streams_answers)
        if self.quiet or not on_screen or self._console().is_dumb_terminal:
            yield None
            return
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        words = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # a file's name may be long, and no markup
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False, table_column=words),
        )
        self._progress = Progress(*columns, console=self._console(), transient=True, expand=True)
        task = self._progress.add_task("", total=total)

        def draw(what: str, done: int) -> None:
            if self._progress is not None:
                self._progress.update(task, description=printable(what), completed=done)

        self._progress.start()
        try:
            yield draw
        finally:
            self.stop_progress()

    @contextmanager
    def before_leaving(self, act: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `act` is done before the process is ended without a way back."""
        self._before_leaving.append(act)
        try:
            yield
        finally:
            self._before_leaving.remove(act)

    def leave(self) -> None:
        """Everything that was given to `before_leaving`, and no bar on the screen any more."""
        self.stop_progress()
        for act in self._before_leaving[::-1]:
            act()

    def stop_progress(self) -> None:
        """Take the bars off the screen; idempotent."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    # --- how ----------------------------------------------------------------------------------------------
    def _console(self) -> "Console":
        if self._rich is None:
            from rich.console import Console

            self._rich = Console(file=self.err, highlight=False, markup=False, emoji=False, soft_wrap=False)
        return self._rich

    def _tell(self, message: str, *, style: str | None = None) -> None:
        if self._mid_line and self.is_watched and self.streams_answers:
            self.end_answer()  # both streams are the same screen: do not write into the answer's line
        text = printable(message)
        if self.is_watched:
            self._console().print(text, style=style, soft_wrap=True)
        else:
            self._write(self.err, text + "\n")

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = _encoding(stream)
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def plain_table(table: Table) -> str:
    """The table as aligned words, two spaces between columns, no trailing blanks."""
    lines = [table.columns, *table.rows] if any(table.columns) else list(table.rows)
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]

    def written(line: tuple[str, ...]) -> str:
        cells = [c.rjust(w) if table.numbers else c.ljust(w) for c, w in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([table.title, *(f"  {written(line)}" for line in lines)])


def narrower(table: Table, width: int) -> list[Table]:
    """The table in parts that fit a screen of `width` columns, each with the names of the rows, so that no
    number has to fold; a table without numbers stays whole."""
    from rich.cells import cell_len

    def drawn(index: int) -> int:
        return max(cell_len(line[index]) for line in (table.columns, *table.rows)) + 3

    names, values = range(table.n_names), range(table.n_names, len(table.columns))
    if not table.numbers or 1 + sum(drawn(index) for index in (*names, *values)) <= width:
        return [table]
    groups: list[list[int]] = []
    used = start = 1 + sum(drawn(index) for index in names)
    for index in values:
        if not groups or used + drawn(index) > width:
            groups.append([])
            used = start
        groups[-1].append(index)
        used += drawn(index)

    def part(group: list[int]) -> Table:
        shown = [*names, *group]
        rows = tuple(tuple(row[index] for index in shown) for row in table.rows)
        return Table(table.title, tuple(table.columns[i] for i in shown), rows, n_names=table.n_names)

    return [part(group) for group in groups]


def json_printable(text: str) -> str:
    """A JSON document in which what could disturb a terminal is written as \\u escapes: the same document."""
    if text.isascii():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _cell(text: str) -> str:
    return printable(text).replace("\n", "\\n").replace("\t", " ")


def printable(text: str) -> str:
    """`text` without control characters that a hostile file name could send to a terminal; line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _encoding(stream: TextIO) -> str:
    return (getattr(stream, "encoding", None) or "utf-8").lower()
