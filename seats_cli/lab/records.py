"""What a sweep finds: a record for each (sample, setting), and the file of them, one JSON line each.

A line is written as soon as it is known and read again by the next run, so that one that was stopped, even in
the middle of a line, goes on where it ended.
"""

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from seats_cli.errors import PlanError, SeatsError, UsageError, unexpected
from seats_cli.lab.manifest import Sample
from seats_cli.lab.scoring import score
from seats_cli.lab.settings import Setting

if TYPE_CHECKING:
    from seats_cli.session import Answer

Record = dict[str, Any]
FIRST = b'{"key": "'  # how every line begins: what a line that was cut off is known by


def success(sample: Sample, setting: Setting, answer: "Answer") -> Record:
    """The record of an answer, scored."""
    report, scored = answer.report, score(sample, answer.text)
    before, stages = report.tokens.before, report.timing.stages
    return _record(
        sample,
        setting,
        answer=answer.text,
        correct=scored.correct,
        wer=scored.wer,
        retention=report.retention.reached.overall,
        compute_ratio=report.compute.ratio,
        tokens={
            "text": before.text,
            "video": before.video,
            "audio": before.audio,
            "generated": report.tokens.generated,
        },
        prefill_s=round(stages.get("select", 0.0) + stages.get("prefill", 0.0), 6),
        generate_s=round(stages.get("generate", 0.0), 6),
    )


def failure(sample: Sample, setting: Setting, error: Exception) -> Record:
    """The record of a job that came to no answer."""
    shown = error if isinstance(error, SeatsError) else unexpected(error)
    return _record(sample, setting, error={"kind": shown.kind, "message": str(shown), "hint": shown.hint})


def _record(sample: Sample, setting: Setting, **known: Any) -> Record:
    """One line of a sweep's file; what does not apply is null.

    tokens: of the prompt before selection, and those of the answer. prefill_s: selection and prefill.
    """
    return {
        "id": sample.id,
        "clip": sample.clip,
        "family": sample.family,
        "question": sample.question,
        "expected": list(sample.answers),
        "answer": known.get("answer"),
        "correct": known.get("correct"),
        "wer": known.get("wer"),
        "method": setting.method,
        "ratio": setting.ratio,
        "preset": setting.preset,
        "settings": dict(setting.settings),
        "retention": known.get("retention"),
        "compute_ratio": known.get("compute_ratio"),
        "tokens": known.get("tokens"),
        "prefill_s": known.get("prefill_s"),
        "generate_s": known.get("generate_s"),
        "error": known.get("error"),
    }


def is_unplanned(record: Record) -> bool:
    """Whether the method has no plan for this clip at this ratio: a fact, not a failure."""
    return record["error"] is not None and record["error"]["kind"] == PlanError.kind


def has_failed(record: Record) -> bool:
    """Whether there is no answer for a reason that another try may not meet."""
    return record["error"] is not None and not is_unplanned(record)


# ---- the file ---------------------------------------------------------------------------------------------


class RecordFile:
    """Records on disk, by key: `known` holds what was there, `append` adds. Use it as a context manager.

    A file that this run made and wrote nothing to is taken away again. Only one run at a time may have a file
    (POSIX). A file of anything else is never changed.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None]) -> None:
        """Open the file and read what it has. Raises UsageError where it cannot be, or is of another kind."""
        self.path = path
        self.known: dict[str, Record] = {}
        self._lines: dict[str, int] = {}  # where the known ones stand
        self.runs: dict[str, Mapping[str, Any]] = {}  # what earlier runs noted of themselves, by key
        self._note: Mapping[str, Any] | None = None
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint=f"name a file in it: -o {path / 'eval.jsonl'}")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}")
        self._made = not path.exists()
        plain = self._made or stat.S_ISREG(path.stat().st_mode)  # a pipe or a device cannot be read again
        try:
            self._stream: IO[bytes] = path.open("ab+" if plain else "wb")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        try:
            if plain and not _locked(self._stream):
                raise UsageError(
                    f"another run is writing {path}", hint="wait for it, or give another file to -o"
                )
            if plain:
                self._read(warn)
        except BaseException:
            self._stream.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, out of the process at once: what follows may be killed."""
        if self._note is not None:
            record, self._note = {**record, "run": self._note}, None
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def note_run(self, key: str, facts: Mapping[str, Any]) -> None:
        """Let the next record say what run it is the first of, unless the file knows that run already."""
        if key not in self.runs:
            self._note = {"key": key, **facts}

    def damaged(self, key: str) -> UsageError:
        """What is wrong where the record of `key` is not what its readers need."""
        return UsageError(
            f"{self.path}: line {self._lines.get(key)} is a damaged record: part of it is missing or of the "
            "wrong kind",
            hint="take that line out, and what it was about is run again",
        )

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        if self._made and self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, warn: Callable[[str], None]) -> None:
        self._stream.seek(0)
        good = 0  # bytes up to the end of the last whole line
        for number, line in enumerate(self._stream, 1):
            record, whole = _parsed(line), line.endswith(b"\n")
            if record is not None:
                run = record.pop("run", None)
                if isinstance(run, dict):
                    self.runs[str(run.get("key"))] = run
                self.known[record["key"]], self._lines[record["key"]] = record, number
            elif not whole and (self.known or _may_be_cut(line)):
                self._stream.truncate(good)
                warn(f"{self.path}: the last line was cut off in the middle; it is removed and run again")
                return
            elif line.strip():
                raise self._foreign(number)
            if not whole:
                self._stream.write(b"\n")
            good += len(line)

    def _foreign(self, line: int) -> UsageError:
        return UsageError(
            f"{self.path}: line {line} is no record of seats eval or trace; nothing is written to this file",
            hint="give a new file to -o, or the one that an earlier run wrote",
        )


def _locked(stream: IO[bytes]) -> bool:
    """Lock an open file for this process; False if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _may_be_cut(line: bytes) -> bool:
    return line.startswith(FIRST) or FIRST.startswith(line)


def _parsed(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    ours = isinstance(value, dict) and isinstance(value.get("key"), str) and "method" in value
    return value if ours else None
