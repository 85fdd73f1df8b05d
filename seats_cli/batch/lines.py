"""A file that a run adds records to, one at a time, and that the next run goes on with.

A record leaves the process in one write, so that a run that is killed leaves whole records and at most one
torn one at the end, which the next run takes away. Only one run at a time may have a file.
"""

import os
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from seats_cli.errors import UsageError


class LineFile(ABC):
    """Records on disk, a line each. Use it as a context manager; subclasses say what a record looks like.

    A file that this run made and wrote nothing to is taken away again, but for `keep_empty`. A file of
    anything else is never changed. Another run on the same file is refused where the file system has locks
    (POSIX).
    """

    what = "record"  # what a line is, in words
    example = "answers.jsonl"  # a name for a file of this kind
    torn = False  # a write has ended in the middle of a record, behind which nothing may come

    def __init__(
        self, path: Path, *, warn: Callable[[str], None], again: bool = True, overwrite: bool = False
    ) -> None:
        """Open the file and read what it has; with `overwrite` empty it, without `again` refuse if there is
        something. Raises UsageError where it cannot be, is another run's, or is of another kind."""
        self.path = path
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint=f"name a file in it: -o {path / self.example}")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}")
        self._real = Path(os.path.realpath(path))  # what is written anew must not take a link's place
        mode = _mode(path)
        self._made = mode is None
        self._plain = mode is None or stat.S_ISREG(mode)  # a pipe cannot be read again
        self._stream = self._opened()
        try:
            if self._plain and overwrite:
                self._stream.truncate(0)
            elif self._plain and not again and os.fstat(self._stream.fileno()).st_size:
                raise UsageError(
                    f"{path} exists, and text cannot be gone on with",
                    hint="--overwrite empties it; --format jsonl or csv can be resumed",
                )
            elif self._plain:
                self._read(warn)
        except BaseException:
            self._stream.close()
            raise

    # --- what a subclass says ----------------------------------------------------------------------------
    @abstractmethod
    def take_in(self, record: bytes, number: int) -> bool:
        """Remember a record that was there, with its line end; False if it is none of this kind."""

    @abstractmethod
    def may_be_cut(self, text: bytes) -> bool:
        """Whether what stands alone in the file may be the beginning of its first record."""

    def split(self, stream: IO[bytes]) -> Iterator[bytes]:
        """The file's records, each with its line end, the last perhaps without."""
        yield from stream

    def is_whole(self, record: bytes) -> bool:
        """Whether a record that was read has its end."""
        return record.endswith(b"\n")

    # --- writing -----------------------------------------------------------------------------------------
    def write(self, record: bytes) -> None:
        """Add a record, with its line end, in one write: what follows may be killed."""
        self.torn = True
        written = self._stream.write(record)
        while written is not None and written < len(record):  # a full disk raises at the next try
            record = record[written:]
            written = self._stream.write(record)
        self.torn = False

    def rewrite(self, records: Iterable[bytes]) -> None:
        """Put other records in the file's place, at once or not at all; this run keeps its lock."""
        descriptor, name = tempfile.mkstemp(prefix=f".{self._real.name}.", dir=self._real.parent)
        os.close(descriptor)
        stream: IO[bytes] = open(name, "ab+", buffering=0)  # noqa: SIM115 - it stays open
        try:
            os.chmod(name, stat.S_IMODE(os.fstat(self._stream.fileno()).st_mode))
            lock(stream)
            with open(name, "ab") as buffered:
                buffered.writelines(records)
            os.fsync(stream.fileno())
            os.replace(name, self._real)
        except BaseException:
            stream.close()
            Path(name).unlink(missing_ok=True)
            raise
        self._stream.close()
        self._stream = stream

    def keep_empty(self) -> None:
        """Leave the file there even if nothing is written to it."""
        self._made = False

    def close(self) -> None:
        """Close the file, or take it away, as long as no other run can have it."""
        if self._stream.closed:
            return
        empty = self._made and self._plain and not os.fstat(self._stream.fileno()).st_size
        if os.name != "posix":  # where what is open cannot be taken away
            self._stream.close()
        if empty and (self._stream.closed or self._is_still_there(self._stream)):
            self.path.unlink(missing_ok=True)
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- opening -----------------------------------------------------------------------------------------
    def _opened(self) -> IO[bytes]:
        while True:
            try:
                stream: IO[bytes] = self.path.open("ab+" if self._plain else "wb", buffering=0)
            except OSError as error:
                raise UsageError(f"cannot write {self.path}: {error.strerror}") from None
            if not self._plain:
                return stream
            if not lock(stream):
                stream.close()
                raise UsageError(
                    f"another run is writing {self.path}", hint="wait for it, or give another file to -o"
                )
            if self._is_still_there(stream):
                return stream
            stream.close()  # the run before put another file in its place in between, or took it away
            self._made = _mode(self.path) is None

    def _is_still_there(self, stream: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def records(self) -> Iterator[bytes]:
        """What is in the file, record by record."""
        with open(self._stream.fileno(), "rb", closefd=False) as buffered:
            buffered.seek(0)
            yield from self.split(buffered)

    def _read(self, warn: Callable[[str], None]) -> None:
        good = 0  # bytes up to the end of the last whole record
        found = False
        for number, record in enumerate(self.records(), 1):
            whole, ours = self.is_whole(record), self.take_in(record, number)
            if not ours and not whole and (found or self.may_be_cut(record)):
                self._stream.truncate(good)
                warn(f"{self.path}: the last line was cut off in the middle; it is removed and run again")
                return
            if not ours and record.strip():
                raise self.foreign(number)
            if not whole:
                self.write(b"\n")
            found |= ours and bool(record.strip())
            good += len(record)

    def foreign(self, number: int) -> UsageError:
        """The error for a line of something else."""
        return UsageError(
            f"{self.path}: line {number} is no {self.what}; nothing is written to this file",
            hint="give a new file to -o, or the one that an earlier run wrote",
        )


def _mode(path: Path) -> int | None:
    """What kind of file there is; None without one, or where nobody can tell."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def lock(stream: IO[bytes]) -> bool:
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
