"""Which frames of a clip are read: arithmetic on counts and timestamps, no files.

The rule is that of qwen-omni-utils, which the checkpoints were trained with: frames spread evenly from the
first to the last (`linspace`, rounded half to even), an even number of them, at `fps` frames a second within
limits. Clips of variable frame rate are sampled evenly in time instead of evenly in frame number.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from ..errors import MediaRange, UsageError

FRAME_FACTOR = 2  # a temporal patch is two frames, so counts are even


@dataclass(frozen=True)
class Sampling:
    """What to read of a file: frames a second, bounds on their number, and a range in seconds.

    `start_s` and `end_s` count from the clip's own time zero and apply to video and audio alike. Raises
    `UsageError` for values that no clip could satisfy.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise UsageError(
                f"fps is {self.fps:g}; it must be more than 0", hint="2 is what the models were trained with"
            )
        for name in ("min_frames", "max_frames"):
            if getattr(self, name) < FRAME_FACTOR:
                raise UsageError(
                    f"{name} is {getattr(self, name)}; it must be at least {FRAME_FACTOR}",
                    hint="frames are read in pairs",
                )
        for name, value in (("start", self.start_s), ("end", self.end_s)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} is {value:g} s; it must be 0 or more", hint="give seconds or mm:ss")
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise UsageError(
                f"the range is empty: start {self.start_s or 0.0:g} s, end {self.end_s:g} s",
                hint="end must be later than start",
            )


def parse_time(text: str) -> float:
    """Seconds from "90.5", "1:30.5" (mm:ss) or "1:02:03" (hh:mm:ss); `UsageError` for anything else."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)", text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a time",
            hint="accepted: seconds (90 or 90.5), mm:ss (1:30.5), hh:mm:ss (1:02:03)",
        )
    hours, minutes, seconds = match.groups()
    if (minutes is not None and float(seconds) >= 60) or (hours is not None and int(minutes) >= 60):
        raise UsageError(f"{text!r} is not a time: 60 or more after a colon", hint="write 1:30, not 0:90")
    return int(hours or 0) * 3600.0 + int(minutes or 0) * 60.0 + float(seconds)


def frame_count(total: int, duration_s: float, sampling: Sampling) -> int:
    """The even number of frames to read of `total` frames lasting `duration_s` seconds.

    Raises `MediaRange` when fewer than two frames are there.
    """
    floor_even = FRAME_FACTOR * (min(sampling.max_frames, total) // FRAME_FACTOR)
    ceil_even = FRAME_FACTOR * -(-sampling.min_frames // FRAME_FACTOR)
    wanted = min(max(duration_s * sampling.fps, ceil_even), floor_even, total)
    count = FRAME_FACTOR * int(wanted // FRAME_FACTOR)
    if count < FRAME_FACTOR:
        raise MediaRange(
            f"only {total} video frame{'' if total == 1 else 's'} there; at least {FRAME_FACTOR} are needed",
            hint="ask about a longer range, or save the frame as an image (png, jpg) and ask about that",
        )
    return count


def frame_indices(
    total: int, native_fps: float, sampling: Sampling, first: int = 0
) -> tuple[np.ndarray, float]:
    """Frames to read of a clip of constant frame rate: (indices (n,) int64 ascending, the true sampled fps).

    Of the `total` frames from number `first` on: even in frame number from the first to the last, rounded
    half to even. Raises `MediaRange` below two frames.
    """
    count = frame_count(total, total / native_fps, sampling)
    return _linspace_indices(first, first + total - 1, count), count / total * native_fps


def frame_range(total: int, native_fps: float, sampling: Sampling) -> tuple[int, int]:
    """First frame and number of frames in the asked range at a constant frame rate, both ends included.

    Raises `MediaRange` when no frame lies in it.
    """
    first = math.ceil((sampling.start_s or 0.0) * native_fps)
    end = math.inf if sampling.end_s is None else math.floor(sampling.end_s * native_fps)
    last = min(end, total - 1)
    if first > last:
        raise MediaRange(
            f"no video frame between {sampling.start_s or 0.0:g} s and "
            f"{'the end' if sampling.end_s is None else f'{sampling.end_s:g} s'}: "
            f"the video lasts {total / native_fps:.2f} s",
            hint="ask about a range inside the file",
        )
    return first, int(last) - first + 1


def _linspace_indices(first: int, last: int, count: int) -> np.ndarray:
    """round(torch.linspace(first, last, count)), (count,) int64, to the bit, without torch.

    torch takes a float32 step, fills from both ends, and rounds to float32 once, after a fused multiply and
    add; so in a long clip another precision picks a neighbouring frame where a value falls near a half.
    """
    step = np.float64((np.float32(last) - np.float32(first)) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    values = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    return np.rint(values.astype(np.float32)).astype(np.int64)


def frame_indices_by_time(
    times_s: np.ndarray, duration_s: float, sampling: Sampling
) -> tuple[np.ndarray, float]:
    """Frames to read at a variable frame rate: (indices (n,) int64 non-descending, the true sampled fps).

    `times_s` (total,) float64 ascending presentation times; `duration_s` from the first of them to the end of
    the last frame's display. Even in time. Where frames are dense this is the nearest frame; where one frame
    is held for long (a screen recording, slides), it is the frame on screen at that time, so one may come
    several times.
    """
    total = len(times_s)
    count = frame_count(total, duration_s, sampling)
    last = max(float(times_s[-1]), float(times_s[0]) + duration_s * (1 - 1 / total))
    targets = np.linspace(float(times_s[0]), last, count)
    usual_interval = float(np.median(np.diff(times_s)))
    indices = np.searchsorted(times_s, targets + usual_interval / 2, side="right") - 1
    return np.clip(indices, 0, total - 1).astype(np.int64), count / duration_s


def is_variable_rate(times_s: np.ndarray, resolution_s: float) -> bool:
    """Whether frame number / average rate would misplace a frame by more than half a frame interval.

    `times_s` (n,) float64 ascending; `resolution_s` is the container's clock tick, whose rounding is not a
    variation.
    """
    if len(times_s) < 3:
        return False
    even = np.linspace(times_s[0], times_s[-1], len(times_s))
    interval = (times_s[-1] - times_s[0]) / (len(times_s) - 1)
    return bool(np.abs(times_s - even).max() > interval / 2 + resolution_s)
