"""The table of question types: family, how to draw one, and its paraphrases.

Slots: {x} a shape's name ("circle" or "red circle"), {c} a colour, {w} a word, {s} a sound, {g} a glyph, {m}
how something moves, {e} "first" or "last".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from seats_cli.demo.draws import (
    Draw,
    Facts,
    colour_at_word,
    colour_end,
    colour_of,
    count_glyphs,
    count_shapes,
    count_sounds,
    count_words,
    dense_scenes,
    dense_sounds,
    dense_sync,
    glyph_end,
    glyph_of,
    glyph_only,
    motion_of,
    said,
    shape_after,
    shape_at_sound,
    shape_at_word,
    shape_before,
    shape_end,
    shape_moving,
    shape_of,
    shape_of_glyph,
    sound_at_shape,
    sound_end,
    sound_only,
    word_after,
    word_at_shape,
    word_before,
    word_end,
)


@dataclass(frozen=True, slots=True)
class QuestionType:
    """One row of the table; paraphrases stand without their question mark."""

    family: str
    name: str
    draw: Callable[[Facts, random.Random], Draw | None]
    paraphrases: tuple[str, ...]


def _type(family: str, draw: Callable[[Facts, random.Random], Draw | None], paraphrases: str) -> QuestionType:
    return QuestionType(family, draw.__name__, draw, tuple(text.strip() for text in paraphrases.split("|")))


TYPES = (
    _type(
        "transcription",
        said,
        "what is said | which words are said | what words are spoken | "
        "what do you hear someone say | what does the voice say",
    ),
    _type(
        "attribute",
        colour_of,
        "what colour is the {x} | what color is the {x} | which colour does the {x} have | "
        "the {x} has what colour",
    ),
    _type(
        "attribute",
        shape_of,
        "which shape is {c} | what shape is {c} | what is the {c} shape | which shape has the colour {c}",
    ),
    _type(
        "order",
        shape_end,
        "which shape comes {e} | what shape is shown {e} | what is the {e} shape | "
        "which shape do you see {e}",
    ),
    _type(
        "order",
        colour_end,
        "what colour is the {e} shape | what color is the {e} shape | which colour comes {e}",
    ),
    _type(
        "order",
        shape_after,
        "which shape comes after the {x} | what shape is shown after the {x} | "
        "what comes right after the {x} | which shape follows the {x}",
    ),
    _type(
        "order",
        shape_before,
        "which shape comes before the {x} | what shape is shown before the {x} | "
        "what comes right before the {x}",
    ),
    _type(
        "order",
        word_after,
        "which word is said after {w} | what word comes after {w} | which word follows {w} | "
        "what is said right after {w}",
    ),
    _type(
        "order",
        word_before,
        "which word is said before {w} | what word comes before {w} | what is said right before {w}",
    ),
    _type(
        "order",
        word_end,
        "which word is said {e} | what is the {e} word | what word do you hear {e}",
    ),
    _type(
        "sync",
        shape_at_word,
        "which shape is shown when {w} is said | what shape is on screen when {w} is said | "
        "what shape do you see when you hear {w} | when {w} is said, which shape is shown",
    ),
    _type(
        "sync",
        colour_at_word,
        "what colour is the shape when {w} is said | which colour is shown when {w} is said | "
        "what color is on screen when you hear {w}",
    ),
    _type(
        "sync",
        word_at_shape,
        "which word is said while the {x} is shown | what word do you hear with the {x} | "
        "what is said while the {x} is on screen | which word is spoken when you see the {x}",
    ),
    _type(
        "sync",
        sound_at_shape,
        "which sound plays while the {x} is shown | what sound do you hear with the {x} | "
        "which sound is heard while the {x} is on screen",
    ),
    _type(
        "sync",
        shape_at_sound,
        "which shape is shown when the {s} plays | what shape is on screen when you hear the {s} | "
        "what shape do you see during the {s}",
    ),
    _type(
        "counting",
        count_shapes,
        "how many shapes are shown | how many scenes are there | how many shapes do you see | "
        "count the shapes",
    ),
    _type(
        "counting",
        count_words,
        "how many words are said | how many words do you hear | count the words | how many words are spoken",
    ),
    _type(
        "counting",
        count_sounds,
        "how many sounds are heard | how many sounds do you hear | count the sounds | how many sounds play",
    ),
    _type(
        "counting",
        count_glyphs,
        "how many letters or digits are written | how many scenes have a letter or digit | "
        "count the letters and digits",
    ),
    _type(
        "motion",
        motion_of,
        "how does the {x} move | which way does the {x} move | "
        "in which direction does the {x} move | where does the {x} go",
    ),
    _type(
        "motion",
        shape_moving,
        "which shape {m} | what shape {m} | what is the shape that {m}",
    ),
    _type(
        "sound",
        sound_only,
        "what sound is heard | which sound plays | what sound do you hear | what is the sound",
    ),
    _type(
        "sound",
        sound_end,
        "which sound is heard {e} | what is the {e} sound | which sound plays {e} | "
        "what sound do you hear {e}",
    ),
    _type(
        "text",
        glyph_only,
        "what letter or digit is written | what is written | which letter or digit do you see",
    ),
    _type(
        "text",
        glyph_of,
        "what is written with the {x} | what letter or digit is written in the {x} scene | "
        "which letter or digit is shown with the {x} | what is written next to the {x}",
    ),
    _type(
        "text",
        glyph_end,
        "which letter or digit comes {e} | what is the {e} letter or digit | what is written {e}",
    ),
    _type(
        "text",
        shape_of_glyph,
        "which shape is shown with the letter or digit {g} | which shape is next to {g} | "
        "what shape do you see with {g}",
    ),
)

# Asked in training only: they teach to find every scene, word and sound at once.
DENSE = (
    _type(
        "dense",
        dense_scenes,
        "describe every scene | list colour, shape, motion and text of every scene",
    ),
    _type(
        "dense",
        dense_sync,
        "describe what is shown for every word | list every word with its shape",
    ),
    _type(
        "dense",
        dense_sounds,
        "describe what is shown for every sound | list every sound with its shape",
    ),
)
