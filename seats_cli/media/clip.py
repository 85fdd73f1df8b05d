"""A file becomes a `Clip`: what it holds, which frames are read, and streams of pixels and samples."""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MediaFormat, MediaRange
from . import audio as audio_track
from . import image as image_file
from . import video as video_track
from .audio import AudioScan
from .index import VideoIndex
from .index import scan as scan_video
from .limits import Limits
from .nvdec import ON_CPU, VideoDecoding
from .probe import Kind, Probe, Track, Warn, probe
from .sampling import Sampling, frame_indices, frame_indices_by_time, is_variable_rate
from .video import FrameReader, MediaWindow, Place

_TRUNCATED_BY_S = 1.0  # a track ending this much (or 2%) before its stated end was cut off


@dataclass(frozen=True)
class MediaInfo:
    """What a clip is. `duration_s`, `native_frames` are of the asked range; sizes upright, 0 without video.

    `rotation` is what was applied, in degrees counterclockwise; `audio_rate` in Hz; codecs are FFmpeg's
    names.
    """

    path: str
    kind: Kind
    size_bytes: int
    container: str
    duration_s: float
    has_video: bool
    has_audio: bool
    width: int = 0
    height: int = 0
    rotation: int = 0
    native_fps: float = 0.0
    native_frames: int = 0
    variable_rate: bool = False
    audio_rate: int = 0
    audio_channels: int = 0
    video_codec: str = ""
    audio_codec: str = ""


@dataclass(frozen=True)
class _Frames:
    """The frames to read: their rows in the index, and times (n,) float64 relative to the range's start."""

    index: VideoIndex
    rows: np.ndarray
    times_s: np.ndarray
    sample_fps: float
    native_fps: float
    native_frames: int
    variable_rate: bool
    end_s: float


def open_clip(
    path: str | os.PathLike[str],
    sampling: Sampling | None = None,
    *,
    warn: Warn | None = None,
    decoding: VideoDecoding = ON_CPU,
    limits: Limits | None = None,
    beat: Callable[[], None] | None = None,
) -> Clip:
    """Opens a local video, audio or image file for reading; see `Clip`.

    Packet headers of the asked range are read, and its audio decoded once, so that counts are exact before
    any picture is decoded. `warn` is called with a line for people whenever the file does not give all it
    promised; without it, lines go to stderr. `decoding` says where frames are decoded, which changes none.
    Raises kinds of `MediaError`: missing, format, encrypted, truncated, range, and limit for a file that
    would cost more than `limits` allow, generous by default. `beat` is called after each step of
    FFmpeg.
    """
    sampling = sampling or Sampling()
    said = _Once(warn or _to_stderr)
    file = probe(path, said, limits, beat)
    return Clip(file, sampling, said, decoding)


