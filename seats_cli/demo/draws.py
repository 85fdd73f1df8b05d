"""The question types of the toy world, as functions that find a question's slots, answer and wrong options.

`Facts` reads a spec once; each type is a function of the facts that draws one instance, or gives None where
the clip does not allow it with exactly one right answer.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seats_cli.demo.nouns import COLOURS, GLYPHS, MOTIONS, NUMBERS, SHAPES, SOUNDS, WORDS

if TYPE_CHECKING:
    from seats_cli.demo.world import ClipSpec, Scene


@dataclass(frozen=True, slots=True)
class Draw:
    """One instance of a question type: words for the template, the answer, and (near, any) wrong options."""

    slots: dict[str, str]
    answer: str
    near: Sequence[str] = ()
    kinds: Sequence[str] = ()


class Facts:
    """What a spec shows and says, in the form that questions need."""

    def __init__(self, spec: "ClipSpec") -> None:
        scenes = spec.scenes
        self.scenes = scenes
        self.words = [word.word for word in spec.words]
        self.sounds = [sound.sound for sound in spec.sounds]
        self.shapes = [scene.shape for scene in scenes]
        self.colours = [scene.colour for scene in scenes]
        self.motions = [scene.motion for scene in scenes]
        self.glyphs = [scene.glyph for scene in scenes if scene.glyph]
        self.word_scene = _scene_numbers(scenes, spec.words)
        self.sound_scene = _scene_numbers(scenes, spec.sounds)
        n_shape, n_colour, n_motion = Counter(self.shapes), Counter(self.colours), Counter(self.motions)
        pairs = Counter(zip(self.shapes, self.colours, strict=True))
        numbers = range(len(scenes))
        self.by_shape = [i for i in numbers if n_shape[self.shapes[i]] == 1]
        self.by_colour = [i for i in numbers if n_colour[self.colours[i]] == 1]
        self.by_motion = [i for i in numbers if n_motion[self.motions[i]] == 1]
        self.by_pair = [i for i in numbers if pairs[self.shapes[i], self.colours[i]] == 1]

    def name(self, rng: random.Random, scene: int) -> str:
        """What to call the scene's shape so that no other is meant: "circle", or "red circle"."""
        if scene in self.by_shape and rng.random() < 0.75:
            return self.shapes[scene]
        return f"{self.colours[scene]} {self.shapes[scene]}"


def _scene_numbers(scenes: "tuple[Scene, ...]", events: Iterable[Any]) -> list[int]:
    """The number of the scene in which each event (in time order) begins."""
    found = []
    i = 0
    for event in events:
        while event.start_s >= scenes[i].end_s:
            i += 1
        found.append(i)
    return found


def _pick(rng: random.Random, items: Sequence[int]) -> int | None:
    return items[int(rng.random() * len(items))] if items else None


# -- attribute -------------------------------------------------------------------------------------


def colour_of(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, facts.by_shape)
    return None if i is None else Draw({"x": facts.shapes[i]}, facts.colours[i], facts.colours, COLOURS)


def shape_of(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, facts.by_colour)
    return None if i is None else Draw({"c": facts.colours[i]}, facts.shapes[i], facts.shapes, SHAPES)


# -- order -----------------------------------------------------------------------------------------


def shape_end(facts: Facts, rng: random.Random) -> Draw:
    end, at = (("first", 0), ("last", -1))[rng.random() < 0.5]
    return Draw({"e": end}, facts.shapes[at], facts.shapes, SHAPES)


def colour_end(facts: Facts, rng: random.Random) -> Draw:
    end, at = (("first", 0), ("last", -1))[rng.random() < 0.5]
    return Draw({"e": end}, facts.colours[at], facts.colours, COLOURS)


def shape_after(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, [i for i in facts.by_pair if i + 1 < len(facts.shapes)])
    return None if i is None else Draw({"x": facts.name(rng, i)}, facts.shapes[i + 1], facts.shapes, SHAPES)


def shape_before(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, [i for i in facts.by_pair if i > 0])
    return None if i is None else Draw({"x": facts.name(rng, i)}, facts.shapes[i - 1], facts.shapes, SHAPES)


def word_after(facts: Facts, rng: random.Random) -> Draw:
    i = int(rng.random() * (len(facts.words) - 1))
    return Draw({"w": facts.words[i]}, facts.words[i + 1], facts.words, WORDS)


def word_before(facts: Facts, rng: random.Random) -> Draw:
    i = 1 + int(rng.random() * (len(facts.words) - 1))
    return Draw({"w": facts.words[i]}, facts.words[i - 1], facts.words, WORDS)


def word_end(facts: Facts, rng: random.Random) -> Draw:
    end, at = (("first", 0), ("last", -1))[rng.random() < 0.5]
    return Draw({"e": end}, facts.words[at], facts.words, WORDS)


# -- sync ------------------------------------------------------------------------------------------


def shape_at_word(facts: Facts, rng: random.Random) -> Draw:
    i = int(rng.random() * len(facts.words))
    return Draw({"w": facts.words[i]}, facts.shapes[facts.word_scene[i]], facts.shapes, SHAPES)


