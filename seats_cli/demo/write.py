"""A clip of the toy world as a real file: H.264 and AAC in an mp4, with its truth as JSON beside it."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from seats_cli.demo.nouns import SAMPLE_RATE, SPLITS
from seats_cli.demo.render import pack, render_audio, render_frames, to_tensors
from seats_cli.demo.voices import WordBank, load_bank
from seats_cli.demo.world import ClipSpec, sample_clip, suite_questions
from seats_cli.errors import MediaError, UsageError

SIZE = 336
FPS = 12
CRF = 24  # H.264's quality: about 15 to 25 kB a second at this size
AUDIO_BITS = 48_000  # a second


def write_clip(
    path: str | Path,
    seed: int,
    duration_s: float = 16.0,
    split: str = "test",
    *,
    size: int = SIZE,
    fps: int = FPS,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Render and encode the clip of `seed` to `path` (.mp4), and write its truth to the same name with .json.

    Memory is bounded by one second of frames. The same arguments give the same frames and waveform.
    on_progress gets the seconds written. Returns the JSON document {seed, duration_s, split, scene,
    questions}. Raises UsageError for arguments out of range, MediaError when the file cannot be written.
    """
    path = Path(path)
    _check(path, split, size, fps)
    spec = sample_clip(seed, duration_s, split)
    document = {
        "seed": seed,
        "duration_s": spec.duration_s,
        "split": split,
        "scene": spec.to_json(),
        "questions": [question.to_json() for question in suite_questions(spec)],
    }
    try:
        _encode(path, spec, size, fps, on_progress)
        text = json.dumps(document, indent=1)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    except (OSError, av.FFmpegError) as error:
        raise MediaError(
            f"cannot write {path}: {error}", hint="is the folder there, and writable?"
        ) from error
    return document


def _check(path: Path, split: str, size: int, fps: int) -> None:
    if path.suffix.lower() != ".mp4":
        raise UsageError(f"a demo clip is an .mp4 file, not {path.name!r}")
    if split not in SPLITS:
        raise UsageError(f"no such split: {split!r}", hint="choose one of " + ", ".join(SPLITS))
    if size % 2 or not 64 <= size <= 512:
        raise UsageError(f"frames of {size} px cannot be drawn", hint="choose an even number from 64 to 512")
    if not 2 <= fps <= 60:
        raise UsageError(f"{fps} frames a second cannot be written", hint="choose 2 to 60")


def render_clip(
    spec: ClipSpec, frames: range, size: int = SIZE, fps: int = FPS
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The frames of these numbers: (len(frames), size, size, 3) uint8."""
    times = torch.tensor([frames], dtype=torch.float32) / fps
    with torch.inference_mode():
        pixels = render_frames(to_tensors(pack([spec])), times, size)[0]
        bytes_ = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    found: np.ndarray[Any, np.dtype[np.uint8]] = bytes_.contiguous().numpy()
    return found


@lru_cache(maxsize=1)
def _bank() -> WordBank:
    return load_bank().to("cpu", torch.float16)  # half of 140 MB, and finer than the codec


def render_waveform(spec: ClipSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The clip's sound: (duration_s * 16000,) float32."""
    with torch.inference_mode():
        wave = render_audio(to_tensors(pack([spec])), _bank(), round(spec.duration_s * SAMPLE_RATE))[0]
    found: np.ndarray[Any, np.dtype[np.float32]] = wave.numpy()
    return found


def _encode(
    path: Path, spec: ClipSpec, size: int, fps: int, on_progress: Callable[[float], None] | None
) -> None:
    wave = render_waveform(spec)
    n_frames = round(spec.duration_s * fps)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": str(CRF), "preset": "medium"})
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        # One thread and one slice: the same bytes on every machine.
        video.thread_count = 1
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = AUDIO_BITS
        for second in range(math.ceil(spec.duration_s)):
            numbers = range(second * fps, min((second + 1) * fps, n_frames))
            for number, pixels in zip(numbers, render_clip(spec, numbers, size, fps), strict=True):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
                container.mux(video.encode(frame))
            piece = wave[second * SAMPLE_RATE : (second + 1) * SAMPLE_RATE]
            sound = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = (
                SAMPLE_RATE,
                second * SAMPLE_RATE,
                Fraction(1, SAMPLE_RATE),
            )
            container.mux(audio.encode(sound))
            if on_progress is not None:
                on_progress(min(second + 1.0, spec.duration_s))
        container.mux(video.encode())
        container.mux(audio.encode())
