"""What opening a file gives, whoever decodes it: this process (`open_clip`) or another (`DecoderProcess`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from .clip import MediaInfo
from .limits import Limits
from .nvdec import VideoDecoding
from .probe import Warn
from .sampling import Sampling
from .video import MediaWindow


class OpenedClip(Protocol):
    """A file opened for one range and sampling; `Clip` says what each of these is."""

    info: MediaInfo
    frame_times_s: np.ndarray
    sample_fps: float
    n_samples: int
    frame_bytes: int
    video_used: str
    audio_used: str
    readable_fraction: float
    frames_replaced: int
    video_decoder: str
    decoder_used: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def video_windows(self, frames_per_window: int) -> Iterator[MediaWindow]: ...

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]: ...

    def image(self) -> np.ndarray: ...


class Opener(Protocol):
    """Opens files as `open_clip` does, with its errors."""

    def __call__(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling | None = None,
        *,
        warn: Warn,
        decoding: VideoDecoding,
        limits: Limits | None,
    ) -> OpenedClip: ...


class DistantOpener(Protocol):
    """An `Opener` that waits for another process: `check` is called now and then meanwhile, while the clip is
    read too, and what it raises ends the waiting."""

    def __call__(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling | None = None,
        *,
        warn: Warn,
        decoding: VideoDecoding,
        limits: Limits | None,
        check: Callable[[], None],
    ) -> OpenedClip: ...
