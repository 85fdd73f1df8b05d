"""What a benchmark runs on: a made-up clip of any length and size, or a file.

A synthetic clip is seeded noise in the host's memory, so that no decoder is timed and no two patches are
alike; a file is opened, decoded and timed anew by every run. Both are an `engine.encode.MediaSource`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seats_cli.answering import media_shape
from seats_cli.engine.encode import MediaSource
from seats_cli.errors import MediaRange, UsageError
from seats_cli.media import Sampling, VideoDecoding, open_clip
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.preprocess import PixelCaps
from seats_cli.presets import Preset

SAMPLE_RATE = 16000
POOL_BYTES = 1 << 26  # noise that is drawn; longer clips use it again, each time with other bits turned over
POOL_SAMPLES = 600 * SAMPLE_RATE  # likewise of sound, which repeats as it is
QUESTION = "What happens in this clip?"
FILLERS = (" the", " a", "?")  # a text of n tokens is made of these, whatever the tokenizer
NATIVE = (1280, 720)  # width and height of the frames that a preset's caps then resize


@dataclass(frozen=True)
class ClipSpec:
    """A synthetic clip.

    seconds:     of sound; the frames are spread over the same time
    frames:      sampled frames, made even; 0 for sound alone
    size:        (width, height) of the frames in pixels, which the tokens follow from exactly; None: 1280x720
                 frames, resized as the preset's caps say
    text_tokens: of the prompt in all, the chat's own among them; None: a short question
    """

    seconds: float
    frames: int
    size: tuple[int, int] | None
    text_tokens: int | None = None
    seed: int = 0

    @property
    def n_frames(self) -> int:
        """`frames`, made even: a grid is two frames."""
        return self.frames + self.frames % 2

    @property
    def name(self) -> str:
        """In a few words."""
        if not self.frames:
            return f"synthetic sound, {self.seconds:g} s"
        width, height = self.size or NATIVE
        resized = "" if self.size else ", resized by the preset's caps"
        return f"synthetic clip, {self.seconds:g} s, {self.n_frames} frames of {width}x{height}{resized}"


def usual_spec(device_type: str) -> ClipSpec:
    """The clip of the published timings on CUDA (24x24 patches of 14 pixels); elsewhere one that the embedded
    model reads in a second or two on two cores."""
    if device_type == "cuda":
        return ClipSpec(seconds=64.0, frames=128, size=(336, 336))
    return ClipSpec(seconds=32.0, frames=64, size=(224, 224))


@dataclass(frozen=True)
class NoiseWindow:
    """Consecutive frames (T, H, W, 3) uint8."""

    frames: np.ndarray


class NoiseClip:
    """The `MediaSource` of a `ClipSpec`: the same spec gives the same noise, read as often as one likes."""

    def __init__(self, spec: ClipSpec) -> None:
        self._spec = spec
        generator = np.random.default_rng(spec.seed)
        width, height = spec.size or NATIVE
        self.frame_bytes = one = height * width * 3
        self._pool = generator.integers(
            0, 256, (min(spec.n_frames, max(1, POOL_BYTES // one)), height, width, 3), dtype=np.uint8
        )
        self.n_samples = round(spec.seconds * SAMPLE_RATE)
        n_drawn = min(self.n_samples, POOL_SAMPLES)
        self._sound = 0.1 * generator.standard_normal(n_drawn, dtype=np.float32)

    def video_windows(self, frames_per_window: int) -> Iterator[NoiseWindow]:
        """The frames, `frames_per_window` at a time; the last may be fewer."""
        n, pool = self._spec.n_frames, len(self._pool)
        for start in range(0, n, frames_per_window):
            places = np.arange(start, min(start + frames_per_window, n))
            if places[-1] < pool:
                yield NoiseWindow(self._pool[start : places[-1] + 1])
                continue
            turned = (places // pool % 256).astype(np.uint8)[:, None, None, None]
            yield NoiseWindow(self._pool[places % pool] ^ turned)

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]:
        """The samples, `samples_per_block` at a time."""
        for start in range(0, self.n_samples, samples_per_block):
            places = np.arange(start, min(start + samples_per_block, self.n_samples))
            yield self._sound[places % len(self._sound)]

    def image(self) -> np.ndarray:
        """Never asked for: the clip has frames or sound."""
        raise NotImplementedError("a synthetic clip is no picture")


class Item:
    """One input of a benchmark, opened anew by each run; the noise is drawn once."""

    def __init__(self, source: ClipSpec | Path, sampling: Sampling | None = None, warn: Any = None) -> None:
        """`sampling` and `warn` (a callable) are for files, as in `media.open_clip`."""
        self.source, self._sampling, self._warn = source, sampling, warn
        self._noise: NoiseClip | None = None
        self._question: str | None = None
        self.seen: tuple[MediaShape, Prompt] | None = None  # of the last run that got so far
        self.video_decoder: str | None = None  # of a file, `Clip.video_decoder` of the last run

    @property
    def name(self) -> str:
        """In a few words."""
        return self.source.name if isinstance(self.source, ClipSpec) else str(self.source)

    def prepare(self, adapter: Adapter, preset: Preset) -> None:
        """Draw the noise and find the text, so that no run pays for it. Raises UsageError where the text or
        the clip cannot be."""
        if isinstance(self.source, ClipSpec):
            with self.opened(adapter, preset) as (_, shape):
                self.prompt(adapter, shape)

    def release(self) -> None:
        """Give the noise's memory back; the next run draws it again."""
        self._noise = None

    @contextmanager
    def opened(
        self, adapter: Adapter, preset: Preset, decoding: VideoDecoding | None = None
    ) -> Iterator[tuple[MediaSource, MediaShape]]:
        """The source, and what it becomes under the preset's caps; `decoding` says where a file's frames are
        decoded. Raises MediaError or UsageError."""
        if isinstance(self.source, ClipSpec):
            shape = spec_shape(adapter, self.source, preset)
            if self._noise is None:
                self._noise = NoiseClip(self.source)
            yield self._noise, shape
            return
        where = decoding or VideoDecoding()
        with open_clip(self.source, self._sampling, warn=self._warn, decoding=where) as clip:
            shape = media_shape(adapter, clip, preset)
            if not (shape.n_video or shape.n_audio or shape.n_image):
                raise MediaRange(f"{self.source}: nothing to see or hear", hint="time a longer range")
            yield clip, shape
            self.video_decoder = clip.video_decoder or None

    def prompt(self, adapter: Adapter, shape: MediaShape) -> Prompt:
        """The prompt about it: a short question, or as much text as the spec says."""
        wanted = self.source.text_tokens if isinstance(self.source, ClipSpec) else None
        if self._question is None:
            self._question = QUESTION if wanted is None else filler(adapter, shape, wanted)
        prompt = adapter.prompt(self._question, shape)
        self.seen = shape, prompt
        return prompt


