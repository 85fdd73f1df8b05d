"""A clip that another process decodes: it takes none of this one's time, and a file that kills or hangs its
decoder costs that process only.

`DecoderProcess.open` stands in for `open_clip`, and what it gives for `Clip`. Frames and samples come through
shared memory (`ring`), everything else over pipes. `worker` is the other side.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import fields, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import MediaError, MediaLimit, SeatsError, UsageError
from .limits import Limits
from .nvdec import ON_CPU, VideoDecoding
from .probe import Warn
from .ring import Lender, new_memory, slots_for
from .sampling import Sampling
from .video import MediaWindow
from .worker import Beat, Facts

AVAILABLE = os.name == "posix"  # memory is handed over as a file descriptor
_SLICE_S = 0.5  # how often a wait looks whether the other side is still at work
_START_S = 120.0  # for a process to start
_GRACE_S = 5.0  # for one that was killed to be gone
_HERE = "--readers 0 decodes in the process that answers"
_START = "import sys; sys.path[:] = {path!r}; from seats_cli.media.worker import main; main({handles})"


class DecoderProcess:
    """Opens clips, one at a time, in a process of its own that lives on for the next; a context manager.

    The process starts at once and is ready some tenths of a second later. One that has died is replaced when
    the next clip is opened. Raises UsageError where the system has no such processes.
    """

    def __init__(self, *, threads: int = 0) -> None:
        """`threads`: that decode on the CPU; 0: one a core."""
        if not AVAILABLE:
            raise UsageError(f"decoding in processes does not work on {sys.platform}", hint="--readers 0")
        self._process: _Process | None = _Process()
        self._threads = threads
        self._open: ProcessClip | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process; None after `close`."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Ends the process, in the middle of a clip if need be."""
        if self._process is not None:
            self._process.kill()
        self._process = None

    def open(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling | None = None,
        *,
        warn: Warn,
        decoding: VideoDecoding = ON_CPU,
        limits: Limits | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> ProcessClip:
        """`open_clip` in the process: the same clip, the same warnings, the same errors, and two more:
        MediaError where the process dies of the file, MediaLimit where it gets no further for
        `limits.stall_s`. `check`: see `DistantOpener`. Closes the clip before."""
        if self._process is None:
            raise ValueError("the decoder is closed")
        if self._open is not None:
            self._open.close()
        if not self._process.alive:
            self._process.kill()
            self._process = _Process()
        limits = limits or Limits()
        folder = None if os.path.isabs(path) else os.getcwd()
        desk = _Desk(self._process, os.fspath(path), limits.stall_s, check)
        decoding = replace(decoding, threads=decoding.threads or self._threads)
        facts = desk.ask("open", warn, folder, desk.path, sampling or Sampling(), decoding, limits)
        self._open = ProcessClip(desk, facts, warn)
        return self._open


class ProcessClip:
    """What `Clip` is, of a file that a `DecoderProcess` has open.

    Frames and samples lie in memory that both processes see for as long as somebody holds them. One stream of
    frames and one of samples can be read at a time; beginning another ends the one before.
    """

    def __init__(self, desk: _Desk, facts: Facts, warn: Warn) -> None:
        self.info = facts.info
        self.frame_times_s, self.sample_fps = facts.frame_times_s, facts.sample_fps
        self.n_samples, self.readable_fraction = facts.n_samples, facts.readable_fraction
        self.frame_bytes = facts.frame_bytes
        self.video_used, self.audio_used = facts.video_used, facts.audio_used
        self.frames_replaced = 0
        self.video_decoder = self.decoder_used = ""
        self._desk: _Desk | None = desk
        self._warn = warn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every stream still being read, and frees the file."""
        desk, self._desk = self._desk, None
        if desk is not None:
            desk.close()

    def video_windows(self, frames_per_window: int) -> Iterator[MediaWindow]:
        """As `Clip.video_windows`."""
        if frames_per_window < 1:
            raise ValueError(f"frames_per_window is {frames_per_window}; it must be at least 1")
        return self._windows(self._opened(), frames_per_window)

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]:
        """As `Clip.audio_blocks`."""
        if samples_per_block < 1:
            raise ValueError(f"samples_per_block is {samples_per_block}; it must be at least 1")
        return self._blocks(self._opened(), samples_per_block)

    def image(self) -> np.ndarray:
        """As `Clip.image`."""
        return self._opened().ask("image", self._warn)

    def _opened(self) -> _Desk:
        if self._desk is None:
            raise ValueError(f"{self.info.path}: the clip is closed")
        return self._desk

    def _windows(self, desk: _Desk, frames_per_window: int) -> Generator[MediaWindow, None, None]:
        self.frames_replaced = 0
        n_frames = len(self.frame_times_s)
        if not n_frames:
            return
        at_once = min(frames_per_window, n_frames)
        slot_bytes = at_once * self.frame_bytes
        stream = desk.process.video.stream(desk, frames_per_window, slot_bytes, self._warn)
        with closing(stream):
            for frames, (index, start_s, times_s, progress) in stream:
                for field in fields(progress):
                    setattr(self, field.name, getattr(progress, field.name))
                yield MediaWindow(index, start_s, frames, times_s)

    def _blocks(self, desk: _Desk, samples_per_block: int) -> Generator[np.ndarray, None, None]:
        if self.n_samples:
            slot_bytes = 4 * min(samples_per_block, self.n_samples)
            stream = desk.process.audio.stream(desk, samples_per_block, slot_bytes, self._warn)
            with closing(stream):
                for block, _ in stream:
                    yield block


class _Desk:
    """One opened file's side of a process."""

    def __init__(
        self, process: _Process, path: str, stall_s: float | None, check: Callable[[], None]
    ) -> None:
        self.process, self.path, self.stall_s, self.check = process, path, stall_s, check

    def ask(self, command: str, warn: Warn, *values: Any) -> Any:
        """What a command gives. Raises what it raises there."""
        try:
            self.process.wait_until_ready(self)
            self.process.send(self.process.commands, (command, *values), self)
            while (message := self.process.receive(self.process.commands, self))[0] == "warn":
                warn(message[1])
        except BaseException:  # an answer that comes later must not be taken for the next one
            self.process.kill()
            raise
        if message[0] == "error":
            raise message[1]
        return message[1]

    def close(self) -> None:
        """Ends the streams, and has the file closed."""
        self.process.video.stop()
        self.process.audio.stop()
        with suppress(OSError):
            self.process.commands.send(("close",))


class _Process:
    """The process, its pipes, and what it died of."""

    def __init__(self) -> None:
        links = [Pipe() for _ in range(3)]
        beat = new_memory(mmap.PAGESIZE)
        handles = [there.fileno() for _, there in links] + [beat]
        program = _START.format(path=sys.path, handles=", ".join(map(str, handles)))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for this process alone
            )
            self._beat = Beat(beat)
        finally:
            os.close(beat)
            for _, there in links:
                there.close()  # so that its death closes the pipes
        self.commands = links[0][0]
        self.video, self.audio = _Lane(links[1][0]), _Lane(links[2][0])
        self._ready = False
        self._fate: str | None = None  # why this process has killed it, if the file is to blame

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it, if it has not ended, and waits for that."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)

    def wait_until_ready(self, desk: _Desk) -> None:
        """Waits for the end of its imports, which give no sign of life."""
        if not self._ready:
            until = time.monotonic() + _START_S
            while not self.commands.poll(_SLICE_S):
                desk.check()
                if time.monotonic() > until:
                    raise SeatsError(f"no decoder process has started within {_START_S:g} s", hint=_HERE)
            with _told_of_death(self, desk):
                self.commands.recv()
            self._ready = True

    def send(self, link: Connection, message: Any, desk: _Desk) -> None:
        """Raises `death` where nobody is there."""
        with _told_of_death(self, desk):
            link.send(message)

    def receive(self, link: Connection, desk: _Desk) -> Any:
        """The next message. Raises `death` where none can come, or for too long nothing has moved."""
        slice_s = _SLICE_S if desk.stall_s is None else min(_SLICE_S, desk.stall_s)
        waited_s, seen = 0.0, self._beat.count
        with _told_of_death(self, desk):
            while not link.poll(slice_s):
                desk.check()
                waited_s += slice_s  # and no clock, which goes on while a stopped process does not
                if self._beat.count != seen:
                    waited_s, seen = 0.0, self._beat.count
                elif desk.stall_s is not None and waited_s >= desk.stall_s:
                    self._fate = f"{desk.path}: the decoder got no further for {desk.stall_s:g} s"
                    self.kill()
                    raise self.death(desk)
            return link.recv()

    def death(self, desk: _Desk) -> SeatsError:
        """What its end means for the file that it had open."""
        if self._fate is not None:
            return MediaLimit(self._fate, hint="leave the file out, or give it longer: --limits stall=...")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        code = self._process.poll()
        if not self._ready:
            return SeatsError(f"the decoder process does not start (exit code {code})", hint=_HERE)
        how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
        return MediaError(
            f"{desk.path}: the decoder crashed on it{how}",
            hint="leave the file out or convert it; if others fail too, memory may have run out",
        )


