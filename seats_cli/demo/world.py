"""The toy world: which clips can exist, drawn from a seed.

A clip is a row of scenes, cut on a 0.5 s grid. Each shows one coloured shape that moves one way, and in about
60% of scenes a drawn glyph; words are spoken and sounds play, never two at once and never near a cut, so that
every question has one answer. `sample_clip` depends on nothing but its arguments; the seeds of different
splits never meet, and dev, test and ood use voices and parameters of sounds that training never hears.
"""

import colorsys
import itertools
import math
import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from seats_cli.demo.nouns import (
    COLOUR_RGB,
    COLOURS,
    GLYPHS,
    MOTIONS,
    NUMBERS,
    SAMPLE_RATE,
    SHAPES,
    SOUNDS,
    SPLITS,
    WORDS,
)
from seats_cli.demo.questions import FAMILIES, Question, sample_questions, suite_questions
from seats_cli.demo.voices import voice_numbers, voices
from seats_cli.errors import UsageError

__all__ = [
    "COLOURS",
    "COLOUR_RGB",
    "FAMILIES",
    "GLYPHS",
    "MOTIONS",
    "NUMBERS",
    "SHAPES",
    "SOUNDS",
    "SPLITS",
    "WORDS",
    "ClipSpec",
    "Maxima",
    "Question",
    "Scene",
    "Sound",
    "Word",
    "maxima",
    "sample_clip",
    "sample_questions",
    "suite_questions",
]

GRID_S = 0.5
MIN_SCENE_S = 2.0
MAX_SCENE_S = 8.0
CUT_MARGIN_S = 0.3  # between a cut and anything heard
EVENT_GAP_S = 0.12  # between two things heard
MIN_SPEED = 0.125  # of the frame's side a second: a quarter of the frame in two seconds
MAX_SPEED = 0.24
MAX_SOUND_S = 1.2
MIN_RATE, MAX_RATE = 0.84, 1.2  # of a word's playback

Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Backdrop:
    """What is behind a scene. Lengths in sides of the frame, colours in [0, 1]."""

    rgb: Colour
    gradient: tuple[float, float]  # change of brightness across the frame, along x and y
    stripe: tuple[float, float, float]  # waves per frame along x and y, phase in radians
    stripe_depth: float
    blob: tuple[float, float, float]  # the same for a product of two waves
    blob_depth: float
    grain: float  # standard deviation of its noise


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene: its shape stands at (x, y) at start_s and moves by (vx, vy) a second, y down, the frame
    being 1 x 1.

    A shape that would leave the frame comes in again on the other side.
    """

    start_s: float
    end_s: float
    shape: str
    colour: str
    motion: str
    glyph: str | None
    x: float
    y: float
    vx: float
    vy: float
    radius: float
    angle: float
    rgb: Colour
    glyph_x: float
    glyph_y: float
    glyph_size: float  # half the glyph's height
    glyph_tone: float  # grey in [0, 1]
    backdrop: Backdrop


@dataclass(frozen=True, slots=True)
class Word:
    """A spoken word; `voice` is a number in the word bank, gain in dB."""

    start_s: float
    end_s: float
    word: str
    voice: int
    rate: float
    gain: float
    tilt: float  # first-order filter: y[n] = x[n] - tilt * x[n - 1]


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound without speech; pitch and wobble in [0, 1] place it in the range of its kind, gain in dB."""

    start_s: float
    end_s: float
    sound: str
    pitch: float
    wobble: float
    gain: float


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """All of one clip; rendering it needs nothing else but the word bank."""

    seed: int
    split: str
    duration_s: float
    scenes: tuple[Scene, ...]
    words: tuple[Word, ...]
    sounds: tuple[Sound, ...]
    noise_gain: float  # dB of full scale
    hum_gain: float
    hum_hz: float
    echo: tuple[float, float]  # delay in s, strength
    noise_seed: int

    def to_json(self) -> dict[str, Any]:
        """The spec as plain dicts, lists, numbers and strings."""
        return asdict(self)

    def scene_at(self, time_s: float) -> Scene:
        """The scene on screen at `time_s`; the last one beyond the end."""
        return next((scene for scene in self.scenes if time_s < scene.end_s), self.scenes[-1])


