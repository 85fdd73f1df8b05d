"""Annotation files of public benchmarks, as they are published, turned into manifest records.

Every format comes down to rows of a video's name, a question, options, the right letter and a task type,
which becomes the family. Rows stand in JSON, JSON Lines, CSV, TSV or Parquet. Sources:

worldsense      https://huggingface.co/datasets/honglyhly/WorldSense: worldsense_qa.json, an object of videos
                {video: {domain, ..., task0: {question, candidates, answer, task_type, ...}, task1: ...}};
                rows as in VLMEvalKit's WorldSense.tsv and lmms-lab/WorldSense
daily-omni      https://huggingface.co/datasets/liarliar/Daily-Omni: qa.json, a list of {video_id, Question,
                Choice, Answer, Type, ...}, or an object of such entries
omnivideobench  https://github.com/NJU-LINK/OmniVideoBench: data.json, a list of {video, ..., questions:
                [{question, options, correct_option, question_type, ...}]}; its hub has rows in data.parquet
videomme        https://huggingface.co/datasets/lmms-lab/Video-MME: rows of {videoID, question_id, task_type,
                question, options, answer, ...}; https://github.com/BradyFU/Video-MME: a list of {video_id,
                url, questions: [{question_id, task_type, question, choices, answer}]}
lvomnibench     https://github.com/KD-TAO/LVOmniBench: data.json, a list of {video_id, question, options,
                correct_option, question_type, ...}
"""

import ast
import csv
import importlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.lab.manifest import without_letters
from seats_cli.lab.scoring import LETTERS, option_index

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
OTHER_FAMILY = "other"  # of a question whose task type is blank

PART = "_part"  # under this key a row says which part of its video's entry it was

Record = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark names things. Keys are tried in order, whatever their case.

    folders: where its download has the videos. file: a video's file there, without suffix. by_video: an
    object at the top has the videos' names as its keys.
    """

    title: str
    video: tuple[str, ...]
    options: tuple[str, ...]
    answer: tuple[str, ...]
    family: tuple[str, ...]
    folders: tuple[str, ...] = ("videos",)
    file: str = "{0}"
    by_video: bool = False

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """What each row needs, and the keys that it may have it under."""
        return {
            "video": self.video,
            "question": ("question",),
            "options": self.options,
            "answer": self.answer,
            "family": self.family,
        }


BENCHMARKS = {
    "worldsense": Benchmark(
        "WorldSense", ("video_id", "video"), ("candidates",), ("answer",), ("task_type",), by_video=True
    ),
    "daily-omni": Benchmark(
        "Daily-Omni", ("video_id",), ("choice",), ("answer",), ("type",), ("Videos",), "{0}/{0}_video"
    ),
    "omnivideobench": Benchmark(
        "OmniVideoBench", ("video", "video_id"), ("options",), ("correct_option",), ("question_type",)
    ),
    "videomme": Benchmark(
        "Video-MME",
        ("videoid", "url", "video_id"),
        ("options", "choices"),
        ("answer",),
        ("task_type",),
        ("data", "videos", "video"),
    ),
    "lvomnibench": Benchmark(
        "LVOmniBench", ("video_id", "video"), ("options",), ("correct_option", "answer"), ("question_type",)
    ),
}


def convert(name: str, path: Path, media_dir: Path | None = None) -> Iterator[Record]:
    """Manifest records {id, media, question, options, answer, family} of a benchmark's annotation file.

    media_dir: where the videos are, by default beside the annotations. Media are absolute paths: the file
    that is there, found by the benchmark's own layout or else by name anywhere below media_dir, or the one
    that its download would give (`missing_media`). Everything is read before the first record comes out.
    Raises UsageError for a file that cannot be read, and for rows without what is needed, naming the row,
    the keys found and the keys wanted.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"no such benchmark: {name!r}", hint="choose one of " + ", ".join(BENCHMARKS))
    benchmark = BENCHMARKS[name]
    if media_dir is not None and media_dir.exists() and not media_dir.is_dir():
        raise UsageError(f"--media-dir {media_dir} is not a folder")
    finder = _Finder(media_dir or path.parent, benchmark, everywhere=media_dir is not None)
    records, videos = [], []
    families: dict[str, str] = {}  # some spell one task type in two cases
    for where, row in _rows(_load(path), benchmark, path):
        names, record = _record(where, row, benchmark)
        record["media"] = finder.find(names)
        record["family"] = families.setdefault(record["family"].casefold(), record["family"])
        records.append(record)
        videos.append(names[0])
    if not records:
        raise UsageError(f"{path} has no questions", hint=f"is it the annotation file of {benchmark.title}?")
    _number(records, videos)
    return iter(records)


