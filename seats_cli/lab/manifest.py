"""Manifests: JSON Lines or CSV files that say which questions are asked about which clips, and what is right.

    {"media": "a.mp4", "question": "who speaks first?", "answer": ["the host", "a woman"]}
    {"media": "a.mp4", "question": "which car?", "options": ["red", "blue"], "answer": "B", "family": "cars"}

media     a file; a relative path counts from the manifest's folder
question  asked as it stands; options that it does not list itself are appended to it, with a line that asks
          for a letter
answer    the accepted answer or a list of them; with options a letter of theirs, or the text of one. What
          could be either is a letter
options   two to 26 texts, with or without their letters ("A. red")
family    what accuracy is grouped by; "all" where none is given
id        a name that no other line has; made from media, question and range where none is given
start     with end, in seconds or as "mm:ss": ask about this part of the clip only
Other keys are ignored, unless one looks like a slip of the pen for one of these.

A file that ends in .csv has a row a question, and these keys in its heading. An empty cell says nothing;
several options or answers stand in one cell with | between them.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.lab.scoring import LETTERED, LETTERS, edit_distance, option_index

KEYS = ("media", "question", "answer", "options", "family", "id", "start", "end")
NO_FAMILY = "all"
MAX_S = 1e9
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Sample:
    """A question about a clip, ready to be asked.

    question: exactly as the model gets it. answers: accepted answers, () where the manifest gives none; with
    options each is a letter or a text of theirs. options: texts without letters, () for an open question.
    clip: the same for samples of the same part of the same file. start_s, end_s: that part, in seconds.
    """

    id: str
    media: Path
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...]
    family: str
    clip: str
    start_s: float | None = None
    end_s: float | None = None


def read_manifest(path: Path, *, need_answers: bool = True, data: bytes | None = None) -> list[Sample]:
    """The samples of a manifest, in its order. Files that are named need not exist.

    `data`: what it holds, where that has been read already; `path` then says what it is called and where it
    counts from.

    Raises UsageError, naming file, line and key, for what cannot be asked: no JSON object, a key that is
    missing or of the wrong kind, an answer that is no option, an id used twice, no sample at all.
    """
    samples: list[Sample] = []
    lines: dict[str, int] = {}  # id -> its line
    for number, value in _rows(path, data):
        sample = _Line(path, number, value).sample(need_answers)
        if sample.id in lines:
            raise UsageError(
                f"{path}:{number}: the id {sample.id!r} is already that of line {lines[sample.id]}",
                hint='give each line its own "id"; lines without one must not ask the same of the same clip',
            )
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        raise UsageError(f"{path} holds no samples", hint=_FORMS)
    return samples


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with its options listed as "A. ..." lines; unchanged if it lists all of them already."""
    if not options or _lists(question, options):
        return question
    listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *listed, ASK_FOR_LETTER])


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """The options' texts. Letters go where most options have the one of their place before them."""
    texts = [text.strip() for text in options]
    cut = [_after_letter(text, letter) for text, letter in zip(texts, LETTERS, strict=False)]
    if sum(text is not None for text in cut) * 2 <= len(texts):
        return tuple(texts)
    return tuple(text if short is None else short for text, short in zip(texts, cut, strict=True))


def _after_letter(text: str, letter: str) -> str | None:
    match = LETTERED.match(text)
    if match is None or (match[1] or match[2]).upper() != letter:
        return None
    return text[match.end() :].strip()


def _lists(question: str, options: Sequence[str]) -> bool:
    """Whether a question names each option with its letter before it."""
    asked = " ".join(question.casefold().split())
    texts = (" ".join(option.casefold().split()) for option in options)
    return all(
        re.search(rf"(?<!\w){letter.lower()}\s*[.):]\s*{re.escape(text)}(?!\w)", asked)
        for letter, text in zip(LETTERS, texts, strict=False)
    )