@dataclass(frozen=True)
class Maxima:
    """The most scenes, words and sounds that a clip of one duration can have: sizes of packed tensors."""

    scenes: int
    words: int
    sounds: int


@lru_cache
def _counts(duration_s: float) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(fewest, most) scenes, words and sounds. Longer clips have more, but slower: redundancy grows."""
    if duration_s < 8 or duration_s > 64 or duration_s % GRID_S:
        raise UsageError(
            f"a clip of {duration_s:g} s cannot be drawn",
            hint="choose 8 to 64 s in steps of 0.5, such as 16 or 64",
        )
    stretch = duration_s / 16
    scenes = (max(2, math.ceil(duration_s / 6)), math.ceil(6 * stretch**0.62))
    return scenes, (2, round(6 * stretch**0.4)), (1, 2 if stretch < 2 else 3)


def maxima(duration_s: float) -> Maxima:
    """The fixed sizes for clips of `duration_s`; UsageError for a duration that no clip can have."""
    scenes, words, sounds = _counts(duration_s)
    return Maxima(max(scenes), words[1], sounds[1])


def sample_clip(
    seed: int, duration_s: float = 16.0, split: str = "train", n_voices: int | None = None
) -> ClipSpec:
    """The clip of this seed, duration and split. n_voices: only the split's first so many voices speak."""
    numbers = voice_numbers(split)[:n_voices]
    scene_range, word_range, sound_range = _counts(duration_s)
    rng = random.Random(f"seats:{split}:{seed}:{duration_s:g}")
    scenes = _scenes(rng, duration_s, max(rng.randint(*scene_range), scene_range[0]))
    n_words = _middling(rng, *word_range)
    words, sounds = _events(rng, scenes, split, numbers, n_words, rng.randint(*sound_range))
    return ClipSpec(
        seed=seed,
        split=split,
        duration_s=float(duration_s),
        scenes=scenes,
        words=words,
        sounds=sounds,
        noise_gain=rng.uniform(-58, -34),
        hum_gain=rng.uniform(-60, -36),
        hum_hz=rng.choice((50.0, 60.0)),
        echo=(rng.uniform(0.004, 0.045), rng.choice((0.0, rng.uniform(0.0, 0.35)))),
        noise_seed=rng.getrandbits(30),
    )


def _middling(rng: random.Random, low: int, high: int) -> int:
    """Mostly the middle of the range, sometimes its ends."""
    return round((rng.randint(low, high) + rng.uniform(low, high)) / 2)


def _scenes(rng: random.Random, duration_s: float, n: int) -> tuple[Scene, ...]:
    lengths = _cut(rng, round(duration_s / GRID_S), n)
    shapes = _shapes(rng, n)
    glyphs = rng.sample(GLYPHS, n) if n <= len(GLYPHS) else rng.choices(GLYPHS, k=n)
    share = 0.65 if rng.random() < 0.85 else 0.0  # sometimes a single glyph
    written = [rng.random() < share for _ in range(n)]
    written[rng.randrange(n)] = True
    scenes = []
    start = 0
    for i, length in enumerate(lengths):
        glyph = glyphs[i] if written[i] else None
        scenes.append(_scene(rng, start * GRID_S, (start + length) * GRID_S, shapes[i], glyph))
        start += length
    return tuple(scenes)


def _cut(rng: random.Random, steps: int, n: int) -> list[int]:
    """`n` lengths in grid steps with sum `steps`, each within the limits of a scene, all such cuts likely."""
    low, high = round(MIN_SCENE_S / GRID_S), round(MAX_SCENE_S / GRID_S)
    lengths = [low] * n
    weights = [rng.random() ** 2 + 0.05 for _ in range(n)]
    for _ in range(steps - low * n):
        i = rng.choices(range(n), weights)[0]
        if lengths[i] >= high:
            i = min(range(n), key=lengths.__getitem__)
        lengths[i] += 1
    return lengths


