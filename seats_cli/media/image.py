"""A still picture as upright RGB."""

from __future__ import annotations

import itertools
import struct

import numpy as np

from ..errors import MediaFormat
from .container import decode, open_container, packets, stream_of
from .probe import Probe, Track

# EXIF orientation -> (quarter turns counterclockwise, mirrored left to right afterwards)
_UPRIGHT = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}


def orientation(file: Probe, track: Track) -> tuple[int, bool]:
    """How to set the picture upright: (quarter turns counterclockwise, then mirror left to right).

    From the EXIF tag, because PyAV's `frame.rotation` loses mirroring; without one, from `frame.rotation`.
    """
    with file.path.open("rb") as stream:
        exif = _exif(stream.read())
    return _UPRIGHT.get(_orientation_tag(exif), (track.rotation // 90, False))


def is_animated(file: Probe, track: Track) -> bool:
    """Whether the file holds more than one picture; reads two packets at most, decodes none."""
    with open_container(file.path, file.guard, only=track.index) as container:
        filled = (
            packet
            for packet in packets(container, stream_of(container, track.index), file.guard)
            if packet.size
        )
        return len(list(itertools.islice(filled, 2))) > 1


def read_image(file: Probe, track: Track) -> np.ndarray:
    """(H,W,3) uint8 RGB, upright at native size; transparency over white. The first frame of an animation."""
    with open_container(file.path, file.guard, only=track.index) as container:
        for packet in packets(container, stream_of(container, track.index), file.guard):
            for frame in decode(packet, file.guard) or ():
                has_alpha = frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components)
                pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
                turns, mirrored = orientation(file, track)
                pixels = np.rot90(_over_white(pixels) if has_alpha else pixels, k=turns)
                return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)
    raise MediaFormat(
        f"{file.path}: the picture does not decode", hint="the file is damaged; export it again"
    )


def _over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _exif(data: bytes) -> bytes:
    """The TIFF block of EXIF in a jpg, png or webp; empty without one."""
    if data[:2] == b"\xff\xd8":
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
            (size,) = struct.unpack_from(">H", data, at + 2)
            if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                return data[at + 10 : at + 2 + size]
            at += 2 + size
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        at = 8
        while at + 12 <= len(data):
            (size,) = struct.unpack_from(">I", data, at)
            if data[at + 4 : at + 8] == b"eXIf":
                return data[at + 8 : at + 8 + size]
            at += 12 + size
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        at = 12
        while at + 8 <= len(data):
            (size,) = struct.unpack_from("<I", data, at + 4)
            if data[at : at + 4] == b"EXIF":
                return data[at + 8 : at + 8 + size].removeprefix(b"Exif\0\0")
            at += 8 + size + size % 2
    return b""


def _orientation_tag(tiff: bytes) -> int:
    """The value of tag 0x0112 of the first directory, 0 when it is not there or the block is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 0
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return int(value)
    except struct.error:
        pass
    return 0
