"""When an answer counts as right, and how far a transcript is from what was said.

Open questions: normalised exact match. `normalise` of the answer must equal that of one accepted answer:
Unicode NFKC, case folded, straight quotes, single spaces, every word without the punctuation around it. Signs
that change a value stay ("-5", "50%", "c++", ".5"), and so do punctuation inside a word and articles: "a dog"
is not "dog" unless the manifest accepts both.

Questions with options: the answer must choose exactly one option, and the right one. What it says is looked
for in this order; the first of these that says anything decides, and if that says two things, the answer is
wrong:
1. the whole answer is a letter ("B", "(b)", "B.", "**B**") or the text of an option;
2. what is marked as the answer, by these same rules: "\\boxed{B}", "<answer>B</answer>";
3. a declaration: "Answer: B", "the answer is (B)", "the answer is red";
4. a letter that heads a line: "B) red", "B. red", "(B) red", "B: because ..."; with others it is one of
   several ("A and B are wrong");
5. a letter that is named: "option B", "I think it is B.";
6. an option's text that begins the answer, before a comma ("Yes, there is no doubt"), unless another option
   stands between commas after it;
7. an option's text, as whole words that no "not" precedes; a longer option hides a shorter one inside it.
A letter inside a word is none, and neither is an article ("A man runs") or a lower-case word ("a man runs").
Where a letter and the text after it belong to different options ("B) red", red being A), the answer is wrong.

Transcription: exact match as above, and the word error rate: the fewest words to insert, delete or replace,
divided by the words of the reference; of several accepted answers the nearest one counts. Words are what
spaces separate, so the rate means little in writing without spaces.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seats_cli.lab.manifest import Sample

TRANSCRIPTION = "transcription"  # the family whose answers get a word error rate
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERED = re.compile(r"\s*(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*[.):：．、])\s*(?=\S)")  # as in "B. red"

_QUOTES = str.maketrans("‘’‛ʼ“”„‟", "''''\"\"\"\"")
_AROUND = frozenset(".,;:!?\"'`´()[]{}<>«»‹›…*_¿¡。、「」『』")  # never signs such as - + $ % # @


@dataclass(frozen=True)
class Score:
    """How one answer fared. wer: word error rate, 0.0 for a perfect transcript; None where there is none."""

    correct: bool
    wer: float | None


def score(sample: "Sample", text: str) -> Score:
    """Score a model's answer to a sample. Raises ValueError for a sample without accepted answers."""
    if not sample.answers:
        raise ValueError(f"sample {sample.id} has no answer to compare with")
    if sample.options:
        chosen = choose_option(text, sample.options)
        right = {option_index(answer, sample.options) for answer in sample.answers}
        return Score(chosen is not None and chosen in right, None)
    said = normalise(text)
    correct = any(said == normalise(answer) for answer in sample.answers)
    if sample.family != TRANSCRIPTION:
        return Score(correct, None)
    return Score(correct, min(word_error_rate(answer, text) for answer in sample.answers))