def _shapes(rng: random.Random, n: int) -> list[str]:
    """Mostly different shapes, never the same twice in a row, at least two that come only once."""
    single = rng.sample(SHAPES, rng.randint(2, min(n, len(SHAPES) - 2)))
    rest = [shape for shape in SHAPES if shape not in single]
    while True:
        chosen = single + rng.choices(rest, k=n - len(single))
        rng.shuffle(chosen)
        if all(a != b for a, b in itertools.pairwise(chosen)):
            return chosen


def _scene(rng: random.Random, start_s: float, end_s: float, shape: str, glyph: str | None) -> Scene:
    uniform = rng.uniform
    colour = rng.randrange(len(COLOURS))
    motion = MOTIONS[rng.randrange(5)]
    radius = uniform(0.125, 0.185)
    size = uniform(0.115, 0.15)
    # The path of the shape and the glyph share the frame: each gets a band along the motion.
    reach = 1.2 * radius  # of a shape's corners
    near = uniform(reach, max(reach, 0.95 - 2 * size - reach)) if glyph else uniform(0.2, 0.8)
    far = uniform(near + reach + size + 0.02, 0.97 - size) if glyph else 0.5
    if rng.random() < 0.5:
        near, far = 1 - near, 1 - far
    along = uniform(size + 0.03, 0.97 - size)
    place, speed = _path(rng, end_s - start_s, radius, still=motion == "still")
    if motion in ("left", "up"):
        place, speed = 1 - place, -speed
    level = motion in ("left", "right") or (motion == "still" and rng.random() < 0.5)
    x, y = (place, near) if level else (near, place)
    glyph_x, glyph_y = (along, far) if level else (far, along)
    backdrop = _backdrop(rng)
    bright = sum(backdrop.rgb) / 3 > 0.36
    red, green, blue = COLOUR_RGB[colour]
    light = uniform(0.9, 1.0)
    return Scene(
        start_s=start_s,
        end_s=end_s,
        shape=shape,
        colour=COLOURS[colour],
        motion=motion,
        glyph=glyph,
        x=x,
        y=y,
        vx=speed if level else 0.0,
        vy=0.0 if level else speed,
        radius=radius,
        angle=uniform(-0.2, 0.2),
        rgb=(red * light, green * light, blue * light),
        glyph_x=glyph_x,
        glyph_y=glyph_y,
        glyph_size=size,
        glyph_tone=uniform(0.0, 0.06) if bright else uniform(0.88, 1.0),
        backdrop=backdrop,
    )


def _path(rng: random.Random, length_s: float, radius: float, *, still: bool) -> tuple[float, float]:
    """Where the shape starts on its axis, and its speed; it stays in the frame if the scene is short."""
    room = 1 - 2 * radius - 0.04
    if still:
        return rng.uniform(radius + 0.02, radius + 0.02 + room), 0.0
    speed = rng.uniform(MIN_SPEED, MAX_SPEED)
    speed = max(MIN_SPEED, min(speed, room / length_s))
    return radius + 0.02 + rng.random() * max(0.0, room - speed * length_s), speed


def _backdrop(rng: random.Random) -> Backdrop:
    uniform = rng.uniform
    dark = rng.random() < 0.55
    value = uniform(0.06, 0.26) if dark else uniform(0.44, 0.60)
    tau = 2 * math.pi
    kind = rng.random()
    return Backdrop(
        rgb=colorsys.hsv_to_rgb(rng.random(), uniform(0.0, 0.35), value),
        gradient=(uniform(-0.14, 0.14), uniform(-0.14, 0.14)),
        stripe=(uniform(-7, 7), uniform(-7, 7), uniform(0, tau)),
        stripe_depth=uniform(0.02, 0.07) if kind < 0.5 else 0.0,
        blob=(uniform(1, 5), uniform(1, 5), uniform(0, tau)),
        blob_depth=uniform(0.02, 0.08) if 0.35 < kind < 0.85 else 0.0,
        grain=uniform(0.0, 0.03),
    )


