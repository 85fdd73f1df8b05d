"""Where records go: JSON lines, CSV or text, to a file that can be gone on with or to a stream.

A record is written as soon as all before it are; nothing is held back but what must wait for its turn.
"""

import csv
import io
import json
import re
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from seats_cli.batch.lines import LineFile
from seats_cli.batch.records import COLUMNS, SCHEMA_VERSION, Record
from seats_cli.batch.resume import RUN_LENGTH, in_order
from seats_cli.batch.sources import Item

FORMS = ("jsonl", "csv", "text", "text with questions")
_SURROGATE = re.compile("[\ud800-\udfff]")  # bytes of a file's name that are no UTF-8


class Output(Protocol):
    """A place for records. `torn`: a write has failed in the middle of one."""

    torn: bool

    @property
    def known(self) -> Mapping[str, bool]:
        """The keys that it has, and whether each is an answer."""

    def append(self, record: Record) -> None:
        """Write a record, out of the process at once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def form_of(path: Path | None, asked: str | None) -> str:
    """The form of an output: as asked, else by the file's ending, else JSON lines for a file and text."""
    if asked is not None:
        return asked
    endings = {".csv": "csv", ".txt": "text"}
    return "text" if path is None else endings.get(path.suffix.lower(), "jsonl")


def open_output(
    path: Path, form: str, *, warn: Callable[[str], None], overwrite: bool = False
) -> "AnswerFile":
    """The file of that form, for this run alone. Raises UsageError where it cannot be gone on with."""
    kinds: dict[str, Callable[..., AnswerFile]] = {
        "jsonl": JsonLines,
        "csv": CsvLines,
        "text": TextLines,
        "text with questions": QuestionLines,
    }
    return kinds[form](path, warn=warn, again=form in ("jsonl", "csv"), overwrite=overwrite)


# ---- forms ------------------------------------------------------------------------------------------------


def as_jsonl(record: Record) -> str:
    """A record as a line of JSON; what is no valid Unicode is escaped."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def as_csv(record: Record) -> str:
    """A record as a row: a column for each key, with a dot for those inside; warnings a line each."""
    row = io.StringIO()
    cells = ["\n".join(v) if isinstance(v, list) else v for v in (_at(record, name) for name in COLUMNS)]
    csv.writer(row, lineterminator="\r\n").writerow(cells)  # cells with one of the two are quoted
    return row.getvalue().removesuffix("\r\n") + "\n"


def as_text(record: Record) -> str:
    """A record as a person reads it; failures are told elsewhere and are empty here."""
    return f"{heading(record['path'])}{record['answer']}\n" if record["ok"] else ""


def as_text_with_questions(record: Record) -> str:
    """The same where one file has several answers."""
    about = f"{record['path']}: {record['question']}"
    return f"{heading(about)}{record['answer']}\n" if record["ok"] else ""


def heading(path: str) -> str:
    """What stands above the answers about a file."""
    return f"==> {path} <==\n"


def _at(record: Record, name: str) -> Any:
    value: Any = record
    for part in name.split("."):
        value = None if value is None else value[part]
    return value


WRITTEN: Mapping[str, Callable[[Record], str]] = {
    "jsonl": as_jsonl,
    "csv": as_csv,
    "text": as_text,
    "text with questions": as_text_with_questions,
}
CSV_HEAD = ",".join(COLUMNS) + "\n"


def _subject(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What a record, a row of a CSV or an item is about, whatever its file is like."""
    names = ("path", "question", "id", "start_s", "end_s")
    return tuple("" if record.get(name) is None else str(record[name]) for name in names)


# ---- files ------------------------------------------------------------------------------------------------


class AnswerFile(LineFile):
    """Records on disk. `keys`: what each line is the record of, None where it is none (heading, blank)."""

    what = "record of seats ask"

    def __init__(
        self, path: Path, *, warn: Callable[[str], None], again: bool = True, overwrite: bool = False
    ) -> None:
        """See LineFile."""
        self.known: dict[str, bool] = {}
        self.keys: list[str | None] = []
        self._failed: dict[str, tuple[str, ...]] = {}  # what each failure is about
        super().__init__(path, warn=warn, again=again, overwrite=overwrite)

    def append(self, record: Record) -> None:
        """Write a record, out of the process at once."""
        self.write(self.written(record))
        self.known[record["key"]] = record["ok"]
        self.keys.append(record["key"])

    @abstractmethod
    def written(self, record: Record) -> bytes:
        """A record in this file's form."""

    def remember(self, key: str | None, record: Mapping[str, Any] | None = None, *, ok: bool = False) -> bool:
        """Note the next line; always true."""
        self.keys.append(key)
        if key is not None:
            self.known[key] = ok
            self._failed.pop(key, None)
            if not ok and record is not None:
                self._failed[key] = _subject(record)
        return True

    def forget_failures(self, wanted: Sequence[Item]) -> int:
        """Take out the failures of these questions, so that they are asked again, also those with the same
        model and options whose file has been mended since. How many there were."""
        keys = {item.key for item in wanted}
        about = {(item.key[:RUN_LENGTH], _subject(asdict(item))) for item in wanted}
        failed = {
            key
            for key, ok in self.known.items()
            if not ok and (key in keys or (key[:RUN_LENGTH], self._failed.get(key)) in about)
        }
        if failed:
            kept = [key for key in self.keys if key not in failed]
            self.rewrite(
                line for line, key in zip(self.records(), self.keys, strict=True) if key not in failed
            )
            self.keys = kept
            for key in failed:
                del self.known[key]
        return len(failed)

    def put_in_order(self, wanted: Sequence[str]) -> bool:
        """Bring the lines of these keys into their order; others stay where they are. Whether any moved."""
        order = in_order(self.keys, wanted)
        if order is not None:
            lines = list(self.records())
            assert len(lines) == len(self.keys)  # or one would be lost
            self.rewrite(lines[place] for place in order)
            self.keys = [self.keys[place] for place in order]
        return order is not None


