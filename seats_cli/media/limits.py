"""What a file may cost before it is refused: media comes from anywhere, and some is made to hurt.

Size, length and picture size are compared before anything is decoded; frames and seconds of sound while they
are counted; time while FFmpeg works. FFmpeg itself allocates no picture beyond the limit.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import MediaLimit


@dataclass(frozen=True)
class Limits:
    """Bounds of one file; None for no bound.

    size_bytes: of the file; duration_s: of the part that is asked about; pixels: of a picture;
    frames: of the video's part that is asked about, before sampling; decode_s: spent inside decoders, waiting
    for nobody, in all readings of one opened file; stall_s: without a step forward, in a process that decodes
    (`process.DecoderProcess`), which is then killed: a thread of this process cannot be
    """

    size_bytes: float | None = 256 * 2.0**30
    duration_s: float | None = 24 * 3600.0
    pixels: float | None = 100e6
    frames: float | None = 5e6
    decode_s: float | None = 3600.0
    stall_s: float | None = 120.0


NO_LIMITS = Limits(None, None, None, None, None, None)


class Guard:
    """The limits of one opened file, and the time that its decoders have taken. Shared by its two tracks."""

    def __init__(
        self, path: str | os.PathLike[str], limits: Limits, beat: Callable[[], None] | None = None
    ) -> None:
        """`beat` is called at the end of each piece of work."""
        self.limits = limits
        self.spent_s = 0.0
        self._beat = beat
        self._path = os.fspath(path)

    def size(self, n_bytes: int) -> None:
        """Raises MediaLimit for a file that is too large."""
        self._check("size", n_bytes, self.limits.size_bytes, "bytes", "leave it out")

    def duration(self, seconds: float) -> None:
        """Raises MediaLimit where the part that is asked about is too long."""
        self._check("duration", seconds, self.limits.duration_s, "s", "ask about a part with --start/--end")

    def picture(self, width: int, height: int) -> None:
        """Raises MediaLimit for frames or an image that are too large."""
        self._check("pixels", width * height, self.limits.pixels, "pixels", "make it smaller")

    def frames(self, count: int) -> None:
        """Raises MediaLimit for too many frames."""
        if self.limits.frames is not None and count > self.limits.frames:
            self._check("frames", count, self.limits.frames, "frames", "ask about a part with --start/--end")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time inside; raises MediaLimit at its end, once there was too much of it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.worked(began)
        self.check_time()

    def worked(self, began: float) -> None:
        """Counts the time since `began`, by the monotonic clock: what `working` does, for every frame."""
        self.spent_s += time.monotonic() - began
        if self._beat is not None:
            self._beat()

    def check_time(self) -> None:
        """Raises MediaLimit once there was too much of it."""
        limit = self.limits.decode_s
        if limit is not None and self.spent_s > limit:
            self._check("seconds", self.spent_s, limit, "s of decoding", "ask about a shorter part")

    def _check(self, name: str, value: float, limit: float | None, unit: str, remedy: str) -> None:
        if limit is not None and value > limit:
            raise MediaLimit(
                f"{self._path}: {_number(value)} {unit}, beyond the limit of {_number(limit)}",
                hint=f"{remedy}, or raise the limit: --limits {name}=...",
            )


def _number(value: float) -> str:
    """Whole numbers in full, others to a hundredth."""
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:.2f}"