def normalise(text: str) -> str:
    """What an exact match compares; see the module's docstring. Text of nothing but punctuation keeps it."""
    words = _plain(text).casefold()
    words = unicodedata.normalize("NFKC", words)
    bare = [word for word in map(_bare, words.split()) if word]
    return " ".join(bare or words.split())


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Edits a word of the reference, both normalised. May exceed 1; an empty reference counts as one word."""
    words = normalise(reference).split()
    return edit_distance(words, normalise(hypothesis).split()) / max(1, len(words))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance of two sequences, in memory of the shorter one's length."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, item in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (item != other))
    return row[-1]


def option_index(answer: str, options: Sequence[str]) -> int | None:
    """Which option an accepted answer means: by a letter of theirs, else by the text that exactly one has.

    "B. red" means B where that is B's text.
    """
    letter = _letter(answer, len(options))
    if letter is not None:
        return letter
    found = _of_text(answer, options)
    match = LETTERED.match(answer)
    if match is not None and not found:
        named = _letter(match[1] or match[2], len(options))
        found = _of_text(answer[match.end() :], options) & {named}
    return found.pop() if len(found) == 1 else None


def choose_option(text: str, options: Sequence[str]) -> int | None:
    """The one option that an answer chooses, by the rules above; None for no choice or several."""
    found = _read(re.sub(r"[*_`]+", "", _plain(text)).strip(), options)  # Markdown's emphasis
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_QUOTES)


def _bare(word: str) -> str:
    """A word without the punctuation around it; a decimal point before a digit is part of the number."""
    start, end = 0, len(word)
    while end > start and word[end - 1] in _AROUND:
        end -= 1
    while start < end and word[start] in _AROUND:
        if word[start] == "." and word[start + 1 : start + 2].isdigit():
            break
        start += 1
    return word[start:end]


def _letter(text: str, count: int) -> int | None:
    """The option that a text names if it is nothing but one of `count` letters."""
    bare = normalise(text).upper()
    return LETTERS.index(bare) if len(bare) == 1 and bare in LETTERS[:count] else None


def _of_text(text: str, options: Sequence[str]) -> set[int]:
    """The options that have this text."""
    said = normalise(text)
    return {i for i, option in enumerate(options) if normalise(option) == said}


# ---- the seven readings of an answer, each a set of options


def _read(text: str, options: Sequence[str]) -> set[int]:
    """What the first reading that says anything says."""
    for read in (_whole, _marked, _declared, _headed, _named, _leading, _contained):
        found = read(text, options)
        if found:
            return found
    return set()


def _whole(text: str, options: Sequence[str]) -> set[int]:
    letter = _letter(text, len(options))
    return _of_text(text, options) if letter is None else {letter}


_MARKS = (  # bounded: endless answers must not take forever
    re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]{0,400}\}){0,400})\}"),
    re.compile(r"<answer>((?:(?!<answer>).){0,400}?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL),
)
_FONTS = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}")  # as in \boxed{\text{B}}


def _marked(text: str, options: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for mark in _MARKS:
        for match in mark.finditer(text):
            found |= _read(_FONTS.sub(r"\1", match[1]).strip(), options)
    return found


_DECLARES = re.compile(
    r"\banswers?\b(?:\s+(?:is|are|was|must be|should be|would be))?"
    r"(?:\s+(?:most likely|likely|probably|clearly))?"
    r"\s*[:=]?\s*(?:(?:the\s+)?(?:option|choice|letter)\b\s*:?\s*)?",
    re.IGNORECASE,
)


def _declared(text: str, options: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for match in _DECLARES.finditer(text):
        found |= _stated(text[match.end() :].lstrip(), options)
    return found


_BULLET = re.compile(r"\s*(?:[-•>]\s+)?(?:(?:option|choice)\b\s*:?\s*)?", re.IGNORECASE)


def _headed(text: str, options: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for line in text.splitlines():
        found |= _letters(_BULLET.sub("", line, count=1), options, strict=True)
    return found


_NAMES = re.compile(r"\b(?:option|choice|letter|alternative)\s+", re.IGNORECASE)
_ENDS = re.compile(
    r"(?:\b(?:is|be|choose|chose|pick|select|say)|'s)\s*:?\s*[(\"']?([A-Za-z])[)\"'.!\s]*$", re.IGNORECASE
)
_NEGATED = re.compile(r"(?:\bnot|n't|\bnever|\bneither|\bnor)\s*$", re.IGNORECASE)


def _named(text: str, options: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for match in _NAMES.finditer(text):
        if not _NEGATED.search(text[: match.start()]):
            found |= _letters(text[match.end() :], options)
    last = _ENDS.search(text)
    if last is not None:
        index = LETTERS.index(last[1].upper())
        found |= {index} if index < len(options) else set()
    return found


def _leading(text: str, options: Sequence[str]) -> set[int]:
    line = _line(text, options)
    parts = line.split(",")
    for count in range(len(parts) - 1, 0, -1):  # an option's text may have commas itself
        found = _of_text(",".join(parts[:count]), options)
        if found:
            rest = re.split(r"[,.;:!?]|\b(?:and|or)\b", ",".join(parts[count:]), flags=re.IGNORECASE)
            return set() if any(_of_text(part, options) for part in rest if part.strip()) else found
    return set()


def _contained(text: str, options: Sequence[str]) -> set[int]:
    words = normalise(text).split()
    texts = [normalise(option).split() for option in options]
    covered = [False] * len(words)
    found: set[int] = set()
    for length in sorted({len(option) for option in texts if option}, reverse=True):
        seen: set[int] = set()
        for start in range(len(words) - length + 1):
            here = words[start : start + length]
            if here not in texts or all(covered[start : start + length]):
                continue
            seen.update(range(start, start + length))
            before = words[start - 1] if start else ""
            if before not in ("not", "no", "never", "nor") and not before.endswith("n't"):
                found |= {i for i, option in enumerate(texts) if option == here}
        for place in seen:
            covered[place] = True
    return found


# ---- letters at the beginning of a text

_FIRST = re.compile(r"\s*[(\[{\"']?\s*([A-Za-z])(?!\w|[-'&]\w)")
_CLOSED = re.compile(
    r"\s*[)\]}\"'.:;,!?]+(?=\s|$)|\s*$|\s*\n|\s+[-–—]\s|\s+(?:and|or|because|since|as)\b"
    r"|\s+is\s+(?:(?:the|my)\s+)?(?:correct|right|best|answer)\b"
)
_NEXT = re.compile(r"\s*[)\]}\"'.]*\s*(?:,\s*(?:or\b|and\b)?|/|&|\bor\b|\band\b)\s*", re.IGNORECASE)
_CLOSERS = " \t)]}\"'.:;,-–—"


def _stated(text: str, options: Sequence[str]) -> set[int]:
    """The options that a text begins with: the text of one, up to the end of line or sentence, or letters."""
    line = _line(text, options)
    sentence = re.split(r"(?<=[.!?])\s", line)[0]
    return _whole(line, options) or _whole(sentence, options) or _letters(text, options)


def _line(text: str, options: Sequence[str]) -> str:
    """The first line, as much of it as could be an option's text: endless answers must not take forever."""
    longest = 4 * max(map(len, options)) + 40
    return (text[:longest].splitlines() or [""])[0]


def _letters(text: str, options: Sequence[str], *, strict: bool = False) -> set[int]:
    """The letters that a text begins with, and what they stand before; empty if it begins with none.

    A letter counts if punctuation, the end, "or", "because" or "is correct" follows it, or its own option's
    text. A capital that is no word of English (not A, not I) also counts before any word, unless `strict`;
    so does a capital after another letter and "and" or the like ("A and B are wrong").
    """
    found: set[int] = set()
    comma = False  # whether a comma alone precedes the letter
    for _ in LETTERS:
        match = _FIRST.match(text)
        if match is None:
            break
        letter, rest = match[1], text[match.end() :]
        index = LETTERS.index(letter.upper())
        texts = _of_text(_line(rest, options).lstrip(_CLOSERS), options)
        loose = letter.isupper() and letter not in "AI" and not strict and not rest[:1].strip()
        listed = bool(found) and letter.isupper() and (letter not in "AI" or not comma)
        if index >= len(options) or not (_CLOSED.match(rest) or index in texts or loose or listed):
            break
        found.add(index)
        if texts and index not in texts:
            return found | texts
        more = _NEXT.match(rest)
        if more is None:
            break
        comma, text = more[0].strip() == ",", rest[more.end() :]
    return found
