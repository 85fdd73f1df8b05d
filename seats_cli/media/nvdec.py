"""Decoding by an NVIDIA GPU's own decoder (NVDEC, FFmpeg's `cuda` acceleration), and why it cannot be.

Frames must not depend on who decodes them. So the GPU gets only what a standard defines to the bit, in pixel
formats that come back without loss; `video.FrameReader` compares the first frame with the CPU's, and lets the
CPU decode whatever the GPU does not.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
from av.codec.hwaccel import HWAccel

from ..errors import UsageError
from .probe import Track

CHOICES = ("none", "auto", "cuda")
CODECS = ("h264", "hevc", "vp8", "vp9")  # others round, and PyAV's decoder of AV1 (dav1d) has no acceleration
# The pixel format that the CPU decodes to -> that in which the same picture comes from the GPU.
# Ten bits are not among them: on an H200 they came back up to 111 of 255 away from the CPU's.
DOWNLOADED = {"yuv420p": "nv12", "yuvj420p": "nv12"}
HELD = "cuda"  # the pixel format of a frame in the GPU's memory
_MAY_STAY = hasattr(HWAccel, "is_hw_owned")  # from PyAV 17 on
SPARE_FRAMES = 4  # that the decoder makes room for beside its own: `FrameReader` holds two, one is on its way


@dataclass(frozen=True)
class VideoDecoding:
    """Where video is decoded, and why there.

    gpu:      CUDA's number of the GPU whose decoder is used where it can be; None: the CPU
    insisted: it was asked for by name, so a file that it does not decode is worth a warning
    threads:  of the CPU; 0: one a core
    """

    gpu: int | None = None
    reason: str = "hwaccel is none"
    insisted: bool = False
    threads: int = 0


ON_CPU = VideoDecoding()


class NotOnGpu(Exception):
    """The GPU does not give the frames that the CPU would; the message says how that was seen."""


def check_hwaccel(asked: str) -> None:
    """Raises `UsageError` unless `asked` is one of `CHOICES`."""
    if asked not in CHOICES:
        raise UsageError(f"hwaccel is {asked!r}", hint=f"accepted: {', '.join(CHOICES)}")


def choose_decoding(asked: str, gpu: int | None) -> VideoDecoding:
    """Where to decode: `asked` is one of `CHOICES`, `gpu` the one that the model is on, None without.

    "auto" decodes on the model's GPU, "cuda" on that or else the first, where they can; both else on the CPU.
    """
    check_hwaccel(asked)
    if asked == "none":
        return ON_CPU
    if asked == "auto" and gpu is None:
        return VideoDecoding(reason="the model is on no NVIDIA GPU")
    problem = why_not(gpu or 0)
    if problem is not None:
        return VideoDecoding(reason=problem)
    return VideoDecoding(gpu or 0, "asked for" if asked == "cuda" else "the model is there", asked == "cuda")


def acceleration(gpu: int) -> HWAccel:
    """What `av.open` takes to decode on a GPU. Frames stay there until they are converted, where PyAV lets
    them: most are never looked at, and copying them to the host takes longer than decoding them.

    FFmpeg's own way back to the CPU stays open: the frames from there can be told by their format, while
    without it a decoder that cannot run looks like a damaged file.
    """
    stay: dict[str, Any] = {}
    if _MAY_STAY:
        # The device's primary context only where it is FFmpeg's: PyTorch makes it in another mode, and
        # FFmpeg then refuses it.
        stay = {"is_hw_owned": True, "options": {"primary_ctx": "1" if _held.get(gpu) else "0"}}
    return HWAccel("cuda", device=str(gpu), allow_software_fallback=True, **stay)


_held: dict[int, HWAccel | None] = {}  # None: it cannot be


def hold(gpu: int) -> None:
    """Keep one CUDA context for all files of this process, which must not use PyTorch: each would make its
    own, in some tenths of a second. Where that fails they do."""
    if _MAY_STAY and gpu not in _held:
        _held[gpu] = None
        with suppress(av.FFmpegError, NotImplementedError):
            device = HWAccel("cuda", device=str(gpu), options={"primary_ctx": "1"})
            _held[gpu] = device.create(av.Codec("h264", "r"))


def why_not(gpu: int) -> str | None:
    """Why a GPU (by CUDA's number) does not decode here, whatever the file; None if it may.

    Opens a CUDA context for a moment. Needs no torch.
    """
    try:
        acceleration(gpu).create(av.Codec("h264", "r"))
    except NotImplementedError:
        return "PyAV's FFmpeg is built without CUDA"
    except av.error.PermissionError:  # what FFmpeg makes of a libcuda that it cannot load
        return "there is no NVIDIA driver"
    except av.FFmpegError as error:
        return f"CUDA device {gpu} does not open ({error.strerror}): it may be absent, hidden or full"
    library = "nvcuvid.dll" if sys.platform == "win32" else "libnvcuvid.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return (
            f"the NVIDIA driver lacks {library} (in a container, NVIDIA_DRIVER_CAPABILITIES must name video)"
        )
    return None


def why_not_track(track: Track) -> str | None:
    """Why no GPU decodes this track to the CPU's pixels; None if one may."""
    if track.codec not in CODECS:
        return f"the GPU decodes {', '.join(CODECS)}, not {track.codec}"
    if track.pixel_format not in DOWNLOADED:
        return f"the GPU does not give {track.pixel_format} without loss"
    return None
