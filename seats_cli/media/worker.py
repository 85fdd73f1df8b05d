"""The process that decodes: opens a clip at a time, fills shared slots with its windows and samples.

Started by `process.DecoderProcess`, whose death it notices by the end of the pipe for commands. A thread each
serves commands, frames and samples, so that the last two stream at once. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..errors import SeatsError, unexpected
from . import nvdec
from .clip import Clip, MediaInfo, open_clip
from .limits import Limits
from .nvdec import VideoDecoding
from .ring import Filler
from .sampling import Sampling

Place = Callable[[tuple[int, ...], Any], np.ndarray]


@dataclass(frozen=True)
class Facts:
    """What is known of a clip on opening; see `Clip`."""

    info: MediaInfo
    frame_times_s: np.ndarray
    sample_fps: float
    n_samples: int
    frame_bytes: int
    video_used: str
    audio_used: str
    readable_fraction: float

    @classmethod
    def of(cls, clip: Clip) -> Facts:
        """A clip's."""
        return cls(**{field.name: getattr(clip, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Progress:
    """What is known of a clip's frames while they are read; see `Clip`."""

    frames_replaced: int = 0
    video_decoder: str = ""
    decoder_used: str = ""

    @classmethod
    def of(cls, clip: Clip) -> Progress:
        """A clip's."""
        return cls(**{field.name: getattr(clip, field.name) for field in fields(cls)})


class Beat:
    """A number that two processes share: the one that works raises it, the one that waits watches it."""

    def __init__(self, handle: int) -> None:
        """Maps memory of at least eight bytes."""
        self._count = memoryview(mmap.mmap(handle, 8)).cast("Q")

    def __call__(self) -> None:
        self._count[0] += 1

    @property
    def count(self) -> int:
        """The number."""
        return self._count[0]


class _Stopped(Exception):
    """Nobody wants the rest of a stream."""


def main(commands: int, video: int, audio: int, beat: int) -> None:
    """Serve what comes over the pipes of these descriptors until they close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    link = Connection(commands)
    todo: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    desk = _Desk(link, Beat(beat))
    for work in (
        lambda: desk.serve(todo),
        _Streams(Connection(video), desk, _windows).serve,
        _Streams(Connection(audio), desk, _blocks).serve,
    ):
        threading.Thread(target=_to_the_end, args=(work,), daemon=True).start()
    try:
        link.send(("ready",))
        while True:
            todo.put(link.recv())
    except (EOFError, OSError):  # the parent is gone, or has done with this process
        os._exit(0)


def _to_the_end(work: Callable[[], None]) -> None:
    """Whatever ends a thread ends the process, or the parent would wait for it."""
    try:
        work()
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _told(error: Exception) -> SeatsError:
    """An error as it travels."""
    shown = error if isinstance(error, SeatsError) else unexpected(error)
    shown.add_note(traceback.format_exc())  # for --debug
    shown.__cause__ = None
    return shown


class _Desk:
    """The clip that is open. `here.warn`, of each thread, tells whoever waits for it what is lost."""

    def __init__(self, link: Connection, beat: Beat) -> None:
        self.clip: Clip | None = None
        self.here = threading.local()
        self._link, self._beat = link, beat

    def serve(self, todo: queue.SimpleQueue[tuple[Any, ...]]) -> None:
        """Do commands as they come."""
        self.here.warn = lambda line: self._link.send(("warn", line))
        while True:
            name, *values = todo.get()
            try:
                answer = getattr(self, f"_{name}")(*values)
            except Exception as error:
                answer = ("error", _told(error))
            if answer is not None:
                self._link.send(answer)

    def _open(
        self, folder: str | None, path: str, sampling: Sampling, decoding: VideoDecoding, limits: Limits
    ) -> tuple[Any, ...]:
        self._close()
        if folder is not None:
            os.chdir(folder)  # the parent's, to which the path refers
        self.clip = open_clip(
            path,
            sampling,
            warn=lambda line: self.here.warn(line),
            decoding=decoding,
            limits=limits,
            beat=self._beat,
        )
        if decoding.gpu is not None and self.clip.frame_bytes:
            nvdec.hold(decoding.gpu)
        return "opened", Facts.of(self.clip)

    def _image(self) -> tuple[Any, ...]:
        assert self.clip is not None  # the parent has opened one
        return "image", self.clip.image()

    def _close(self) -> None:
        if self.clip is not None:
            self.clip.close()
        self.clip = None


Make = Callable[[Clip, int, Place], Generator[tuple[np.ndarray, Any], None, None]]


def _windows(clip: Clip, size: int, place: Place) -> Generator[tuple[np.ndarray, Any], None, None]:
    """(frames in their slot, what else a window says)."""
    for window in clip.video_windows(size, place=lambda shape: place(shape, np.uint8)):
        assert window.frames is not None
        yield window.frames, (window.index, window.start_s, window.frame_times_s, Progress.of(clip))


def _blocks(clip: Clip, size: int, place: Place) -> Generator[tuple[np.ndarray, Any], None, None]:
    """(samples in their slot, nothing)."""
    for block in clip.audio_blocks(size):
        slot = place(block.shape, block.dtype)
        slot[:] = block
        yield slot, None


class _Streams:
    """One stream at a time of a kind, as the parent begins and stops them."""

    def __init__(self, link: Connection, desk: _Desk, make: Make) -> None:
        self._link, self._desk, self._make = link, desk, make
        self._ring: Filler | None = None
        self._slot: int | None = None  # that is being filled

    def serve(self) -> None:
        """Streams until the pipe closes."""
        self._desk.here.warn = lambda line: self._link.send(("warn", line))
        while True:
            message = self._link.recv()
            while message is not None and message[0] == "begin":
                message = self._stream(*message[1:])
            if message is not None:
                self._take_back(message)

    def _stream(self, size: int, ring: tuple[int, int] | None) -> tuple[Any, ...] | None:
        """One stream to its end; what to do next if the parent has said it already."""
        if ring is not None:
            self._ring = Filler.received(*ring, self._link)
        self._link.send(("began",))
        clip = self._desk.clip
        following = None
        try:
            if clip is None:
                raise ValueError("no clip is open")
            with closing(self._make(clip, size, self._place)) as items:
                for array, rest in items:
                    self._link.send(("item", self._slot, array.shape, array.dtype.str, rest))
                    self._slot = None
                    self._hear(wait=False)
            self._link.send(("end",))
        except _Stopped as stop:
            following = stop.args[0]
            self._link.send(("end",))  # somebody may still wait
        except Exception as error:
            self._link.send(("error", _told(error)))
        finally:
            if self._slot is not None and self._ring is not None:  # taken and not sent
                self._ring.free.append(self._slot)
            self._slot = None
        return following

    def _place(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The next free slot as an array; waits for one."""
        ring = self._ring
        assert ring is not None  # a stream that has one to fill came with a ring, or goes on with the last
        while not ring.free:
            self._hear(wait=True)
        self._slot = ring.free.popleft()
        return ring.array(self._slot, shape, dtype)

    def _hear(self, *, wait: bool) -> None:
        """What the parent has said: slots that are free again, or that it wants no more of this stream."""
        while wait or self._link.poll():
            message = self._link.recv()
            if message[0] == "begin":
                raise _Stopped(message)
            self._take_back(message)
            if message[0] == "stop":
                raise _Stopped(None)
            wait = False

    def _take_back(self, message: tuple[Any, ...]) -> None:
        if message[0] == "free":
            assert self._ring is not None  # they are this ring's
            self._ring.free.extend(message[1])
