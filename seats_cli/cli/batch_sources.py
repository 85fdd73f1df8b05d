"""What was typed of a batch becomes questions about files, before anything heavy is imported."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seats_cli.batch.sources import Item, files_in, is_media_name, listed, nothing_in, questions_in, shard_of
from seats_cli.cli.console import Terminal
from seats_cli.errors import MediaMissing, UsageError

STDIN = "-"
EXAMPLE = 'seats ask clip.mp4 "what is said?"'


@dataclass(frozen=True)
class Sources:
    """Where files and questions come from, as typed."""

    media: tuple[str, ...]
    question: str
    list_from: str | None = None
    null: bool = False
    recursive: bool = False
    globs: tuple[str, ...] = ()
    manifest: Path | None = None
    questions: Path | None = None
    shard: tuple[int, int] | None = None
    output: Path | None = None  # which a folder that it lies in does not stand for

    @property
    def files(self) -> tuple[str, ...]:
        """Files that names and questions are read from."""
        named = (self.list_from, self.manifest, self.questions)
        return tuple(str(path) for path in named if path is not None and str(path) != STDIN)

    @property
    def many(self) -> bool:
        """Whether it is more than files that were named one by one, with one question."""
        lists = self.list_from is not None or STDIN in self.media or self.shard is not None
        files = self.manifest is not None or self.questions is not None
        return lists or files or any(map(os.path.isdir, self.media))


def check(sources: Sources) -> None:
    """Raise UsageError for sources that do not go together; nothing is read yet."""
    lists = sources.list_from is not None or STDIN in sources.media
    if sources.manifest is not None:
        if sources.media or sources.question or lists or sources.questions is not None:
            raise UsageError(
                "--manifest names files and questions itself",
                hint="leave out MEDIA, QUESTION, --from and --questions",
            )
        if sources.recursive or sources.globs:
            raise UsageError("--recursive and --glob are about folders, and a manifest has none")
        return
    named = [*sources.media, sources.list_from, None if sources.questions is None else str(sources.questions)]
    if named.count(STDIN) > 1:
        raise UsageError("stdin can be read once only: give - once")
    if sources.null and not lists:
        raise UsageError("--null (-0) says how a list is written; there is none", hint="--from FILE, or -")
    if sources.questions is None:
        check_arguments(sources.media, sources.question, listed=lists)
    elif not sources.media and not lists:
        raise UsageError("files are missing", hint="seats ask videos/ --questions questions.txt")
    elif len(sources.media) > 1 and _is_a_question(last := sources.media[-1]):
        raise UsageError(
            f"with --questions every argument is a file, and there is no {last!r}",
            hint="leave the question out, or write it into the file of questions",
        )


def _is_a_question(argument: str) -> bool:
    return not os.path.lexists(argument) and not is_media_name(argument)


def check_arguments(media: Sequence[str], question: str, *, listed: bool = False) -> None:
    """Raise UsageError unless there are files first and a question last; `listed`: files come from a list."""
    if not question:
        problem = "no question: the last argument is empty" if media else "files and a question are missing"
        raise UsageError(problem, hint=EXAMPLE)
    if not media and not listed:
        missing = "the question is missing" if os.path.exists(question) else "files or a question are missing"
        raise UsageError(f"only one argument, {question!r}: {missing}", hint=f"files first, then: {EXAMPLE}")
    if not question.strip():
        raise UsageError("the question, the last argument, is blank", hint=EXAMPLE)
    if os.path.isfile(question):
        raise UsageError(
            f"the last argument is the question, but {question!r} is a file",
            hint=f"files first, then: {EXAMPLE}",
        )


def files_of(terminal: Terminal, sources: Sources) -> list[str]:
    """Every file that is asked about, in order: those named, those in folders, those in lists. A folder
    without any is a warning beside others, and so are options that are about folders where there is none;
    MediaMissing where nothing else is named."""
    found: list[str] = []
    misplaced = (sources.recursive or sources.globs) and not any(map(os.path.isdir, sources.media))
    # What is not there may be a folder, and is an error of its own.
    if misplaced and all(name == STDIN or os.path.exists(name) for name in sources.media):
        terminal.warn(
            "--recursive and --glob are about folders, and none is named: every file is asked about"
        )
    empty: list[MediaMissing] = []
    for name in [*sources.media, *([] if sources.list_from is None else [sources.list_from])]:
        if name == STDIN or name is sources.list_from:
            found += _listed(name, null=sources.null)
        elif os.path.isdir(name):
            inside = files_in(name, recursive=sources.recursive, globs=sources.globs)
            if sources.output is not None:
                output = os.path.realpath(sources.output)
                inside = [path for path in inside if os.path.realpath(path) != output]
            if not inside:
                empty.append(nothing_in(name, recursive=sources.recursive, globs=sources.globs))
            found += inside
        else:
            found.append(name)
    if empty and not found:
        raise empty[0]
    for told in empty:
        terminal.warn(told.message)
    return found


def items_of(terminal: Terminal, sources: Sources) -> list[Item]:
    """Every question about every file, in order, of the shard that was asked for."""
    if sources.manifest is not None:
        items = _manifest(sources.manifest)
    else:
        asked = [sources.question] if sources.questions is None else _questions(sources.questions)
        files = files_of(terminal, sources)
        if not files:
            raise UsageError("nothing to ask about: the list names no file")
        items = [Item(path, text) for path in files for text in asked]
    if sources.shard is not None:
        items = shard_of(items, *sources.shard)
    return items


def _manifest(path: Path) -> list[Item]:
    from seats_cli.lab.manifest import read_manifest

    data = None if str(path) != STDIN else sys.stdin.buffer.read()
    return [
        Item(str(sample.media), sample.question, sample.id, sample.start_s, sample.end_s)
        for sample in read_manifest(
            Path("stdin") if data is not None else path, need_answers=False, data=data
        )
    ]


def _questions(path: Path) -> list[str]:
    piped = str(path) == STDIN
    return questions_in(Path("stdin") if piped else path, sys.stdin.buffer.read() if piped else None)


def _listed(name: str, *, null: bool) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the list {name}: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"the list {name} is UTF-16", hint="write it as UTF-8")
    has_nul = b"\0" in data
    if has_nul and re.search(rb"[\x01-\x08\x0e-\x1a]", data):
        raise UsageError(f"{name} is no list of names", hint="a list is text, a name a line")
    if null and not has_nul and b"\n" in data:
        raise UsageError(f"the list {name} has a name a line, and no NUL", hint="leave -0 out")
    if has_nul and not null:
        raise UsageError(f"the names in the list {name} end with NUL", hint="-0 reads it")
    return listed(data, nul=null)