class Clip:
    """A file opened for one range and sampling; a context manager.

    Known on opening: `info`, `frame_times_s` (n,) float64 seconds of the frames that will be read, relative
    to the range's start; `sample_fps` the true sampled rate; `n_samples` the exact number of 16 kHz mono
    samples, 0 without audio; `frame_bytes` of one frame as it is read, 0 without video;
    `video_used` and `audio_used` in words; `readable_fraction` the part of the
    asked range that is there (less than 1 for a truncated file). Time zero of both tracks is the first video
    frame (the first sample without video), or `sampling.start_s` after it. Streams may be read several times,
    and both at once from two threads.
    """

    def __init__(self, file: Probe, sampling: Sampling, warn: Warn, decoding: VideoDecoding = ON_CPU) -> None:
        self._file, self._warn, self._decoding = file, warn, decoding
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False
        self.frames_replaced = 0  # sampled frames that did not decode in the last run of `video_windows`
        self.video_decoder = self.decoder_used = ""  # of that run: cpu, nvdec or nvdec+cpu; the same in words
        self._frames: _Frames | None = None
        self._audio: AudioScan | None = None
        self.readable_fraction = 1.0
        if file.kind == "image":
            self.info = self._image_info(sampling)
        else:
            self._read_range(sampling)
        frames, audio = self._frames, self._audio
        self.frame_times_s = np.zeros(0) if frames is None else frames.times_s
        self.sample_fps = 0.0 if frames is None else frames.sample_fps
        self.n_samples = 0 if audio is None else audio.samples
        self.frame_bytes = 0 if frames is None else 3 * self.info.height * self.info.width
        self.video_used, self.audio_used = self._video_words(), self._audio_words()

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every stream still being read and frees its file handle."""
        self._closed = True
        for stream in list(self._open):
            with suppress(ValueError):  # another thread is inside it; it ends when that thread drops it
                stream.close()

    def video_windows(self, frames_per_window: int, *, place: Place | None = None) -> Iterator[MediaWindow]:
        """The sampled frames in time order, `frames_per_window` at a time (the last may be fewer).

        Pixels of one window are held at a time, in memory that `place` gives, its own by default. A frame
        that does not decode is replaced by the nearest that does, with a warning, so that the counts known on
        opening hold; `frames_replaced` says how many.
        """
        if frames_per_window < 1:
            raise ValueError(f"frames_per_window is {frames_per_window}; it must be at least 1")
        return self._tracked(self._video_windows(frames_per_window, place))

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]:
        """The range's audio as blocks (<=samples_per_block,) float32 of 16 kHz mono; `n_samples` in all."""
        if samples_per_block < 1:
            raise ValueError(f"samples_per_block is {samples_per_block}; it must be at least 1")
        return self._tracked(self._audio_blocks(samples_per_block))

    def image(self) -> np.ndarray:
        """The picture (H,W,3) uint8 RGB, upright at native size; `MediaFormat` if the file is no image."""
        if self._file.kind != "image" or self._file.video is None:
            raise MediaFormat(
                f"{self._file.path}: is {self._file.kind}, not an image", hint="read its windows"
            )
        return image_file.read_image(self._file, self._file.video)

    def _video_windows(
        self, frames_per_window: int, place: Place | None
    ) -> Generator[MediaWindow, None, None]:
        self.frames_replaced = 0
        if self._frames is None or self._file.video is None:
            return
        frames = self._frames
        with FrameReader(self._file, self._file.video, frames.index, self._decoding, frames.rows) as reader:
            for window in video_track.windows(
                reader, frames.rows, frames.times_s, frames_per_window, self._warn, place
            ):
                self.frames_replaced = len(reader.replaced)
                self._say_decoder(reader)
                yield window

    def _say_decoder(self, reader: FrameReader) -> None:
        by_gpu, by_cpu = reader.read_on_gpu > 0, reader.gpu is None
        self.video_decoder = "+".join(name for name, used in (("nvdec", by_gpu), ("cpu", by_cpu)) if used)
        where = (
            f"GPU {reader.gpu}" if not by_cpu else "the CPU, after a part on the GPU" if by_gpu else "the CPU"
        )
        self.decoder_used = f"video decoded on {where}: {reader.reason}"
        if by_cpu and self._decoding.gpu is not None and self._decoding.insisted:
            self._warn(f"{self._file.path.name}: {self.decoder_used}")

    def _audio_blocks(self, samples_per_block: int) -> Generator[np.ndarray, None, None]:
        if self._audio is not None:
            yield from audio_track.blocks(self._audio, samples_per_block, self._warn)

    def _tracked(self, stream: Generator[Any, None, None]) -> Iterator[Any]:
        if self._closed:
            raise ValueError(f"{self._file.path}: the clip is closed")
        self._open.add(stream)
        return stream

    def _read_range(self, sampling: Sampling) -> None:
        """Scans both tracks over the asked range and decides what is read; sets `info`."""
        file = self._file
        start = file.origin_s + (sampling.start_s or 0.0)
        end = None if sampling.end_s is None else file.origin_s + sampling.end_s
        stated = file.stated_end_s if end is None else end
        if stated is not None:
            file.guard.duration(stated - start)
        ends = []
        if file.audio is not None:
            found = audio_track.scan(file, file.audio, start, end, self._warn)
            if found.samples:
                self._audio = found
                ends.append(("audio", file.audio, start + found.seconds))
        index = None
        if file.video is not None:
            index = scan_video(file, file.video, start, end)
            self._frames = self._choose_frames(index, file.video, start, end, sampling)
            if self._frames is not None:
                ends.append(("video", file.video, self._frames.end_s))
        if not ends:
            raise self._nothing_in_range(sampling, index)
        self._check_truncated(ends, start, end)
        last = max(moment for _, _, moment in ends)
        asked = last if end is None else min(end, last)
        if end is not None and last < end - _TRUNCATED_BY_S and self.readable_fraction == 1.0:
            self._warn(
                f"{file.path.name}: ends at {last - file.origin_s:.1f} s, before the asked end of "
                f"{sampling.end_s:g} s; read to its end"
            )
        self.info = self._info(max(asked - start, 0.0))

    def _choose_frames(
        self, index: VideoIndex, track: Track, start: float, end: float | None, sampling: Sampling
    ) -> _Frames | None:
        """The frames of the range to read; None (with a warning) when only the audio can be used."""
        name, tick = self._file.path.name, float(index.time_base)
        times = index.ticks * tick
        inside = (times >= start - tick) & (times <= (math.inf if end is None else end + tick))
        first = int(np.argmax(inside)) if inside.any() else int(np.searchsorted(times, start))
        usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        late = not inside.any() or times[first] > start + 1.5 * usual
        if late and first > 0 and start <= index.end_s:  # the frame on screen when the range begins
            inside[first - 1] = True
        rows = np.flatnonzero(inside)
        if len(rows) < 2 and self._audio is not None:
            what = "has a single frame" if len(rows) else "has no frames there"
            self._warn(f"{name}: the video track {what}; only the audio is used")
            return None
        if len(rows) == 0:
            return None
        shown = np.maximum(times[rows], start)
        until = index.end_s if end is None else min(index.end_s, end)
        fps = track.average_fps or 25.0
        if len(times) > 1:  # the stated rate is the exact one, unless it is plainly not what was recorded
            measured = (len(times) - 1) / (times[-1] - times[0])
            fps = fps if abs(fps / measured - 1) < 0.02 else measured
        variable = is_variable_rate(times[rows], tick)
        try:
            if variable:
                picked, sample_fps = frame_indices_by_time(shown, max(until - shown[0], tick), sampling)
            else:
                first = int(rows[0])  # float32 rounding depends on the frame's number in the file
                numbers, sample_fps = frame_indices(len(rows), fps, sampling, first)
                picked = numbers - first
        except MediaRange as error:
            raise MediaRange(f"{self._file.path}: {error.message}", hint=error.hint) from None
        return _Frames(
            index, rows[picked], shown[picked] - start, sample_fps, fps, len(rows), variable, until
        )

    def _check_truncated(self, ends: list[tuple[str, Track, float]], start: float, end: float | None) -> None:
        """Warns when a track stops before its header says; sets `readable_fraction`."""
        short: dict[str, tuple[float, float]] = {}
        for kind, track, got in ends:
            stated = track.stated_end_s
            if stated is None and got == max(moment for _, _, moment in ends):
                stated = self._file.stated_end_s
            due = min(stated if stated is not None else got, math.inf if end is None else end)
            if got < due - max(_TRUNCATED_BY_S, 0.02 * (due - start)):
                short[kind] = (got - self._file.origin_s, due - self._file.origin_s)
                self.readable_fraction = min(self.readable_fraction, max(got - start, 0.0) / (due - start))
        if short:
            got_s, due_s = min(short.values())
            what = "" if len(short) == len(ends) else f" of the {next(iter(short))}"
            self._warn(
                f"{self._file.path.name}: only the first {got_s:.1f} of {due_s:.1f} s{what} can be read; "
                "the file looks truncated"
            )

    def _nothing_in_range(self, sampling: Sampling, index: VideoIndex | None) -> MediaRange:
        file = self._file
        length = file.about_s
        if index is not None and index.from_start and len(index.ticks):
            length = index.end_s - file.origin_s
        if sampling.start_s is None and sampling.end_s is None:
            return MediaRange(
                f"{file.path}: holds no frames and no samples", hint="check that the file plays"
            )
        asked = f"{sampling.start_s or 0.0:g} s to " + (
            "the end" if sampling.end_s is None else f"{sampling.end_s:g} s"
        )
        known = "" if length is None else f"; the clip lasts {length:.1f} s"
        return MediaRange(
            f"{file.path}: nothing in the range {asked}{known}", hint="ask about a range inside the clip"
        )

    def _image_info(self, sampling: Sampling) -> MediaInfo:
        file, track = self._file, self._file.video
        assert track is not None  # an image is a video track of one picture
        turns, _ = image_file.orientation(file, track)
        if sampling.start_s is not None or sampling.end_s is not None:
            self._warn(f"{file.path.name}: is an image; the range is ignored")
        if image_file.is_animated(file, track):
            self._warn(f"{file.path.name}: is an animation; only its first picture is looked at")
        width, height = (track.height, track.width) if turns % 2 else (track.width, track.height)
        return MediaInfo(
            path=str(file.path),
            kind="image",
            size_bytes=file.size_bytes,
            container=file.container,
            duration_s=0.0,
            has_video=False,
            has_audio=False,
            width=width,
            height=height,
            rotation=90 * turns,
            video_codec=track.codec,
        )

    def _info(self, duration_s: float) -> MediaInfo:
        file, frames, audio = self._file, self._frames, self._audio
        tracks: dict[str, Any] = {}
        if frames is not None and (track := file.video) is not None:
            turned = track.rotation % 180 == 90
            tracks = {
                "width": track.height if turned else track.width,
                "height": track.width if turned else track.height,
                "rotation": track.rotation,
                "native_fps": frames.native_fps,
                "native_frames": frames.native_frames,
                "variable_rate": frames.variable_rate,
                "video_codec": track.codec,
            }
        if audio is not None and file.audio is not None:
            tracks |= {
                "audio_rate": audio.source.track.rate,
                "audio_channels": file.audio.channels,
                "audio_codec": file.audio.codec,
            }
        return MediaInfo(
            path=str(file.path),
            kind="audio" if frames is None else "video",
            size_bytes=file.size_bytes,
            container=file.container,
            duration_s=duration_s,
            has_video=frames is not None,
            has_audio=audio is not None,
            **tracks,
        )

    def _video_words(self) -> str:
        info = self.info
        if info.kind == "image":
            return f"image: {info.video_codec} {info.width}x{info.height}"
        if self._frames is None or self._file.video is None:
            return "video: none in file" if self._file.video is None else "video: none in the range"
        turned = f" turned {info.rotation} degrees" if info.rotation else ""
        rate = f"{info.native_fps:.4g} fps" + (" (variable)" if info.variable_rate else "")
        track = f", {self._file.video.words}" if self._file.video.words else ""
        return (
            f"video: {info.video_codec} {info.width}x{info.height}{turned} at {rate}, "
            f"{len(self.frame_times_s)} of {info.native_frames} frames{track}"
        )

    def _audio_words(self) -> str:
        info, track = self.info, self._file.audio
        if self._audio is None or track is None:
            return "audio: none in file" if track is None else "audio: none in the range"
        channels = {1: "mono", 2: "stereo"}.get(info.audio_channels, f"{info.audio_channels} channels")
        words = f", {track.words}" if track.words else ""
        seconds = self.n_samples / audio_track.SAMPLE_RATE
        return f"audio: {info.audio_codec} {info.audio_rate} Hz {channels}, {seconds:.1f} s{words}"


class _Once:
    """Passes each line on once: streams may be read again and would repeat themselves."""

    def __init__(self, warn: Warn) -> None:
        self._warn, self._said = warn, set[str]()

    def __call__(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._warn(line)


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")
