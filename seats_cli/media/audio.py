"""The audio track as 16 kHz mono, streamed: decode to float, average the channels, resample with soxr.

Averaging and resampling ourselves keeps the result within 1.5e-5 of `librosa.load`; ffmpeg's own downmix and
resampler differ by up to 0.1. Plain audio files go through soundfile, everything else (and what soundfile
does not read) through PyAV, laid out on the clip's clock so that its time zero is the video's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import av
import numpy as np

from .container import INDEXED, decode, frame_ticks, open_container, packets, seek, stream_of
from .probe import Probe, Track, Warn

SAMPLE_RATE = 16_000
CACHE_SECONDS = (
    20 * 60
)  # the scan keeps the waveform of shorter clips (at most 77 MB); longer ones decode again
_SOUNDFILE_FORMATS = {"wav", "w64", "aiff", "au", "caf", "flac", "mp3", "ogg"}
_BLOCK = 1 << 16  # samples read at once from a plain audio file, and gathered from decoded frames
_PREROLL_S = 1.0  # decoded and dropped before a range: overlapping codecs need what came before
_DRIFT_S = (
    0.05  # timestamps may wander this much (they are rounded in mkv) before samples are moved to match them
)
_MAX_PLANES = 8  # see _readable
_MAX_GAP_S = 60.0  # a jump beyond this, outside the stated length, is a restarted clock and not silence


@dataclass(frozen=True)
class Source:
    """Where a range's samples come from; `start_s`, `end_s` on the container's clock (soundfile: from 0)."""

    file: Probe
    track: Track
    start_s: float
    end_s: float | None
    with_soundfile: bool

    @property
    def limit(self) -> float:
        """The range's length in samples at the source's rate, infinite when it is open."""
        return math.inf if self.end_s is None else round((self.end_s - self.start_s) * self.track.rate)


@dataclass(frozen=True)
class Piece:
    """Some samples at the source's rate: `load()` -> (count,) float32 mono, or silence when it is None."""

    count: int
    load: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class AudioScan:
    """A source's exact length: `samples` at 16 kHz; `waveform` (samples,) float32 if short enough to keep."""

    source: Source
    samples: int
    seconds: float
    waveform: np.ndarray | None


def scan(file: Probe, track: Track, start_s: float, end_s: float | None, warn: Warn) -> AudioScan:
    """Decodes the range (seconds on the container's clock) once to learn its exact length on bounded memory.

    Reports through `warn` what was damaged, silent by NaN, or cut. Zero samples mean that the range has no
    audio.
    """
    if file.kind == "audio" and file.container in _SOUNDFILE_FORMATS:
        offset = file.origin_s
        end = None if end_s is None else end_s - offset
        if (plain := _open_plain(file)) is not None:
            plain_track = replace(track, rate=plain.samplerate)
            plain.close()
            try:
                return _scan_source(Source(file, plain_track, start_s - offset, end, True), warn)
            except (RuntimeError, OSError) as error:
                warn(
                    f"{file.path.name}: soundfile stops at damaged audio ({error}); read through PyAV instead"
                )
    return _scan_source(Source(file, track, start_s, end_s, False), warn)


def _scan_source(source: Source, warn: Warn) -> AudioScan:
    total = 0
    kept: list[np.ndarray] = []

    def counted() -> Iterator[Piece]:
        nonlocal total
        for piece in pieces(source, warn):
            total += piece.count
            source.file.guard.duration(total / source.track.rate)
            yield piece

    flow = counted()
    for block in resampled(_mono(flow, source, warn), source.track.rate):
        kept.append(block)
        if total > CACHE_SECONDS * source.track.rate:
            kept.clear()
            break
    for _ in flow:  # past the cache's bound only the count is wanted, which needs no samples
        pass
    samples = math.ceil(total * SAMPLE_RATE / source.track.rate)
    waveform = None
    if total <= CACHE_SECONDS * source.track.rate:
        waveform = _exactly(np.concatenate([*kept, np.zeros(0, np.float32)]), samples)
    return AudioScan(source, samples, total / source.track.rate, waveform)


def blocks(found: AudioScan, samples_per_block: int, warn: Warn) -> Iterator[np.ndarray]:
    """The scanned audio as (<=samples_per_block,) float32 blocks of 16 kHz mono, `found.samples` in all.

    Holds a block or two and one decoded frame, or copies from the waveform that the scan kept. `warn` hears
    again what the scan said.
    """
    if found.waveform is not None:
        for first in range(0, found.samples, samples_per_block):
            yield found.waveform[first : first + samples_per_block].copy()
        return
    source = found.source
    left = found.samples
    waiting: list[np.ndarray] = []
    for chunk in _chain(resampled(_mono(pieces(source, warn), source, warn), source.track.rate), left):
        waiting.append(chunk[:left])
        left -= len(waiting[-1])
        if sum(map(len, waiting)) >= samples_per_block or left == 0:
            joined = np.concatenate(waiting)
            whole = len(joined) if left == 0 else len(joined) // samples_per_block * samples_per_block
            for first in range(0, whole, samples_per_block):
                yield joined[first : min(first + samples_per_block, whole)]
            waiting = [joined[whole:]]
        if left == 0:
            return