def missing_media(records: Iterable[Record]) -> list[str]:
    """The media of these records that are no files, each once."""
    return [path for path in dict.fromkeys(r["media"] for r in records) if not os.path.isfile(path)]


def _record(where: str, row: Row, benchmark: Benchmark) -> tuple[list[str], Record]:
    """The names that a row's video may go by, and its record, which has no media yet."""
    for what, keys in benchmark.wanted.items():
        if not any(key in row for key in keys):
            found = ", ".join(sorted(row.keys() - {PART})) or "none"
            wanted = ", ".join(" or ".join(names) for names in benchmark.wanted.values())
            raise UsageError(
                f"{where}: no key {' or '.join(keys)} ({what}); keys found: {found}",
                hint=f"a question of {benchmark.title} has: {wanted}",
            )
    names = [name for key in benchmark.video if (name := _video_name(key, _text(row, (key,))))]
    question, answer = _text(row, ("question",)), _text(row, benchmark.answer)
    for what, value in (("video", names), ("question", question), ("answer", answer)):
        if not value:
            raise UsageError(f"{where}: the {what} is blank", hint="correct or remove this question")
    options = _options(where, next(row[key] for key in benchmark.options if key in row))
    index = option_index(answer, options)
    if index is None:
        raise UsageError(
            f"{where}: the answer {answer!r} is none of the options {list(options)}",
            hint="correct or remove this question",
        )
    task = row.get(PART, "") if benchmark.by_video else ""
    return names, {
        "id": f"{names[0]}-{task}" if task else _text(row, ("question_id",)),
        "media": "",
        "question": question,
        "options": list(options),
        "answer": LETTERS[index],
        "family": " ".join(_text(row, benchmark.family).split()) or OTHER_FAMILY,
    }


def _number(records: list[Record], videos: list[str]) -> None:
    """Keep the published ids where they tell all questions apart; else the video's name and a number."""
    given = [record["id"] for record in records]
    if all(given) and len(set(given)) == len(given):
        return
    seen: Counter[str] = Counter()
    for record, video in zip(records, videos, strict=True):
        record["id"] = f"{video}-{seen[video]}"
        seen[video] += 1


# ---- values of a row


def _text(row: Row, keys: Iterable[str]) -> str:
    """What stands under the first of these keys that is not blank; "" if all are."""
    texts = (str(row[key]).strip() for key in keys if row.get(key) is not None)
    return next(filter(None, texts), "")


def _video_name(key: str, text: str) -> str:
    """A video's name as its file has it: of a YouTube address the id, of another address none."""
    if key != "url":
        return text
    match = re.search(r"(?:[?&]v=|youtu\.be/|/shorts/|/embed/)([\w-]{6,})", text)
    return match[1] if match else ""


def _options(where: str, value: object) -> tuple[str, ...]:
    """The texts of a row's options; cells of a table hold a list as text."""
    if isinstance(value, str):
        value = _listed(value)
    if isinstance(value, Mapping) and [str(key).strip().upper() for key in value] == [*LETTERS[: len(value)]]:
        value = list(value.values())
    texts = [str(item).strip() for item in value] if isinstance(value, list | tuple) else []
    if not 2 <= len(texts) <= len(LETTERS) or not all(texts):
        raise UsageError(
            f"{where}: options are {value!r}", hint=f"accepted: a list of 2 to {len(LETTERS)} texts"
        )
    return without_letters(texts)


def _listed(text: str) -> object:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return [line for line in text.splitlines() if line.strip()]


# ---- rows of a file


def _rows(document: object, benchmark: Benchmark, path: Path) -> Iterator[tuple[str, Row]]:
    """Each question with the place to name in errors; what is said of its video is part of the row."""
    items: list[tuple[str, Any]] | None = None
    if isinstance(document, Mapping) and not all(isinstance(value, Mapping) for value in document.values()):
        document = [document]  # JSON Lines of one line
    if isinstance(document, Mapping):
        items = [(str(key), item) for key, item in document.items()]
    elif isinstance(document, list):
        items = [(f"entry {number}", item) for number, item in enumerate(document, 1)]
    if items is None or not all(isinstance(item, Mapping) for _, item in items):
        raise UsageError(
            f"{path}: neither a list of objects nor an object of objects",
            hint=f"is it the annotation file of {benchmark.title}?",
        )
    for name, item in items:
        row = _lowered(item)
        if isinstance(document, Mapping) and benchmark.by_video:
            row.setdefault("video_id", name)
        inner = {key: row.pop(key) for key in list(row) if re.fullmatch(r"task\d+", key)}
        if isinstance(row.get("questions"), list):
            inner |= {f"question {number}": q for number, q in enumerate(row.pop("questions"), 1)}
        elif not inner:
            yield f"{path}: {name}", row
        for part, question in inner.items():
            where = f"{path}: {name}, {part}"
            if not isinstance(question, Mapping):
                raise UsageError(f"{where}: {question!r} is no object")
            yield where, row | _lowered(question) | {PART: part}


