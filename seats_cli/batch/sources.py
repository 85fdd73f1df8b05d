"""What was named becomes questions about files: folders, lists, and the rows of a manifest."""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seats_cli.errors import MediaMissing, UsageError

# What a folder is searched for; a file of another name is taken where it is named itself, or by --glob.
_SUFFIXES = """
    3g2 3gp asf avi dv f4v flv ivf m2ts m2v m4v mkv mov mp4 mpe mpeg mpg mts mxf ogv ts vob webm wmv y4m
    aac aif aiff amr ape au caf flac m4a mka mp2 mp3 oga ogg opus w64 wav weba wma wv
    avif bmp gif jpeg jpg jxl png tif tiff webp
"""
MEDIA_SUFFIXES = frozenset(_SUFFIXES.split())


@dataclass(frozen=True)
class Item:
    """One question about one file. `key`: what its record is known by (resume.py), "" before there is one.

    path: as named; id: a manifest's name for it; start_s, end_s: the part that is asked about, in seconds.
    """

    path: str
    question: str
    id: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    key: str = ""

    @property
    def part(self) -> tuple[str, float | None, float | None]:
        """What one reading of a file can serve."""
        return self.path, self.start_s, self.end_s


def check_file(path: str) -> None:
    """Raise MediaMissing for what needs no decoder to see: absent, a folder, empty, unreadable, a URL."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise MediaMissing(f"{path} is an address, not a file", hint="only local files are read: download it")
    if "\0" in path or not os.path.exists(path):
        raise MediaMissing(f"no such file: {path}")
    if os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            raise MediaMissing(f"cannot look into the folder {path}: {error.strerror}") from None
        raise MediaMissing(
            f"{path} is a folder, not a media file",
            hint="a folder stands for its files where it is an argument; a list or a manifest names files",
        )
    if not os.access(path, os.R_OK):
        raise MediaMissing(f"no permission to read {path}")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise MediaMissing(f"{path} is empty (0 bytes)")


# ---- folders ----------------------------------------------------------------------------------------------


def files_in(folder: str, *, recursive: bool, globs: Sequence[str]) -> list[str]:
    """The media files of a folder, sorted by name, as paths that begin with `folder` as it was named.

    Media by their names' endings, or whatever matches one of `globs`: a pattern with a slash is compared with
    the path below the folder, another with the name. Hidden files and folders are left out. Links are
    followed, each folder once. A folder that cannot be read, this one or one in it, stands for its files
    itself, so that somebody is told of it.
    """
    closed: list[str] = []
    found = [below for below in _walk(folder, recursive, closed.append) if _wanted(below, globs)]
    return [
        os.path.join(folder, below) if below else folder
        for below in sorted([*found, *closed], key=lambda below: below.split(os.sep))
    ]


def nothing_in(folder: str, *, recursive: bool, globs: Sequence[str]) -> MediaMissing:
    """The error for a folder in which `files_in` finds nothing."""
    what = f"files that match {' or '.join(globs)}" if globs else "media files"
    deeper = "" if recursive or not _has_folders(folder) else "; --recursive looks into its folders"
    return MediaMissing(
        f"{folder} is a folder without {what}{deeper}",
        hint="--glob PATTERN chooses files by name, whatever their ending",
    )


def _walk(folder: str, recursive: bool, closed: Callable[[str], None]) -> Iterator[str]:
    """Paths below a folder of all that is no folder and not hidden; `closed` is told of folders that cannot
    be read."""
    visited: set[tuple[int, int]] = set()  # links may lead in circles
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            here = os.stat(os.path.join(folder, below))
            if (here.st_dev, here.st_ino) in visited:
                continue
            visited.add((here.st_dev, here.st_ino))
            entries = list(os.scandir(os.path.join(folder, below)))
        except OSError:
            closed(below)
            continue
        for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
            if entry.name.startswith("."):
                continue
            path = os.path.join(below, entry.name)
            if not os.path.isdir(entry.path):
                yield path
            elif recursive:
                waiting.append(path)


def _wanted(below: str, globs: Sequence[str]) -> bool:
    name = os.path.basename(below)
    if not globs:
        return is_media_name(name)
    return any(fnmatch.fnmatchcase(below if "/" in pattern else name, pattern) for pattern in globs)


def is_media_name(name: str) -> bool:
    """Whether a name ends as those of media do."""
    return "." in name and name.rpartition(".")[2].lower() in MEDIA_SUFFIXES


def _has_folders(folder: str) -> bool:
    try:
        return any(entry.is_dir() for entry in os.scandir(folder))
    except OSError:
        return False


# ---- lists ------------------------------------------------------------------------------------------------


def listed(data: bytes, *, nul: bool) -> list[str]:
    """The names in a list: a line each, without empty lines and comments (#), or ended by NUL, taken exactly.

    Bytes that are no UTF-8 stay, as in names that the system gives.
    """
    if nul:
        return [os.fsdecode(name) for name in data.split(b"\0") if name]
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = (line.removesuffix(b"\r") for line in data.split(b"\n"))
    return [os.fsdecode(line) for line in lines if line.strip() and not line.startswith(b"#")]


def questions_in(path: Path, data: bytes | None = None) -> list[str]:
    """The questions of a file, a line each, without empty lines and comments (#). `data`: what is in it, if
    that was read already. Raises UsageError."""
    try:
        text = (path.read_bytes() if data is None else data).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the questions {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the questions {path} are not UTF-8 text", hint="a line each") from None
    lines = (line.strip() for line in text.split("\n"))
    found = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise UsageError(f"{path} holds no questions", hint="a line each")
    return found


# ---- shards -----------------------------------------------------------------------------------------------


def shard_of(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """Part `index` (from 1) of `count`: files are dealt out in turns, all questions about one together."""
    numbers: dict[str, int] = {}
    return [item for item in items if numbers.setdefault(item.path, len(numbers)) % count == index - 1]