@contextmanager
def _told_of_death(process: _Process, desk: _Desk) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise process.death(desk) from None


def _shared(slots: int, slot_bytes: int) -> tuple[int, Lender]:
    """New memory for a ring: a descriptor to hand over, and this side of it."""
    try:
        new = new_memory(slots * slot_bytes)
    except OSError as error:
        raise _no_memory(slots * slot_bytes, error) from None
    try:
        return new, Lender(os.dup(new), slots, slot_bytes)
    except OSError as error:
        os.close(new)
        raise _no_memory(slots * slot_bytes, error) from None


def _no_memory(n_bytes: int, error: OSError) -> SeatsError:
    return SeatsError(
        f"no memory to share with a decoder, {n_bytes:,} bytes: {error.strerror}",
        hint="fewer --readers, or more open files (ulimit -n) or shared memory",
    )


class _Lane:
    """The streams of one kind, one at a time."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._speaking = threading.Lock()  # a stream is ended by whoever closes the clip
        self._ring: Lender | None = None
        self._number = 0  # of the stream that was begun last
        self._running = False

    def stream(
        self, desk: _Desk, size: int, slot_bytes: int, warn: Warn
    ) -> Generator[tuple[np.ndarray, Any], None, None]:
        """(array, what else there is to it), in slots of at least `slot_bytes`. Raises what the reading
        raises in the process."""
        number = self._begin(desk, size, slot_bytes)
        try:
            while True:
                self._check(desk, number)
                message = self._next(desk)
                self._check(desk, number)
                if message[0] == "item":
                    assert self._ring is not None  # `_begin` has made it
                    _, slot, shape, dtype, rest = message
                    yield self._ring.take(slot, shape, dtype), rest
                elif message[0] == "warn":
                    warn(message[1])
                else:
                    self._running = False
                    if message[0] == "error":
                        raise message[1]
                    return
        finally:
            if number == self._number:
                self.stop()

    def _check(self, desk: _Desk, number: int) -> None:
        if number != self._number or not self._running:
            raise ValueError(f"{desk.path}: the stream was ended by another, or with its clip")

    def stop(self) -> None:
        """The stream's rest is not wanted."""
        if self._running:
            self._running = False
            with suppress(OSError):
                self._say("stop")

    def _begin(self, desk: _Desk, size: int, slot_bytes: int) -> int:
        self.stop()
        slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        shape = (slots_for(slot_bytes), slot_bytes)
        new, ring = None, self._ring
        if ring is None or (ring.slots, ring.slot_bytes) != shape:
            new, ring = _shared(*shape)
        self._number += 1
        self._running = True
        try:
            with _told_of_death(desk.process, desk):
                self._say("begin", size, None if new is None else shape)
                if new is not None:
                    send_handle(self._link, new, desk.process.pid)
            while (message := desk.process.receive(self._link, desk))[0] != "began":  # what is left of others
                if message[0] == "item" and ring is self._ring:
                    ring.skip(message[1])
        except BaseException:  # a stream that begins later must not be taken for the next one
            desk.process.kill()
            raise
        finally:
            if new is not None:
                os.close(new)
        self._ring = ring
        return self._number

    def _next(self, desk: _Desk) -> Any:
        """The next message, after the slots that are free again are given back."""
        assert self._ring is not None  # `_begin` has made it
        if slots := self._ring.returned():
            with _told_of_death(desk.process, desk):
                self._say("free", slots)
        return desk.process.receive(self._link, desk)

    def _say(self, *message: Any) -> None:
        with self._speaking:
            self._link.send(message)