class JsonLines(AnswerFile):
    """A JSON object a line."""

    FIRST = f'{{"schema_version": {SCHEMA_VERSION}, "key": "'.encode()

    def written(self, record: Record) -> bytes:
        """One line."""
        return as_jsonl(record).encode()

    def take_in(self, record: bytes, number: int) -> bool:
        """A line that has a key and says whether it is an answer; blank lines are left alone."""
        if not record.strip():
            return self.remember(None)
        try:
            value = json.loads(record)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict) or not isinstance(value.get("key"), str):
            return False
        return isinstance(value.get("ok"), bool) and self.remember(value["key"], value, ok=value["ok"])

    def may_be_cut(self, text: bytes) -> bool:
        """Every line begins alike."""
        return text.startswith(self.FIRST) or self.FIRST.startswith(text)


class CsvLines(AnswerFile):
    """A heading, then a row a record; a quoted cell may hold line ends."""

    example = "answers.csv"
    _headed = False  # the heading is there

    def written(self, record: Record) -> bytes:
        """One row, after the heading where the file is empty."""
        self._begin()
        return as_csv(record).encode("utf-8", "backslashreplace")

    def keep_empty(self) -> None:
        """With its heading."""
        self._begin()

    def _begin(self) -> None:
        if not self._headed:
            self.write(CSV_HEAD.encode())
            self.keys.append(None)
            self._headed = True

    def split(self, stream: IO[bytes]) -> Iterator[bytes]:
        """Rows: lines, joined as long as a quoted cell is open."""
        row = b""
        for line in stream:
            row += line
            if row.count(b'"') % 2 == 0:
                yield row
                row = b""
        if row:
            yield row

    def is_whole(self, record: bytes) -> bool:
        """With its line end outside of quotes."""
        return record.endswith(b"\n") and record.count(b'"') % 2 == 0

    def take_in(self, record: bytes, number: int) -> bool:
        """The heading, or a row of as many cells, whole; blank lines are left alone."""
        if not record.strip():
            return self.remember(None)
        if not self._headed:
            self._headed = record == CSV_HEAD.encode()
            return self._headed and self.remember(None)
        csv.field_size_limit(max(csv.field_size_limit(), len(record)))  # what was written can be read
        try:
            cells = next(csv.reader([record.decode()], strict=True), [])
        except (csv.Error, ValueError):
            return False
        if len(cells) != len(COLUMNS) or not record.endswith(b"\n"):
            return False
        named = dict(zip(COLUMNS, cells, strict=True))
        return self.remember(named["key"], named, ok=named["ok"] == "True")

    def may_be_cut(self, text: bytes) -> bool:
        """The heading comes first."""
        return CSV_HEAD.encode().startswith(text)


class TextLines(AnswerFile):
    """Answers under the names of their files. They have no keys, so nothing can be gone on with."""

    example = "answers.txt"

    def written(self, record: Record) -> bytes:
        """A heading and the answer."""
        return as_text(record).encode("utf-8", "backslashreplace")

    def take_in(self, record: bytes, number: int) -> bool:
        """Only an empty file is opened."""
        return False

    def may_be_cut(self, text: bytes) -> bool:
        """Only an empty file is opened."""
        return False


class QuestionLines(TextLines):
    """The same, with each question."""

    def written(self, record: Record) -> bytes:
        """A heading and the answer."""
        return as_text_with_questions(record).encode("utf-8", "backslashreplace")


class Stream:
    """Records to a stream, which knows nothing of earlier runs; `write` gets text that is out at once."""

    torn = False

    def __init__(self, form: str, write: Callable[[str], None]) -> None:
        self.known: Mapping[str, bool] = {}
        self._form, self._write = form, write
        if form == "csv":
            write(CSV_HEAD)

    def append(self, record: Record) -> None:
        """Write a record."""
        text = WRITTEN[self._form](record)
        if text:
            self._write(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Somebody else's stream stays open."""


# ---- order ------------------------------------------------------------------------------------------------


class InOrder:
    """Passes records on in the order of their keys, however they come."""

    def __init__(self, keys: Sequence[str], write: Callable[[Record], None]) -> None:
        self._due = deque(keys)
        self._write = write
        self._waiting: dict[str, Record] = {}

    def put(self, record: Record) -> None:
        """Take a record in; write it and those that waited for it, if it is its turn."""
        self._waiting[record["key"]] = record
        while self._due and self._due[0] in self._waiting:
            self._write(self._waiting.pop(self._due.popleft()))

    def flush(self) -> None:
        """Write what still waits, out of its turn: the run has ended early."""
        for key in [key for key in self._due if key in self._waiting]:
            self._write(self._waiting.pop(key))
