"""What a person sees of a batch: how far it is, how fast, how long still, at which file, and a summary."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from seats_cli.batch.resume import Left
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_screen import counted, span
from seats_cli.errors import SeatsError

LINE_EVERY_S = 30.0  # where nobody watches
FIRST_LINE_S = 10.0
MOST_ERRORS = 5  # failures that are told one by one, where the records tell them all


class BatchScreen:
    """Progress of a run over `total` questions, and what has come of them. Called from several threads."""

    def __init__(
        self,
        terminal: Terminal,
        total: int,
        *,
        keeps_errors: bool,
        on_stdout: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keeps_errors`: whether failures and losses stand in the output, so that few of them are told;
        `on_stdout`: whether that is stdout."""
        self.terminal, self.total = terminal, total
        self.keeps_errors, self.on_stdout = keeps_errors, on_stdout
        self.ok = self.failed = self.lossy = 0
        self._now = now
        self.begin()
        self._clips: set[tuple[Any, ...]] = set()
        self._kept_sum, self._kept_n = 0.0, 0
        self._at = ""
        self._draw: Callable[[str, int], None] | None = None

    @property
    def done(self) -> int:
        """Questions with a record of this run."""
        return self.ok + self.failed

    def begin(self) -> None:
        """The model is loaded: from here on time counts."""
        self._began = self._now()
        self._spoken = self._began + FIRST_LINE_S - LINE_EVERY_S

    def stage(self, path: str, stage: str, done: int, total: int) -> None:
        """Where a clip is."""
        self._at = f"{path}: {stage.replace('_', ' ')}"
        self._tell()

    def record(self, record: Mapping[str, Any]) -> None:
        """Count a record that was written; tell of a failure or a loss."""
        if record["ok"]:
            self.ok += 1
            self._clips.add((record["path"], record["start_s"], record["end_s"]))
            if record["tokens"]["kept"] is not None:
                self._kept_sum += record["tokens"]["kept"]
                self._kept_n += 1
        else:
            self.failed += 1
            self._fail(record)
        self.lossy += bool(record["warnings"])
        if not self.keeps_errors:
            for warning in record["warnings"]:
                self.terminal.warn(f"{record['path']}: {warning}")
        self._tell()

    def status(self) -> str:
        """ "12 of 200 answers, 340 clips/h, 30 min left, 10.0% of tokens kept"."""
        parts = [f"{self.done} of {counted(self.total, 'answer')}"]
        parts += self._rate()
        if self.ok and self.done < self.total:
            seconds = self._now() - self._began
            parts.append(f"{span(seconds * (self.total - self.done) / self.done)} left")
        if self._kept_n:
            parts.append(f"{100 * self._kept_sum / self._kept_n:.1f}% of tokens kept")
        return ", ".join(parts)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, progress is drawn: a bar for a person, else a line now and then."""
        with self.terminal.bar(self.total, beside_answers=self.on_stdout) as draw:
            self._draw = draw
            self._tell()
            try:
                yield
            finally:
                self._draw = None

    def summary(self, left: Left, *, retry: str | None) -> None:
        """What came of what was left to do, in one line, and how to try what failed again."""
        seconds = self._now() - self._began
        not_run = self.total - self.done
        parts = [f"{self.ok} ok", f"{self.failed} failed"]
        if left.done:
            earlier = f" ({left.failed} of them failures)" if left.failed else ""
            parts.append(f"{left.done} skipped: done before{earlier}")
        if not_run:
            parts.append(f"{not_run} not asked")
        if self.lossy:
            parts.append(f"{self.lossy} with losses, see warnings")
        line = "; ".join([", ".join(parts), span(seconds), *self._rate()])
        if left.failed and not self.failed and self.terminal.quiet:
            self.terminal.warn(line)  # else nothing would say why the exit code is 1
        self.terminal.note(line)
        if (self.failed or left.failed) and retry is not None:
            self.terminal.note(f"to try the failed ones again: {retry}")

    def _rate(self) -> list[str]:
        seconds = self._now() - self._began
        return [f"{3600 * len(self._clips) / seconds:.0f} clips/h"] if self._clips and seconds > 0 else []

    def _fail(self, record: Mapping[str, Any]) -> None:
        error = record["error"]
        if not self.keeps_errors or self.failed <= MOST_ERRORS:
            self.terminal.error(SeatsError(error["message"], hint=error["hint"]), about=record["path"])
        elif self.failed == MOST_ERRORS + 1:
            self.terminal.warn("more questions fail; the records say why")

    def _tell(self) -> None:
        if self._draw is not None:
            self._draw(f"{self.status()} - {self._at}" if self._at else self.status(), self.done)
        elif self._now() - self._spoken >= LINE_EVERY_S and self.done < self.total:
            self._spoken = self._now()
            self.terminal.note(f"{self.status()}; at {self._at}" if self._at else self.status())
