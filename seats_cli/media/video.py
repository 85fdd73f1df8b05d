"""The video track: exact frames of an index, on bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ..errors import MediaFormat
from .container import INDEXED, decode, frame_ticks, open_container, packets, seek, stream_of
from .index import VideoIndex
from .nvdec import (
    DOWNLOADED,
    HELD,
    ON_CPU,
    SPARE_FRAMES,
    NotOnGpu,
    VideoDecoding,
    acceleration,
    why_not_track,
)
from .probe import Probe, Track, Warn

_SEEK_GAIN = 16  # packets that a seek must skip to be worth it: fewer are read in the time it takes

# Codecs whose packets say for certain that no other frame needs theirs. In HEVC, frames of higher temporal
# layers may need one that says so.
_SKIPPING = ("h264",)

# From PyAV 17 on a thread a core converts each frame, be it small: several times the work, and each of them
# waits for a core where others decode.
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

Place = Callable[[tuple[int, ...]], np.ndarray]
"""Gives the memory for an array of a shape, of uint8."""


@dataclass(frozen=True)
class MediaWindow:
    """A run of sampled frames in time order.

    `frames` (T,H,W,3) uint8 RGB, upright, at native size; `frame_times_s` (T,) float64 and `start_s` are
    relative to the start of the asked range.
    """

    index: int
    start_s: float
    frames: np.ndarray | None
    frame_times_s: np.ndarray


class _Missed(Exception):
    """A frame did not come as the index says, or not as it would had nothing been left out."""


class FrameReader:
    """Exact frames by their row in a `VideoIndex`, asked for in ascending order; a context manager.

    Decodes with as many threads as `decoding` says, converts only the frames asked for, and leaves out what
    comes between the last of them in a group of pictures and the next group that holds one. Holds two decoded
    frames. What does not decode is replaced by the nearest frame that does. Damaged packets are counted, but
    for those left out.

    `decoding` may name a GPU, which decodes as long as it gives the CPU's frames: the first one is decoded by
    both, and from the first that it lacks or refuses the CPU decodes. `gpu` says which one decodes now, None:
    the CPU, and `reason` why.
    """

    def __init__(
        self,
        file: Probe,
        track: Track,
        index: VideoIndex,
        decoding: VideoDecoding = ON_CPU,
        rows: np.ndarray | None = None,
    ) -> None:
        """`rows`: all that will be asked for, if that is known; what no other frame refers to is then not
        decoded where it is not one of them."""
        self.file, self.track, self.index = file, track, index
        self.gpu, self.reason, self._threads = decoding.gpu, decoding.reason, decoding.threads
        self.read_on_gpu = 0  # frames that came from it
        if self.gpu is not None and (problem := why_not_track(track)) is not None:
            self.gpu, self.reason = None, problem
        self.damaged_packets = 0
        self.replaced: list[int] = []  # rows of the frames that another stands for
        self._may_seek = file.container in INDEXED and not index.by_number and len(index.keys) > 0
        self._may_pass_over = self._may_seek
        self._usual = float(np.median(np.diff(index.ticks))) if len(index.ticks) > 1 else 0.0
        self._container: Any = None
        self._stream: Any = None
        self._demuxed: Iterator[Any] = iter(())
        self._packets: Iterator[Any] = iter(())  # the same, behind one that was looked at already
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._previous: tuple[int, Any] | None = None
        self._current: tuple[int, Any] | None = None
        self._place: int | None = None  # packets of the index fed to the decoder so far, None if not known
        self._landed: int | None = None  # the keyframe just begun at, until the next read
        self._key_came = False  # and its frame has come whole, and needed no other
        self._number = 0  # of the next frame, where frames are known by number
        self._rgb: tuple[int, np.ndarray] | None = None
        self._wanted: set[int] | None = None  # places of the packets whose frames must come, None for all
        if rows is not None and track.codec in _SKIPPING and not index.by_number:
            self._wanted = set(index.order[rows].tolist())
        self._to_rgb = VideoReformatter()  # a frame's own would set its tables up anew
        self._open()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._frames = iter(())
        self._previous = self._current = None

    def read(self, row: int) -> np.ndarray:
        """Frame `row` of the index, (H,W,3) uint8 RGB, upright; raises `MediaFormat` if nothing decodes."""
        while True:  # each may happen once, in any order
            try:
                return self._read(row)
            except NotOnGpu as refusal:
                self.gpu, self.reason = None, str(refusal)
            except _Missed:  # what stands for a frame is chosen among all of them
                self._wanted, self.damaged_packets = None, 0
            self._open()

    def _read(self, row: int) -> np.ndarray:
        target = int(self.index.ticks[row])
        if self._rgb is not None and self._rgb[0] == target:
            return self._rgb[1]
        self._seek_if_it_wins(row)
        damaged = self.damaged_packets
        ticks = self._decode_to(target)
        landed, self._landed = self._landed, None
        lost = landed is not None and not self._key_came
        if lost and self.damaged_packets == damaged:
            self._may_seek = False  # it needs what is before it (intra refresh), and others may
            raise _Missed
        if ticks != target and self._wanted is not None:
            raise _Missed
        if landed is not None and (lost or ticks != target) and (landed > 0 or not self.index.from_start):
            # Behind damage, what comes before the keyframe is the next best: once more from one further back.
            self.damaged_packets = damaged  # those since then come again
            self._seek_to_key(landed - 1)
            self._decode_to(target)
            lost = self._landed is not None and not self._key_came
            self._landed = None
            if lost:
                self._may_seek = False
                raise _Missed
        near = [pair for pair in (self._previous, self._current) if pair is not None]
        missed = not near or min(abs(ticks - target) for ticks, _ in near) > 1.5 * self._usual
        if missed and self.gpu is not None:
            raise NotOnGpu(f"the GPU gives no frame at {float(target * self.index.time_base):.2f} s")
        if near:
            ticks, frame = min(near, key=lambda pair: abs(pair[0] - target))
            rgb = self._upright(frame)
        elif self._rgb is not None:
            rgb = self._rgb[1]
        else:
            raise _no_frame(self.file)
        if missed:
            self.replaced.append(row)
        if self.gpu is not None:
            if not self.read_on_gpu:
                self._compare_with_cpu(row, rgb)
            self.read_on_gpu += 1
        self._rgb = (target, rgb)
        return rgb

    def _open(self) -> None:
        self.close()
        self._container = self._open_on_gpu() or open_container(
            self.file.path, self.file.guard, only=self.track.index
        )
        self._stream = stream_of(self._container, self.track.index)
        if self.gpu is None:
            self._stream.thread_type = "AUTO"
            self._stream.codec_context.thread_count = self._threads
        else:  # it decodes a frame at a time, and every thread would keep frames of its few
            self._stream.codec_context.thread_count = 1
        self._place = 0 if self.index.from_start else None
        self._skip = "DEFAULT"
        self._landed = None
        self._number = round(self.track.first_s / self.index.time_base)
        self._packets = self._demuxed = packets(self._container, self._stream, self.file.guard)
        self._frames = self._decoded()

    def _open_on_gpu(self) -> Any:
        """The container as the GPU decodes it; None, with the reason, where it cannot."""
        if self.gpu is None:
            return None
        try:
            container = open_container(
                self.file.path, self.file.guard, self.track.index, acceleration(self.gpu)
            )
        except av.FFmpegError as error:  # of the device: without it, this file has been opened before
            self.gpu, self.reason = None, f"the GPU's decoder does not open: {error.strerror}"
            return None
        codec = stream_of(container, self.track.index).codec_context
        if codec.is_hwaccel:
            codec.options = {**codec.options, "extra_hw_frames": str(SPARE_FRAMES)}
            return container
        container.close()
        self.gpu, self.reason = None, f"FFmpeg has no GPU decoder of {self.track.codec}"
        return None

    def _compare_with_cpu(self, row: int, rgb: np.ndarray) -> None:
        """`NotOnGpu` unless the CPU decodes the same frame up to rounding: cropping at the left or top, for
        one, is lost on the GPU."""
        with FrameReader(self.file, self.track, self.index) as plain:
            expected = plain.read(row)
        off = int(np.abs(expected.astype(np.int16) - rgb).max())
        if off > 1:
            raise NotOnGpu(f"the GPU's frame differs from the CPU's by up to {off} of 255")

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        """(ticks, frame) in presentation order from where the container stands."""
        guard = self.file.guard
        for packet in self._packets:
            if self._wanted is not None:
                self._skip_unless_wanted()
            frames = decode(packet, guard)
            if packet.size and self._place is not None:
                self._place += 1
            if frames is None:
                if self.gpu is not None:  # whether that is the file's fault or the GPU's, the CPU will tell
                    raise NotOnGpu("the GPU's decoder stops at a packet")
                if self._wanted is not None:
                    raise _Missed
                self.damaged_packets += 1
            for frame in frames or ():
                if self.gpu is not None and frame.format.name not in (
                    HELD,
                    DOWNLOADED[self.track.pixel_format],
                ):
                    raise NotOnGpu(f"FFmpeg leaves this {self.track.codec} to the CPU")
                if self.index.by_number:
                    yield self._number, frame
                    self._number += 1
                elif (ticks := frame_ticks(frame)) is not None:
                    if self._landed is not None and ticks == self.index.keys[self._landed, 1]:
                        self._key_came = frame.key_frame and not frame.is_corrupt
                    yield ticks, frame

    def _skip_unless_wanted(self) -> None:
        """Tells the decoder whether the frame of the next packet may be left out."""
        assert self._wanted is not None  # there are such
        skip = "DEFAULT" if self._place is None or self._place in self._wanted else "NONREF"
        if skip != self._skip:
            self._stream.codec_context.skip_frame = self._skip = skip

    def _decode_to(self, target: int) -> int | None:
        """Decodes until a frame at or after the target is current; its ticks, None at the track's end."""
        while self._current is None or self._current[0] < target:
            following = next(self._frames, None)
            if following is None:
                return None
            self._previous, self._current = self._current, following
        return int(self._current[0])

    def _seek_if_it_wins(self, row: int) -> None:
        if not self._may_seek or (self._current is not None and self._current[0] >= self.index.ticks[row]):
            return
        key = self.index.key_for(row)
        ahead = -1 if self._place is None or key < 0 else self.index.keys[key, 0] - self._place
        if self._place is None or ahead >= _SEEK_GAIN:
            self._seek_to_key(key)
        elif ahead > 0 and self._may_pass_over:
            self._pass_over(key)

    def _seek_to_key(self, key: int) -> None:
        """Stands before keyframe `key`; if that fails, at the start of the file, and seeks no more."""
        if key >= 0 and seek(self._container, self._stream, int(self.index.keys[key, 2])):
            self._packets = self._demuxed = packets(self._container, self._stream, self.file.guard)
            first = next(self._packets, None)
            pts = first.pts if first is not None and first.size else None
            landed = -1 if pts is None else int(np.argmax(self.index.keys[:, 1] == pts))
            if 0 <= landed <= key and self.index.keys[landed, 1] == pts:
                self._begin_at(landed, first)
                if landed < key and self._may_pass_over:  # many containers seek a group too far back
                    self._pass_over(key)
                return
        self._may_seek = False
        self._open()

    def _pass_over(self, key: int) -> None:
        """Stands before keyframe `key`, a little ahead, as after seeking to it; if the file is not as the
        index says, at the start."""
        assert self._place is not None  # what lies ahead is known
        for packet in self._packets:
            if not packet.size or packet.has_sidedata("new_extradata"):  # which the decoder must be told
                break
            if self._place == self.index.keys[key, 0]:
                if packet.pts != self.index.keys[key, 1]:
                    break
                self._stream.codec_context.flush_buffers()
                self._begin_at(key, packet)
                return
            self._place += 1
        self._may_pass_over = False
        self._open()

    def _begin_at(self, key: int, packet: Any) -> None:
        """Goes on with the packet of keyframe `key` and an empty decoder."""
        self._place, self._landed, self._key_came = int(self.index.keys[key, 0]), key, False
        self._previous = self._current = None
        self._packets = chain((packet,), self._demuxed)
        self._frames = self._decoded()

    def _upright(self, frame: Any) -> np.ndarray:
        if self.gpu is not None:  # from interleaved chroma, RGB would be interpolated by another rule
            try:
                frame = frame.reformat(format=self.track.pixel_format, **_ONE_THREAD)
            except av.FFmpegError as error:  # of the copy to the host
                raise NotOnGpu(f"the GPU does not hand a frame over: {error.strerror}") from None
        if (frame.width, frame.height) != (self.track.width, self.track.height):
            frame = frame.reformat(width=self.track.width, height=self.track.height, **_ONE_THREAD)
        rgb = self._to_rgb.reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, k=self.track.rotation // 90))