def spec_shape(adapter: Adapter, spec: ClipSpec, preset: Preset) -> MediaShape:
    """The tokens of a synthetic clip. Raises UsageError for one that is no clip at all."""
    width, height = spec.size or NATIVE
    caps = PixelCaps(preset.caps.min_per_grid, preset.caps.max_per_grid, preset.caps.total)
    if spec.size is not None:
        factor = adapter.geometry.pixel_factor
        wanted = max(1, round(width / factor)) * max(1, round(height / factor))
        caps = PixelCaps(1, wanted, wanted * spec.n_frames)
    shape = adapter.media_shape(
        n_frames=spec.n_frames,
        height=height if spec.frames else 0,
        width=width if spec.frames else 0,
        sample_fps=spec.n_frames / spec.seconds,
        n_samples=round(spec.seconds * SAMPLE_RATE),
        caps=caps,
    )
    if not (shape.n_video or shape.n_audio):
        raise UsageError(f"--seconds {spec.seconds:g} of sound and no frame become no token")
    return shape


def filler(adapter: Adapter, shape: MediaShape, n_text: int) -> str:
    """A question with which the prompt has `n_text` text tokens. Raises UsageError where the chat's own are
    more, or where the tokenizer allows no such number."""
    # The marks around a clip depend on its kinds alone, so the shortest one will do.
    side = adapter.geometry.pixel_factor if shape.n_video else 0
    short = adapter.media_shape(
        n_frames=2 if side else 0, height=side, width=side, sample_fps=1.0 if side else 0.0,
        n_samples=SAMPLE_RATE if shape.n_audio else 0, caps=PixelCaps(1, 1, 1),
    )  # fmt: skip

    def length(text: str) -> int:
        return adapter.prompt(text, short).layout.n_text

    text, least = "", length("")
    if n_text < least:
        raise UsageError(
            f"--text-tokens {n_text}: the chat around a question takes {least} already",
            hint=f"give {least} or more, or leave it out",
        )
    for word in FILLERS:
        cost = length(text + word * 2) - length(text + word)
        if cost > 0:
            text += word * max(0, (n_text - length(text)) // cost)
    if length(text) != n_text:
        raise UsageError(f"--text-tokens {n_text}: this tokenizer makes {length(text)} of it")
    return text