def _lowered(row: Mapping[Any, Any]) -> Row:
    return {str(key).strip().casefold(): value for key, value in row.items()}


def _load(path: Path) -> object:
    """The file's content: lists, mappings and texts. Raises UsageError for what is no such file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if data.startswith(b"version https://git-lfs"):
        raise UsageError(
            f"{path} is a Git LFS pointer, not the file itself", hint="fetch it by `git lfs pull`"
        )
    if data.startswith(b"PAR1"):
        return _parquet(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is neither UTF-8 text nor Parquet") from None
    suffix = path.suffix.lower()
    return _table(path, text, suffix) if suffix in (".csv", ".tsv") else _json(path, text)


def _json(path: Path, text: str) -> object:
    """One JSON document, or one a line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        whole = error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            problem = f"line {number}: {error}" if rows else str(whole)
            raise UsageError(
                f"{path} is not JSON: {problem}", hint="accepted: json, jsonl, csv, tsv, parquet"
            ) from None
    return rows


def _table(path: Path, text: str, suffix: str) -> list[Row]:
    csv.field_size_limit(2**30)  # captions may be long
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
    try:
        return [{key: value for key, value in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from None


def _parquet(path: Path) -> list[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")  # seats itself does without it
    except ImportError:
        raise UsageError(
            f"{path} is a Parquet file, and pyarrow is not installed", hint="pip install pyarrow"
        ) from None
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise UsageError(f"cannot read {path}: {error}") from None
    return rows


# ---- files


class _Finder:
    """Finds videos below a folder: by the benchmark's layout, and if asked by their name anywhere."""

    def __init__(self, folder: Path, benchmark: Benchmark, *, everywhere: bool) -> None:
        self.folder, self.benchmark, self.everywhere = Path(os.path.abspath(folder)), benchmark, everywhere
        self._listed: dict[Path, dict[str, Path]] = {}
        self._below: dict[str, list[Path]] | None = None

    def find(self, names: Sequence[str]) -> str:
        """The path of the video that goes by one of these names; where there is none, that of the first."""
        bare = [_without_suffix(name) for name in names]
        for name in bare:
            for place in self._places(name):
                there = self._list(place.parent).get(place.name)
                if there is not None:
                    return str(there)
        for stem in self._stems(bare) if self.everywhere else ():
            found = self._walk().get(stem, [])
            if len(found) > 1:
                raise UsageError(
                    f"two videos are named {stem}: {found[0]} and {found[1]}",
                    hint="give the folder of one of them as --media-dir",
                )
            if found:
                return str(found[0])
        usual = self.folder / self.benchmark.folders[0]
        home = usual if usual.is_dir() or not self.everywhere else self.folder
        return str(home / f"{self._file(bare[0])}.mp4")

    def _file(self, name: str) -> str:
        return self.benchmark.file.format(PurePosixPath(name).name)

    def _stems(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            yield PurePosixPath(self._file(name)).name
            yield PurePosixPath(name).name

    def _places(self, name: str) -> Iterator[Path]:
        """Where the layout has a video: the folder may be the download's own or the one with the videos."""
        yield self.folder / self._file(name)
        for folder in self.benchmark.folders:
            yield self.folder / folder / self._file(name)
        yield self.folder / name

    def _list(self, folder: Path) -> dict[str, Path]:
        """The videos in a folder by their stem; of several with one stem the most usual kind."""
        if folder not in self._listed:
            self._listed[folder] = {}
            for path in sorted(_videos(folder), key=_usual, reverse=True):
                self._listed[folder][path.stem] = path
        return self._listed[folder]

    def _walk(self) -> dict[str, list[Path]]:
        """The videos in all folders below by their stem."""
        if self._below is None:
            self._below = {}
            for folder, _, _ in os.walk(self.folder):
                for stem, path in self._list(Path(folder)).items():
                    self._below.setdefault(stem, []).append(path)
        return self._below


def _videos(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    paths = [folder / name for name in names if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES]
    return [path for path in paths if path.is_file()]


def _usual(path: Path) -> tuple[int, str]:
    return VIDEO_SUFFIXES.index(path.suffix.lower()), path.name


def _without_suffix(name: str) -> str:
    """A video's name as published, without the suffix that some files give it."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in VIDEO_SUFFIXES else name