def _chain(chunks: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The chunks, then zeros up to `total` samples: a resampler may end one sample early."""
    for chunk in chunks:
        total -= len(chunk)
        yield chunk
    while total > 0:
        yield np.zeros(min(total, _BLOCK), np.float32)
        total -= _BLOCK


def resampled(mono: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Mono float32 blocks at `rate` -> at 16 kHz, equal to resampling all at once (soxr HQ, as librosa)."""
    if rate == SAMPLE_RATE:
        yield from mono
        return
    import soxr

    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in mono:
        yield stream.resample_chunk(block, last=False)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _mono(flow: Iterable[Piece], source: Source, warn: Warn) -> Iterator[np.ndarray]:
    """The samples of the pieces with NaN and infinities replaced by 0, in blocks that are not crumbs."""
    for block in _gathered(block for piece in flow for block in _loaded(piece)):
        finite = np.isfinite(block)
        if not finite.all():
            name = source.file.path.name
            warn(f"{name}: audio samples that are not numbers (NaN, infinite) are taken as silence")
            block = np.where(finite, block, np.float32(0))
        yield block


def _gathered(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples in blocks of at least `_BLOCK` (the last may be shorter)."""
    waiting: list[np.ndarray] = []
    length = 0
    for block in blocks:
        waiting.append(block)
        length += len(block)
        if length >= _BLOCK:
            yield np.concatenate(waiting)
            waiting, length = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _loaded(piece: Piece) -> Iterator[np.ndarray]:
    if piece.load is not None:
        yield piece.load()
        return
    for first in range(0, piece.count, _BLOCK):  # a long gap must not be one array
        yield np.zeros(min(_BLOCK, piece.count - first), np.float32)


def pieces(source: Source, warn: Warn) -> Iterator[Piece]:
    """The range's samples in order; loading a piece is left to whoever needs more than its count."""
    return _plain_pieces(source) if source.with_soundfile else _decoded_pieces(source, warn)


def _open_plain(file: Probe) -> Any:
    """The file in soundfile, or None when libsndfile does not read it."""
    import soundfile

    try:
        return soundfile.SoundFile(str(file.path))
    except (RuntimeError, OSError, ValueError):
        return None


def _plain_pieces(source: Source) -> Iterator[Piece]:
    import soundfile

    with soundfile.SoundFile(str(source.file.path)) as sound:
        first = round(source.start_s * sound.samplerate)
        if first > sound.frames:
            return
        if first > 0:
            sound.seek(first)
        left = source.limit
        while left > 0:
            with source.file.guard.working():
                block = sound.read(int(min(_BLOCK, left)), dtype="float32", always_2d=True)
            if len(block) == 0:
                return
            left -= len(block)
            yield Piece(len(block), partial(block.mean, axis=1, dtype=np.float32))


def _decoded_pieces(source: Source, warn: Warn) -> Iterator[Piece]:
    """Frames placed by their timestamps: gaps become silence, overlaps and what precedes are cut."""
    track, rate, limit = source.track, source.track.rate, source.limit
    name = source.file.path.name
    stated = 0.0 if track.stated_end_s is None else (track.stated_end_s - source.start_s) * rate
    run: list[Any] = []  # frames that make one piece: loading a frame at a time takes longer than decoding
    at = 0  # samples given so far, or waiting
    offset = 0  # added to timestamps, once a clock has restarted
    began = silence = damaged = 0
    for frame, ticks_s in _frames(source):
        if frame is None:
            damaged += 1
            continue
        length = (
            frame.samples
            if frame.sample_rate == rate
            else math.ceil(frame.samples * rate / frame.sample_rate)
        )
        place = at if ticks_s is None else round((ticks_s - source.start_s) * rate) + offset
        if place + length <= 0 and not began:
            continue
        gap = place - at
        if began and abs(gap) <= _DRIFT_S * rate:
            gap = 0
        elif (began and gap < -rate) or (gap > _MAX_GAP_S * rate and at + gap > stated):
            offset, gap = offset - gap, 0
        silence += max(gap, 0) if began else 0
        if gap > 0 and at < limit:
            yield from _joined(run)
            yield Piece(int(min(gap, limit - at)))
            at += gap
        if at >= limit:
            break
        began = 1
        low = min(max(-gap, 0), length)
        high = int(min(length, low + limit - at))
        if high - low == length and frame.sample_rate == rate and _joins(run, frame):
            run.append(frame)
            if len(run) * length >= _BLOCK:  # frames of a file are about as long as each other
                yield from _joined(run)
        elif high > low:
            yield from _joined(run)
            yield Piece(high - low, partial(_frame_mono, frame, rate, low, high))
        at += max(high - low, 0)
    yield from _joined(run)
    if damaged:
        warn(f"{name}: {damaged} damaged audio packet{'s' if damaged > 1 else ''} skipped")
    if silence > rate // 2:
        warn(f"{name}: {silence / rate:.1f} s missing inside the audio track; taken as silence")
    early = source.file.origin_s - track.first_s
    if source.start_s <= source.file.origin_s and early > 0.5:
        warn(f"{name}: {early:.1f} s of audio before the first video frame are not heard")


def _frames(source: Source) -> Iterator[tuple[Any, float | None]]:
    """(frame, its time in s) from a little before the range; (None, None) for a damaged packet."""
    begin, guard = source.start_s - _PREROLL_S, source.file.guard
    with open_container(source.file.path, guard, only=source.track.index) as container:
        stream = stream_of(container, source.track.index)
        flow, tick = packets(container, stream, guard), float(stream.time_base)
        if begin > source.track.first_s and source.file.container in INDEXED:
            ticks = int(begin / stream.time_base)
            first = next(flow, None) if seek(container, stream, ticks) else None
            late = first is None or first.pts is None or first.pts * stream.time_base > source.start_s
            seek(container, stream, (stream.start_time or 0) if late else ticks)
            flow = packets(container, stream, guard)
        for packet in flow:
            frames = decode(packet, guard)
            if frames is None:
                yield None, None
            for frame in frames or ():
                stamp = frame_ticks(frame)
                safe = _readable(frame)
                yield safe, None if stamp is None or safe is None else stamp * tick


def _readable(frame: Any) -> Any:
    """The frame in a form that `to_ndarray` may read, None if there is none.

    PyAV (18.1) finds a planar frame's channels by a null pointer that FFmpeg does not promise: from 8
    channels (7.1) on it reads wild memory and the process dies. Interleaved samples are one plane and safe.
    """
    if not frame.format.is_planar or frame.layout.nb_channels < _MAX_PLANES:
        return frame
    try:
        interleaved = av.AudioResampler(format="flt").resample(frame)
    except (av.FFmpegError, ValueError):
        return None
    return interleaved[0] if interleaved and interleaved[0].samples == frame.samples else None


def _joins(run: list[Any], frame: Any) -> bool:
    """Whether a frame may be loaded together with those before it."""
    if frame.format.name != "fltp":
        return False
    return not run or frame.layout.nb_channels == run[0].layout.nb_channels


def _joined(run: list[Any]) -> Iterator[Piece]:
    """The piece that frames make, which are taken out of the list; none without frames."""
    if run:
        frames = tuple(run)
        run.clear()
        yield Piece(sum(frame.samples for frame in frames), partial(_frames_mono, frames))


def _frames_mono(frames: Sequence[Any]) -> np.ndarray:
    """What `_frame_mono` makes of each, one after the other."""
    each = zip(*map(_channels, frames), strict=True)
    return _mean([np.concatenate(channel) for channel in each])


def _mean(channels: Sequence[np.ndarray]) -> np.ndarray:
    """np.mean's value without its overhead, which is most of the time on frames of 1024 samples."""
    mean: np.ndarray = reduce(np.add, channels) / np.float32(len(channels))
    return mean


def _frame_mono(frame: Any, rate: int, low: int, high: int) -> np.ndarray:
    """Samples low to high of a decoded frame: (n,) float32 in [-1, 1], mean of the channels, at `rate`."""
    mono = _mean(_channels(frame))
    if frame.sample_rate != rate:  # a broadcast may change its rate midway
        import soxr

        mono = _exactly(
            soxr.resample(mono, frame.sample_rate, rate), math.ceil(len(mono) * rate / frame.sample_rate)
        )
    return mono[low:high]


def _channels(frame: Any) -> Sequence[np.ndarray]:
    """(samples,) float32 in [-1, 1] of each channel; for the format of most codecs views, since frames are
    small and `to_ndarray` costs more than decoding them."""
    if frame.format.name == "fltp":
        return [np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes]
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / np.float32(2 ** (8 * samples.dtype.itemsize - 1))
    return list(samples.astype(np.float32, copy=False))


def _exactly(samples: np.ndarray, count: int) -> np.ndarray:
    """The samples cut, or padded with zeros, to `count`."""
    if len(samples) >= count:
        return samples[:count]
    return np.concatenate([samples, np.zeros(count - len(samples), np.float32)])
