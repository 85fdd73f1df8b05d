"""When each frame of a video track is shown and where its packet lies, read without decoding."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .container import INDEXED, decode, open_container, packets, seek, stream_of
from .probe import Probe, Track

_SCAN_MARGIN_S = 2.0  # a range's scan begins this much early: its first keyframe is certainly before it


@dataclass(frozen=True)
class VideoIndex:
    """Every frame of the scanned part, in ticks of `time_base` on the container's clock.

    `ticks` (n,) int64 ascending presentation times and `order` (n,) int64 where the frame's packet comes in
    the file (0 the first packet scanned). `keys` (k,3) int64, a row a keyframe in file order: its place, its
    ticks, and the ticks to seek to. `from_start` is False when the scan began inside the file; `by_number`
    when the container has no usable clock and frames are known by number instead; `end_s` is when the last
    frame's display ends.
    """

    time_base: Fraction
    ticks: np.ndarray
    order: np.ndarray
    keys: np.ndarray
    from_start: bool
    by_number: bool
    end_s: float

    def key_for(self, row: int) -> int:
        """The last keyframe from which frame `row` decodes exactly; -1 when it comes before the first.

        A frame shown before a keyframe that precedes it in the file (an open group) needs the keyframe
        before.
        """
        usable = (self.keys[:, 0] <= self.order[row]) & (self.keys[:, 1] <= self.ticks[row])
        return int(np.flatnonzero(usable)[-1]) if usable.any() else -1


def scan(file: Probe, track: Track, start_s: float, end_s: float | None) -> VideoIndex:
    """Reads packet headers, decoding nothing, of the range (seconds on the container's clock).

    A truncated file simply yields the frames that are there. Memory: a few integers a frame.
    """
    if start_s > track.first_s + _SCAN_MARGIN_S and file.container in INDEXED:
        index = _scan_from(file, track, start_s - _SCAN_MARGIN_S, end_s)
        # A seek that landed late (no keyframe where the index says) would lose the head of the range.
        if index is not None and len(index.ticks) and index.ticks[0] * index.time_base <= start_s:
            return index
    index = _scan_from(file, track, None, end_s)
    return index if index is not None else _scan_by_decoding(file, track, end_s)


def _scan_from(file: Probe, track: Track, seek_s: float | None, end_s: float | None) -> VideoIndex | None:
    """The index from a demuxing pass; None when the container gives frames no presentation times."""
    rows, keys = array("q"), array("q")  # flat, because a tuple a frame would be tens of MB in a long file
    shown = 0
    with open_container(file.path, file.guard, only=track.index) as container:
        stream = stream_of(container, track.index)
        base = stream.time_base
        limit = math.inf if end_s is None else end_s / base
        if seek_s is not None and not seek(container, stream, int(seek_s / base)):
            return None
        place = -1
        for packet in packets(container, stream, file.guard):
            if packet.size == 0:
                continue
            place += 1
            file.guard.frames(place + 1)
            if packet.pts is None:
                return None
            if packet.is_keyframe:
                # mov seeks by decoding time, often a group too far; matroska by presentation time
                by_dts = file.container == "mov" and packet.dts is not None
                keys.extend((place, packet.pts, packet.dts if by_dts else packet.pts))
            if not packet.is_discard:
                rows.extend((packet.pts, place))
                shown = max(shown, packet.pts + (packet.duration or 0))
            if (packet.dts if packet.dts is not None else packet.pts) > limit:
                break
    return _index(base, rows, keys, seek_s is None, False, float(shown * base))


def _scan_by_decoding(file: Probe, track: Track, end_s: float | None) -> VideoIndex:
    """The index of a file without presentation times (raw streams, some avi): counts what decodes.

    Frame k is shown at k / rate, which is what such files mean; end_s ends the count early.
    """
    base = 1 / Fraction(track.average_fps or 25).limit_denominator(100_000)
    frames = 0
    first = round(track.first_s / base)
    with open_container(file.path, file.guard, only=track.index) as container:
        stream = stream_of(container, track.index)
        for packet in packets(container, stream, file.guard):
            frames += len(decode(packet, file.guard) or [])
            file.guard.frames(frames)
            if end_s is not None and (first + frames - 1) * base > end_s:
                break
    rows = array("q", (number for frame in range(frames) for number in (first + frame, frame)))
    return _index(base, rows, array("q"), True, True, float((first + frames) * base))


def _index(
    base: Fraction,
    rows: array[int],
    keys: array[int],
    from_start: bool,
    by_number: bool,
    end_s: float,
) -> VideoIndex:
    """The index of (ticks, place) pairs and (place, ticks, seek ticks) triples, both flat, in file order."""
    table, key_table = np.array(rows, np.int64).reshape(-1, 2), np.array(keys, np.int64).reshape(-1, 3)
    if len(key_table):  # what precedes the first keyframe (a broadcast joined midway) never decodes
        table = table[(table[:, 1] >= key_table[0, 0]) & (table[:, 0] >= key_table[0, 1])]
    ticks, first = np.unique(table[:, 0], return_index=True)
    if len(ticks) > 1:  # the last frame lasts at least about as long as the others
        end_s = max(end_s, float((ticks[-1] + np.median(np.diff(ticks))) * base))
    return VideoIndex(base, ticks, table[first, 1], key_table, from_start, by_number, end_s)