def _read(path: Path, data: bytes | None) -> str:
    try:
        return (path.read_bytes() if data is None else data).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the manifest {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the manifest {path} is not UTF-8 text", hint=_FORMS) from None


def _rows(path: Path, data: bytes | None) -> Iterator[tuple[int, object]]:
    """The rows of a manifest as JSON would have them, each with the number of its line."""
    text = _read(path, data)
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
        return
    # Not splitlines: JSON strings may hold other separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}:{number}: not JSON: {error}", hint=_ONE_OBJECT) from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, object]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        heads = [head.strip() for head in next(reader, [])]
        if len(heads) == 1 and (other := next((sign for sign in ";\t" if sign in heads[0]), None)):
            told = {";": "semicolons", "\t": "tabs"}[other]
            raise UsageError(f"{path}:1: the columns stand between {told}", hint="write commas between them")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(heads):
                raise UsageError(
                    f"{path}:{reader.line_num}: {len(cells)} cells under {len(heads)} heads",
                    hint='a cell with a comma stands in quotes: "red, or blue"',
                )
            filled = zip(heads, cells, strict=False)
            yield reader.line_num, {head: _from_cell(head, cell) for head, cell in filled if cell.strip()}
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: not CSV: {error}", hint=_FORMS) from None


def _from_cell(key: str, cell: str) -> object:
    """What a cell says: a list where there may be several, else its text."""
    if key in ("options", "answer") and "|" in cell:
        return [part.strip() for part in cell.split("|")]
    return cell


class _Line:
    """One line of a manifest; every look-up checks the kind and says where it went wrong."""

    def __init__(self, path: Path, number: int, value: object) -> None:
        self.path, self.where = path, f"{path}:{number}"
        if not isinstance(value, dict):
            raise UsageError(
                f"{self.where}: a {type(value).__name__}, not an object with keys", hint=_ONE_OBJECT
            )
        self.values: dict[str, Any] = {key: item for key, item in value.items() if item is not None}
        for key in self.values.keys() - set(KEYS):
            meant = next((known for known in KEYS if known not in self.values and _slip(key, known)), None)
            if meant is not None:
                raise UsageError(f'{self.where}: unknown key "{key}"', hint=f'did you mean "{meant}"?')

    def sample(self, need_answers: bool) -> Sample:
        written, asked = self.text("media"), self.text("question")
        if "\0" in written:
            raise self.wrong("media", "a path", written)
        start_s, end_s = self.seconds("start"), self.seconds("end")
        if end_s is not None and end_s <= (start_s or 0.0):
            raise self.wrong("end", f"later than start ({start_s or 0.0:g})", end_s)
        media = Path(os.path.normpath(self.path.parent / written))
        clip = _clip(media, self.path.parent, start_s, end_s)
        options = self.options()
        return Sample(
            id=self.id() or _made_id(media, clip, asked),
            media=media,
            question=with_options(asked, options),
            answers=self.answers(options, need_answers),
            options=options,
            family=self.text("family").strip() if "family" in self.values else NO_FAMILY,
            clip=clip,
            start_s=start_s,
            end_s=end_s,
        )

    def text(self, key: str) -> str:
        if key not in self.values:
            raise UsageError(
                f'{self.where}: no key "{key}"',
                hint="a line needs media and question; to be scored by, an answer too",
            )
        return self.checked(key, self.values[key])

    def checked(self, key: str, value: object, kind: str = "text that is not empty") -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, kind, value)
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as \ud83d alone
            raise self.wrong(key, "valid Unicode", value) from None
        return value

    def id(self) -> str | None:
        value = self.values.get("id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return None if value is None else self.checked("id", value)

    def seconds(self, key: str) -> float | None:
        value = written = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, str):
            from seats_cli.media.sampling import parse_time  # whose room needs decoders

            with suppress(UsageError):  # told below, with the line
                value = parse_time(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_S:
            raise self.wrong(key, 'a number of seconds, 0 or more, or "mm:ss"', written)
        return float(value)

    def options(self) -> tuple[str, ...]:
        value = self.values.get("options")
        if value is None or value == []:
            return ()
        kind = f"a list of 2 to {len(LETTERS)} texts"
        if isinstance(value, str):  # of a table, most likely
            kind += ", in a CSV cell with | between them"
        if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
            raise self.wrong("options", kind, value)
        return without_letters([self.checked("options", item, kind) for item in value])

    def answers(self, options: Sequence[str], needed: bool) -> tuple[str, ...]:
        value = self.values.get("answer")
        if value in (None, []) and not needed:
            return ()
        value = self.text("answer") if value is None else value
        listed = value if isinstance(value, list) and value else [value]
        kind = "a text or a list of texts"
        # A number is what a count's answer looks like to whoever writes JSON.
        found = tuple(
            str(item)
            if isinstance(item, int | float) and not isinstance(item, bool)
            else self.checked("answer", item, kind)
            for item in listed
        )
        for answer in found if options else ():
            if option_index(answer, options) is None:
                last = LETTERS[len(options) - 1]
                raise self.wrong("answer", f"a letter from A to {last}, or the text of one option", answer)
        return found

    def wrong(self, key: str, accepted: str, met: object) -> UsageError:
        shown = json.dumps(met)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UsageError(f'{self.where}: "{key}" must be {accepted}, not {shown}')


_FORMS = "a manifest has one JSON object a line, or rows under a heading in a file that ends in .csv"
_ONE_OBJECT = 'one JSON object a line: {"media": "a.mp4", "question": "what is said?"}'


def _slip(key: str, known: str) -> bool:
    """Whether a key was probably meant to be a known one: an edit for three letters at most, or letters that
    have changed places."""
    if len(known) > 3 and sorted(key.casefold()) == sorted(known):
        return True
    return edit_distance(key.casefold(), known) <= (len(known) // 3 if len(known) > 3 else 0)


def _clip(media: Path, folder: Path, start_s: float | None, end_s: float | None) -> str:
    """The clip's name: the file as seen from the manifest, with the range as a media fragment (#t=10,20)."""
    file, home = os.path.abspath(media), os.path.abspath(folder)
    name = os.path.relpath(file, home) if file.startswith(os.path.join(home, "")) else file
    if start_s is None and end_s is None:
        return name
    start, end = ("" if time is None else f"{time!r}".removesuffix(".0") for time in (start_s, end_s))
    return f"{name}#t={start},{end}".removesuffix(",")


def _made_id(media: Path, clip: str, question: str) -> str:
    """An id that stays the same when lines are added, or the folder is moved."""
    digest = hashlib.sha256(f"{clip}\n{question}".encode()).hexdigest()
    return f"{media.stem}-{digest[:10]}"
