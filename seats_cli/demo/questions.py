"""What can be asked about a clip of the toy world: eight families, and only where there is one answer.

draws.py finds what a clip allows to be asked, question_types.py has the wordings; here questions are drawn
for training and for the demo. All text is lower case.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from seats_cli.demo.draws import Draw, Facts
from seats_cli.demo.question_types import DENSE, TYPES, QuestionType

if TYPE_CHECKING:
    from seats_cli.demo.world import ClipSpec

FAMILIES = ("transcription", "attribute", "order", "sync", "counting", "motion", "sound", "text")
LETTERS = "abcd"
CHOICE_SHARE = 0.15  # of training questions are asked with options
DENSE_SHARE = 0.12  # of training questions ask for everything


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its one right answer. With `options`, the text lists them and the answer is a letter a
    to d.

    family: one of FAMILIES, or "dense" (training only). type: the question type's name.
    """

    family: str
    type: str
    question: str
    answer: str
    options: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """{family, type, question, answer, options?}."""
        row: dict[str, Any] = {
            "family": self.family,
            "type": self.type,
            "question": self.question,
            "answer": self.answer,
        }
        if self.options is not None:
            row["options"] = list(self.options)
        return row


# Four ways to list options; each ends a question.
STYLES = (
    "{q} a) {0} b) {1} c) {2} d) {3}",
    "{q} a. {0} b. {1} c. {2} d. {3}",
    "{q}\na. {0}\nb. {1}\nc. {2}\nd. {3}",
    "{q}\na) {0}\nb) {1}\nc) {2}\nd) {3}\nanswer with the letter",
)


@lru_cache(maxsize=1)
def _by_family() -> dict[str, tuple[QuestionType, ...]]:
    return {family: tuple(row for row in TYPES if row.family == family) for family in FAMILIES}


def sample_questions(
    spec: "ClipSpec",
    rng: random.Random,
    n: int = 18,
    *,
    choice: float = CHOICE_SHARE,
    dense: float = DENSE_SHARE,
) -> list[Question]:
    """`n` questions for training: families alike often, then a type, then a paraphrase, with and without "?".

    choice, dense: shares of questions with options, and of training-only questions that ask for everything.
    The same question may come twice, rarely.
    """
    facts = Facts(spec)
    families = _by_family()
    found: list[Question] = []
    random_ = rng.random
    while len(found) < n:
        rows = DENSE if random_() < dense else families[FAMILIES[int(random_() * 8)]]
        for _ in range(4):  # most clips allow most types of every family
            row = rows[int(random_() * len(rows))]
            draw = row.draw(facts, rng)
            if draw is not None:
                found.append(_ask(row, draw, rng, choice))
                break
    return found


def suite_questions(spec: "ClipSpec") -> list[Question]:
    """The questions that the demo writes and the evaluation asks: every family, at most two types of each.

    The first of each family is open; of those that follow, about a third list options. Depends on the spec
    alone.
    """
    rng = random.Random(f"suite:{spec.split}:{spec.seed}:{spec.duration_s:g}")
    facts = Facts(spec)
    found: list[Question] = []
    for rows in _by_family().values():
        drawn = [(row, row.draw(facts, rng)) for row in rng.sample(rows, len(rows))]
        possible = [(row, draw) for row, draw in drawn if draw is not None]
        for k, (row, draw) in enumerate(possible[:2]):
            found.append(_ask(row, draw, rng, 0.35 if k else 0.0))
    return found


def _ask(row: QuestionType, draw: Draw, rng: random.Random, choice: float) -> Question:
    random_ = rng.random
    template = row.paraphrases[int(random_() * len(row.paraphrases))]
    text = template.format(**draw.slots) if draw.slots else template
    asked = row.family != "dense" and not text.startswith("count")
    text += "?" if asked and random_() < 0.6 else ""
    if not draw.kinds or random_() >= choice:
        return Question(row.family, row.name, text, draw.answer)
    options = _options(draw, rng)
    style = STYLES[int(random_() * len(STYLES))]
    listed = style.format(*options, q=text)
    return Question(row.family, row.name, listed, LETTERS[options.index(draw.answer)], tuple(options))


def _options(draw: Draw, rng: random.Random) -> list[str]:
    """The answer and three wrong options in random order, those of the same clip first."""
    near = list({item: None for item in draw.near if item != draw.answer})
    rng.shuffle(near)
    wrong = near[:3]
    while len(wrong) < 3:
        item = draw.kinds[int(rng.random() * len(draw.kinds))]
        if item != draw.answer and item not in wrong:
            wrong.append(item)
    options = [draw.answer, *wrong]
    rng.shuffle(options)
    return options