def _events(
    rng: random.Random,
    scenes: tuple[Scene, ...],
    split: str,
    numbers: tuple[int, ...],
    n_words: int,
    n_sounds: int,
) -> tuple[tuple[Word, ...], tuple[Sound, ...]]:
    """Words and sounds in free places. What finds none is left out, but never the first two words."""
    bank = voices()
    speaker = rng.choice(numbers)
    second = rng.choice(numbers) if rng.random() < 0.3 else speaker
    base_gain, rate = rng.uniform(-10, 4), rng.uniform(MIN_RATE, MAX_RATE)
    tilt = rng.choice((0.0, rng.uniform(-0.5, 0.6)))
    busy: list[tuple[float, float]] = []
    words: list[Word] = []
    sounds: list[Sound] = []
    chosen = rng.sample(range(len(WORDS)), n_words)
    for word in chosen[:2]:
        _say(rng, scenes, busy, words, word, rng.choice((speaker, second)), bank, (base_gain, rate, tilt))
    for kind in rng.sample(SOUNDS, n_sounds):
        length = rng.uniform(0.5, MAX_SOUND_S)
        start = _place(rng, scenes, busy, length, 30 if sounds else 1000)
        if start is not None:
            pitch, wobble = _parameter(rng, split), _parameter(rng, split)
            sounds.append(Sound(start, start + length, kind, pitch, wobble, rng.uniform(-10, 4)))
    for word in chosen[2:]:
        _say(rng, scenes, busy, words, word, rng.choice((speaker, second)), bank, (base_gain, rate, tilt))
    words.sort(key=lambda event: event.start_s)
    sounds.sort(key=lambda event: event.start_s)
    return tuple(words), tuple(sounds)


def _say(
    rng: random.Random,
    scenes: tuple[Scene, ...],
    busy: list[tuple[float, float]],
    words: list[Word],
    word: int,
    voice: int,
    bank: tuple[Any, ...],
    manner: tuple[float, float, float],
) -> None:
    gain, rate, tilt = manner
    rate *= rng.uniform(0.97, 1.03)
    length = bank[voice].lengths[word] / SAMPLE_RATE / rate
    start = _place(rng, scenes, busy, length, 30 if len(words) > 1 else 1000)
    if start is not None:
        gain = min(4.0, max(-10.0, gain + rng.uniform(-2, 2)))
        words.append(Word(start, start + length, WORDS[word], voice, rate, gain, tilt))


def _place(
    rng: random.Random, scenes: tuple[Scene, ...], busy: list[tuple[float, float]], length: float, tries: int
) -> float | None:
    """A start at which `length` seconds are free and away from cuts, marked busy; None after `tries`."""
    last = scenes[-1].end_s
    for _ in range(tries):
        start = rng.random() * last
        end = start + length
        scene = next(scene for scene in scenes if start < scene.end_s)
        if start < scene.start_s + CUT_MARGIN_S or end > scene.end_s - CUT_MARGIN_S:
            continue
        if all(end + EVENT_GAP_S < low or start - EVENT_GAP_S > high for low, high in busy):
            busy.append((start, end))
            return start
    return None


def _parameter(rng: random.Random, split: str) -> float:
    """A number in [0, 1]: training never draws from the two bands that the other splits draw from."""
    if split == "train":
        u = rng.random() * 0.8
        return u if u < 0.4 else u + 0.1 if u < 0.65 else u + 0.2
    return rng.uniform(0.4, 0.5) if rng.random() < 0.5 else rng.uniform(0.75, 0.85)