def colour_at_word(facts: Facts, rng: random.Random) -> Draw:
    i = int(rng.random() * len(facts.words))
    return Draw({"w": facts.words[i]}, facts.colours[facts.word_scene[i]], facts.colours, COLOURS)


def word_at_shape(facts: Facts, rng: random.Random) -> Draw | None:
    scenes = facts.word_scene
    i = _pick(rng, [i for i, s in enumerate(scenes) if s in facts.by_pair and scenes.count(s) == 1])
    return None if i is None else Draw({"x": facts.name(rng, scenes[i])}, facts.words[i], facts.words, WORDS)


def sound_at_shape(facts: Facts, rng: random.Random) -> Draw | None:
    scenes = facts.sound_scene
    i = _pick(rng, [i for i, s in enumerate(scenes) if s in facts.by_pair and scenes.count(s) == 1])
    return (
        None if i is None else Draw({"x": facts.name(rng, scenes[i])}, facts.sounds[i], facts.sounds, SOUNDS)
    )


def shape_at_sound(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, range(len(facts.sounds)))
    return (
        None
        if i is None
        else Draw({"s": facts.sounds[i]}, facts.shapes[facts.sound_scene[i]], facts.shapes, SHAPES)
    )


# -- counting --------------------------------------------------------------------------------------


def _count(n: int) -> Draw:
    low = max(0, n - 2)
    return Draw({}, NUMBERS[n], NUMBERS[low : n + 3], NUMBERS[:10])


def count_shapes(facts: Facts, rng: random.Random) -> Draw:
    return _count(len(facts.shapes))


def count_words(facts: Facts, rng: random.Random) -> Draw:
    return _count(len(facts.words))


def count_sounds(facts: Facts, rng: random.Random) -> Draw:
    return _count(len(facts.sounds))


def count_glyphs(facts: Facts, rng: random.Random) -> Draw:
    return _count(len(facts.glyphs))


# -- motion ----------------------------------------------------------------------------------------


def motion_of(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, facts.by_pair)
    return None if i is None else Draw({"x": facts.name(rng, i)}, facts.motions[i], facts.motions, MOTIONS)


def shape_moving(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, facts.by_motion)
    if i is None:
        return None
    motion = facts.motions[i]
    how = {"up": "moves up", "down": "moves down", "still": "stays still"}.get(motion, f"moves {motion}")
    return Draw({"m": how}, facts.shapes[i], facts.shapes, SHAPES)


# -- sound -----------------------------------------------------------------------------------------


def sound_only(facts: Facts, rng: random.Random) -> Draw | None:
    return Draw({}, facts.sounds[0], (), SOUNDS) if len(facts.sounds) == 1 else None


def sound_end(facts: Facts, rng: random.Random) -> Draw | None:
    if len(facts.sounds) < 2:
        return None
    end, at = (("first", 0), ("last", -1))[rng.random() < 0.5]
    return Draw({"e": end}, facts.sounds[at], facts.sounds, SOUNDS)


# -- text ------------------------------------------------------------------------------------------


def glyph_only(facts: Facts, rng: random.Random) -> Draw | None:
    return Draw({}, facts.glyphs[0], (), GLYPHS) if len(facts.glyphs) == 1 else None


def glyph_of(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(rng, [i for i in facts.by_pair if facts.scenes[i].glyph])
    if i is None:
        return None
    glyph = facts.scenes[i].glyph
    return Draw({"x": facts.name(rng, i)}, str(glyph), facts.glyphs, GLYPHS)


def glyph_end(facts: Facts, rng: random.Random) -> Draw | None:
    if len(facts.glyphs) < 2:
        return None
    end, at = (("first", 0), ("last", -1))[rng.random() < 0.5]
    return Draw({"e": end}, facts.glyphs[at], facts.glyphs, GLYPHS)


def shape_of_glyph(facts: Facts, rng: random.Random) -> Draw | None:
    i = _pick(
        rng,
        [i for i, scene in enumerate(facts.scenes) if scene.glyph and facts.glyphs.count(scene.glyph) == 1],
    )
    return (
        None if i is None else Draw({"g": str(facts.scenes[i].glyph)}, facts.shapes[i], facts.shapes, SHAPES)
    )


# -- transcription, and the training-only dense types ----------------------------------------------


def said(facts: Facts, rng: random.Random) -> Draw:
    return Draw({}, " ".join(facts.words))


def dense_scenes(facts: Facts, rng: random.Random) -> Draw:
    rows = [f"{s.colour} {s.shape} {s.motion} {s.glyph or 'nothing'}" for s in facts.scenes]
    return Draw({}, " , ".join(rows))


def dense_sync(facts: Facts, rng: random.Random) -> Draw:
    rows = [
        f"{word} {facts.colours[i]} {facts.shapes[i]}"
        for word, i in zip(facts.words, facts.word_scene, strict=True)
    ]
    return Draw({}, " , ".join(rows))


def dense_sounds(facts: Facts, rng: random.Random) -> Draw:
    rows = [f"{sound} {facts.shapes[i]}" for sound, i in zip(facts.sounds, facts.sound_scene, strict=True)]
    return Draw({}, " , ".join(rows))
