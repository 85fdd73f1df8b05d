"""A file as FFmpeg reads it, through PyAV: opened without the network, its packets one by one, damage stepped
over, time and pictures bounded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import av

from .limits import Guard

# Demuxers that accept plain text, or that open other files and addresses named inside the file.
REFUSED_FORMATS = {
    *("tty", "hls", "dash", "webm_dash_manifest", "concat", "concatf", "sdp", "rtsp", "rtp", "sap", "imf"),
    *("vapoursynth", "lavfi"),
}
# Only these containers carry an index that seeks to the wanted keyframe; the others are read from the start.
INDEXED = {"mov", "matroska"}
_PADDING = 2**16  # pixels by which a decoder's own picture may be larger: sides are rounded up for it
_MAX_READ_ERRORS = 100  # demuxer errors in a row before the rest of a file counts as unreadable


@cache
def _demuxers() -> str:
    """Names of the demuxers that read one file and nothing else, as FFmpeg takes a list."""
    names: set[str] = set()
    for name in av.formats_available:
        with suppress(ValueError):  # it only writes
            found = av.ContainerFormat(name, "r")
            names.update(found.name.split(",") if found.is_input else ())
    return ",".join(sorted(names - REFUSED_FORMATS))


def open_container(path: Path, guard: Guard, only: int | None = None, hwaccel: Any = None) -> Any:
    """An open PyAV input container of the local file, which the caller closes. Raises `av.FFmpegError`.

    With `only`, the demuxer skips every other stream; with `hwaccel`, a PyAV HWAccel, what can decode there
    does. The file protocol is forced and no other allowed, so that neither a name with a colon nor an address
    inside a file reaches the network, and no demuxer may run that opens files which a file names. Decoders
    make no room for pictures far beyond the guard's limit.
    """
    with guard.working():
        container = av.open(
            "file:" + os.path.abspath(path),
            options={"protocol_whitelist": "file", "format_whitelist": _demuxers(), "pattern_type": "none"},
            metadata_errors="replace",
            hwaccel=hwaccel,
        )
    if guard.limits.pixels is not None:
        room = min(2 * guard.limits.pixels + _PADDING, 2**31 - 1)
        for stream in container.streams.video:
            if stream.codec_context is not None:
                stream.codec_context.options = {"max_pixels": f"{room:.0f}"}
    discard = getattr(
        av.stream, "Discard", None
    )  # before PyAV 18 the demuxer reads them and drops them later
    if only is not None and discard is not None:
        for stream in container.streams:
            if stream.index != only:
                stream.discard = discard.all
    return container


def packets(container: Any, stream: Any, guard: Guard) -> Iterator[Any]:
    """The stream's packets, ending in an empty one that drains the decoder; damage is stepped over.

    A demuxer that keeps failing without progress counts as the end of the file.
    """
    failures = 0
    while failures < _MAX_READ_ERRORS:
        try:
            flow = iter(container.demux(stream))
            while True:
                began = time.monotonic()
                try:
                    packet = next(flow, None)
                finally:
                    guard.worked(began)
                guard.check_time()
                if packet is None:
                    return
                failures = 0
                yield packet
        except (av.EOFError, IndexError):
            return  # IndexError: PyAV's end of a file in which a stream appeared midway
        except av.FFmpegError:
            failures += 1


def decode(packet: Any, guard: Guard) -> list[Any] | None:
    """The frames that a packet completes; None when the packet is damaged."""
    began = time.monotonic()
    try:
        frames: list[Any] = packet.decode()
    except av.EOFError:
        return []
    except (av.FFmpegError, ValueError):
        return None
    finally:
        guard.worked(began)
    guard.check_time()
    return frames


def stream_of(container: Any, index: int) -> Any:
    """The PyAV stream of that number in a freshly opened container."""
    return next(s for s in container.streams if s.index == index)


def seek(container: Any, stream: Any, ticks: int) -> bool:
    """Stands at the keyframe at or before `ticks`, with empty decoders; False if the container cannot."""
    try:
        container.seek(ticks, stream=stream)
    except av.FFmpegError:
        return False
    return True


def frame_ticks(frame: Any) -> int | None:
    """Presentation time of a frame in ticks of its time base; None where the container has no clock."""
    ticks = frame.pts if frame.pts is not None else frame.dts
    return None if ticks is None else int(ticks)