def windows(
    reader: FrameReader,
    rows: np.ndarray,
    times_s: np.ndarray,
    frames_per_window: int,
    warn: Warn,
    place: Place | None = None,
) -> Iterator[MediaWindow]:
    """The frames at `rows` of the index in windows of `frames_per_window` (the last may be shorter).

    One window of pixels is held at a time, in memory that `place` gives, its own by default. Frames that did
    not decode are reported through `warn` at the end.
    """
    place = place or partial(np.empty, dtype=np.uint8)
    for index, first in enumerate(range(0, len(rows), frames_per_window)):
        part = rows[first : first + frames_per_window]
        first_frame = reader.read(int(part[0]))
        frames = place((len(part), *first_frame.shape))
        frames[0] = first_frame
        for position, row in enumerate(part[1:], 1):
            frames[position] = reader.read(int(row))
        times = times_s[first : first + frames_per_window]
        yield MediaWindow(index, float(times[0]), frames, times)
    name = reader.file.path.name
    if reader.damaged_packets:
        plural = "s" if reader.damaged_packets > 1 else ""
        warn(f"{name}: {reader.damaged_packets} damaged video packet{plural} skipped")
    if reader.replaced:
        lost = np.isin(rows, reader.replaced)
        kept = times_s[~lost]
        if not len(kept):
            raise _no_frame(reader.file)
        if lost[-1] and not lost[: len(kept)].any():
            warn(
                f"{name}: only the first {kept[-1]:.1f} of {times_s[-1]:.1f} s of video decode; "
                "the last good frame stands for the rest"
            )
        else:
            warn(
                f"{name}: {int(lost.sum())} of {len(rows)} sampled frames do not decode; "
                "the nearest good frame stands for each"
            )


def _no_frame(file: Probe) -> MediaFormat:
    return MediaFormat(
        f"{file.path}: no frame of the asked range decodes",
        hint="the file is damaged there; try another range",
    )
