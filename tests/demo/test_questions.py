"""Questions have one right answer, found here a second time by reading the spec naively."""

import random
import re
from collections import Counter
from collections.abc import Callable

from seats_cli.demo.nouns import COLOURS, GLYPHS, MOTIONS, NUMBERS, SHAPES, SOUNDS, WORDS
from seats_cli.demo.question_types import TYPES
from seats_cli.demo.questions import FAMILIES, LETTERS, Question, sample_questions, suite_questions
from seats_cli.demo.world import ClipSpec, Scene, sample_clip

TEMPLATES = {row.name: row.paraphrases for row in TYPES}
END = {"first": 0, "last": -1}


def slots(question: Question) -> dict[str, str]:
    """The words that fill the question's template."""
    text = re.split(r" a[.)] |\na[.)] ", question.question)[0].rstrip("?")
    for template in TEMPLATES[question.type]:
        found = re.fullmatch(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>.+)", re.escape(template)), text)
        if found:
            return found.groupdict()
    raise AssertionError(f"no template of {question.type} makes {question.question!r}")


def named(spec: ClipSpec, name: str) -> int:
    """The only scene that "circle" or "red circle" can mean."""
    *colour, shape = name.split()
    found = [i for i, s in enumerate(spec.scenes) if s.shape == shape and colour in ([], [s.colour])]
    assert len(found) == 1, f"{name!r} means {len(found)} scenes"
    return found[0]


def only(spec: ClipSpec, fits: Callable[[Scene], bool]) -> Scene:
    found = [scene for scene in spec.scenes if fits(scene)]
    assert len(found) == 1
    return found[0]


def during(spec: ClipSpec, name: str, events: str) -> str:
    scene = spec.scenes[named(spec, name)]
    inside = [e for e in getattr(spec, events) if scene.start_s <= e.start_s and e.end_s <= scene.end_s]
    assert len(inside) == 1
    return str(inside[0].word if events == "words" else inside[0].sound)


def at(spec: ClipSpec, word: str) -> Scene:
    return spec.scene_at(next(event.start_s for event in spec.words if event.word == word))


def expected(spec: ClipSpec, question: Question) -> str:
    scenes, words = spec.scenes, [word.word for word in spec.words]
    sounds = [sound.sound for sound in spec.sounds]
    glyphs = [scene.glyph for scene in scenes if scene.glyph]
    slot = slots(question)
    x = named(spec, slot["x"]) if "x" in slot else -1
    moving = slot.get("m", "").replace("moves ", "").replace("stays ", "")
    answers: dict[str, Callable[[], str | None]] = {
        "said": lambda: " ".join(words),
        "colour_of": lambda: scenes[x].colour,
        "shape_of": lambda: only(spec, lambda s: s.colour == slot["c"]).shape,
        "shape_end": lambda: scenes[END[slot["e"]]].shape,
        "colour_end": lambda: scenes[END[slot["e"]]].colour,
        "shape_after": lambda: scenes[x + 1].shape,
        "shape_before": lambda: scenes[x - 1].shape if x else None,
        "word_after": lambda: words[words.index(slot["w"]) + 1],
        "word_before": lambda: words[words.index(slot["w"]) - 1] if words[0] != slot["w"] else None,
        "word_end": lambda: words[END[slot["e"]]],
        "shape_at_word": lambda: at(spec, slot["w"]).shape,
        "colour_at_word": lambda: at(spec, slot["w"]).colour,
        "word_at_shape": lambda: during(spec, slot["x"], "words"),
        "sound_at_shape": lambda: during(spec, slot["x"], "sounds"),
        "shape_at_sound": lambda: spec.scene_at(spec.sounds[sounds.index(slot["s"])].start_s).shape,
        "count_shapes": lambda: NUMBERS[len(scenes)],
        "count_words": lambda: NUMBERS[len(words)],
        "count_sounds": lambda: NUMBERS[len(sounds)],
        "count_glyphs": lambda: NUMBERS[len(glyphs)],
        "motion_of": lambda: scenes[x].motion,
        "shape_moving": lambda: only(spec, lambda s: s.motion == moving).shape,
        "sound_only": lambda: sounds[0] if len(sounds) == 1 else None,
        "sound_end": lambda: sounds[END[slot["e"]]],
        "glyph_only": lambda: glyphs[0] if len(glyphs) == 1 else None,
        "glyph_of": lambda: scenes[x].glyph,
        "glyph_end": lambda: glyphs[END[slot["e"]]],
        "shape_of_glyph": lambda: only(spec, lambda s: s.glyph == slot["g"]).shape,
    }
    assert answers.keys() == TEMPLATES.keys()
    return str(answers[question.type]())


def test_every_answer_is_right_and_every_type_is_asked() -> None:
    types: Counter[str] = Counter()
    for seed in range(400):
        spec = sample_clip(seed, (16.0, 64.0)[seed % 2], "train")
        for question in sample_questions(spec, random.Random(seed), 18, dense=0):
            types[question.type] += 1
            right = expected(spec, question)
            answer = question.answer
            if question.options is not None:
                assert len(set(question.options)) == 4
                assert all(option in question.question for option in question.options)
                answer = question.options[LETTERS.index(answer)]
            assert answer == right, (question, right)
    assert types.keys() == TEMPLATES.keys()
    assert min(types.values()) > 20


def test_the_suite_asks_every_family_of_every_clip_and_is_fixed() -> None:
    for seed in range(100):
        spec = sample_clip(seed, (16.0, 24.0, 32.0, 64.0)[seed % 4], "test")
        questions = suite_questions(spec)
        assert {question.family for question in questions} == set(FAMILIES)
        assert questions == suite_questions(spec)
        first = {question.family: question for question in reversed(questions)}
        assert all(question.options is None for question in first.values())
        for question in questions:
            right = expected(spec, question)
            answer = question.answer
            assert right == (answer if question.options is None else question.options[LETTERS.index(answer)])


def test_training_mix() -> None:
    asked = [q for seed in range(300) for q in sample_questions(sample_clip(seed), random.Random(seed), 20)]
    assert len(asked) == 6000
    families = Counter(question.family for question in asked)
    assert 0.09 < families["dense"] / 6000 < 0.15
    assert all(0.08 < families[family] / 6000 < 0.14 for family in FAMILIES)
    assert 0.08 < sum(question.options is not None for question in asked) / 6000 < 0.16
    assert 0.4 < sum("?" in question.question for question in asked) / 6000 < 0.65
    letters = Counter(question.answer for question in asked if question.options)
    assert all(0.2 < letters[letter] / letters.total() < 0.3 for letter in LETTERS)


def test_answers_are_words_of_the_world() -> None:
    known = {*SHAPES, *COLOURS, *MOTIONS, *GLYPHS, *WORDS, *SOUNDS, *NUMBERS, *LETTERS, "nothing", ","}
    for seed in range(50):
        for question in sample_questions(sample_clip(seed), random.Random(seed), 20):
            assert set(question.answer.split()) <= known
            assert question.question == question.question.lower()


def test_a_dense_answer_tells_every_scene() -> None:
    spec = sample_clip(3)
    asked = sample_questions(spec, random.Random(0), 60, dense=1.0)
    told = {question.answer for question in asked if question.type == "dense_scenes"}
    assert told == {
        " , ".join(f"{s.colour} {s.shape} {s.motion} {s.glyph or 'nothing'}" for s in spec.scenes)
    }
