"""The clips after the one in hand are opened, decoded, resized and encoded meanwhile, by threads."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from types import TracebackType
from typing import TYPE_CHECKING, Self

from seats_cli.batch.records import Asking
from seats_cli.batch.sources import Item
from seats_cli.batch.streams import Launched, own_stream, take_over
from seats_cli.errors import DeviceError
from seats_cli.media import DistantOpener

if TYPE_CHECKING:
    from seats_cli.session import ReadClip, Session

Clip = tuple[Item, ...]  # questions about one part of one file: one reading serves them all
JOIN_S = 10.0  # how long threads may take to notice that they are to end
_LOOK_S = 0.2  # how often one that waits looks whether it is to end
_WELL = 32  # clips read without want of memory before one more is read at once


@dataclass(frozen=True)
class Listener:
    """Where a run tells what happens while it does; called from every thread that reads, and from those that
    prefill and decode.

    stage: (path, stage, done, total), of clips that are read and of those that are answered
    warn:  a loss, and the file that it is about
    """

    stage: Callable[[str, str, int, int], None] = lambda *_: None
    warn: Callable[[str, str | None], None] = lambda *_: None


@dataclass
class Opened:
    """A clip that was read, or why it could not be. `warnings`: what was lost of it."""

    items: Clip
    read: "ReadClip | None" = None
    error: Exception | None = None
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Note a loss, once."""
        if message not in self.warnings:
            self.warnings.append(message)


@dataclass(eq=False)
class _Turn:
    """One reading of a clip, or what wants the memory of all.

    allowed: turns at once when it began
    most:    turns at once meanwhile, it included
    """

    allowed: int
    most: int = 1


class Stopped(BaseException):
    """Raised inside work that nobody waits for any more."""


class ClipReader:
    """Reads clips, up to `ahead` of them before they are taken; a context manager.

    A clip that finds no memory beside others is read once more by itself, and fewer are read at once from
    then on.

    ahead:    0 reads each clip when it is asked for, in the thread that asks: the reference for the others.
              At most `ahead` clips are held besides those that were taken, being read or waiting.
    readers:  threads, each with a clip of its own; more of them than `ahead` have nothing to do
    openers:  one a thread, who opens its clips and decodes them elsewhere (`DecoderProcess.open`); clips of
              the others are decoded in this process
    overtake: how many places before its turn a clip may be taken while earlier ones are still read, the
              earliest of those that are ready; 0: in their order; None: any number
    """

    def __init__(
        self,
        session: "Session",
        clips: Iterable[Clip],
        asking: Asking,
        listener: Listener,
        *,
        ahead: int = 1,
        readers: int = 1,
        openers: Sequence[DistantOpener] = (),
        overtake: int | None = 0,
    ) -> None:
        self._session, self._asking, self._listener = session, asking, listener
        self._clips = iter(clips)
        self._next = threading.Lock()  # held while a clip is chosen
        self._choosing: threading.Thread | None = None  # who is waiting for the list of clips
        self._turns: list[_Turn] = []  # of those that are reading
        self._crowded = 0  # threads that want nobody beside them, or have nobody
        self._readers = self._most = readers  # turns at once, as asked for and as memory allows
        self._well = 0  # clips read since that was last changed
        self._broken: BaseException | None = None  # why a thread cannot read
        self._stopping = threading.Event()
        self._room = threading.Semaphore(ahead)
        self._changed = threading.Condition()
        self._ready: dict[int, Opened | BaseException] = {}  # by place in the order
        self._given = 0  # places that were given to a thread
        self._earliest = 0  # place that was not taken yet
        self._early: set[int] = set()  # places behind it that were
        self._overtake = overtake
        self._last: int | None = None  # the place behind the last clip, once it is known
        self.ended = False  # nothing more will come
        self._threads = [
            threading.Thread(target=self._work, args=(opener,), name="seats-read-clips", daemon=True)
            for opener, _ in zip(chain(openers, repeat(None)), range(min(ahead, readers)), strict=False)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, *, wait: bool = True) -> Opened | None:
        """The next clip; None where there is none yet (without `wait`) or no more (`ended` says so)."""
        if self.ended:
            return None
        if not self._threads:
            clip = next(self._clips, None)
            found = None if clip is None else self.read(clip)
            self.ended = found is None
            return found
        with self._changed:
            if wait:
                self._changed.wait_for(
                    lambda: (
                        self._due() is not None
                        or self._earliest == self._last
                        or self._broken is not None
                        or self._stopping.is_set()
                    )
                )
            if self._broken is not None:
                self.ended = True
                raise self._broken
            if self._earliest == self._last or self._stopping.is_set():
                self.ended = True
                return None
            place = self._due()
            if place is None:
                return None
            taken = self._ready.pop(place)
            self._early.add(place)
            while self._earliest in self._early:
                self._early.remove(self._earliest)
                self._earliest += 1
        self._room.release()
        if isinstance(taken, BaseException):
            self.ended = True
            raise taken
        if taken.read is not None:
            take_over(taken.read.encoded, self._session.adapter.device)
        return taken

    def _due(self) -> int | None:
        """The place of the clip to be taken now, if there is one. What ends everything overtakes nothing, and
        is overtaken by nothing."""
        place = min(self._ready, default=None)
        if place is None or place == self._earliest:
            return place
        if isinstance(self._ready[place], BaseException):
            return None
        far = self._overtake is not None and place - self._earliest > self._overtake
        return None if far else place

    def stop(self) -> None:
        """Nothing more is wanted: whoever waits in `take`, in whatever thread, gets None."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads, in the middle of a clip if need be. One that waits for the list of clips, which
        others write, is left behind: it reads nothing more."""
        self.stop()
        for _ in self._threads:
            self._room.release()
        until = time.monotonic() + JOIN_S
        for thread in self._threads:
            while thread.is_alive() and thread is not self._choosing and time.monotonic() < until:
                thread.join(_LOOK_S)

    def _work(self, opener: DistantOpener | None) -> None:
        try:
            with own_stream(self._session.adapter.device) as launched:
                while self._one(opener, launched):
                    pass
        except Stopped:
            pass
        except BaseException as error:  # of the stream: raised again in the thread that takes
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _one(self, opener: DistantOpener | None, launched: Callable[[], Launched]) -> bool:
        """Reads the next clip; whether there was one."""
        self._room.acquire()
        number, clip = self._choose()
        if clip is None:
            return False
        try:
            opened = self._beside_others(clip, opener, launched)
        except Stopped:
            raise
        except BaseException as error:
            self._put(number, error)  # raised again in the thread that takes
            return False
        self._put(number, opened)
        return True

    def _beside_others(
        self, clip: Clip, opener: DistantOpener | None, launched: Callable[[], Launched]
    ) -> Opened:
        """A clip read while others are; where there is no memory for it, once more with nobody beside it."""
        with self._turn() as turn:
            opened = self._waited_for(clip, opener, launched)
        lacked = isinstance(opened.error, DeviceError) and turn.most > 1
        if lacked:
            opened = Opened(clip)  # what the error holds, if anything, is let go
            with self.alone():
                opened = self._waited_for(clip, opener, launched)
        if not isinstance(opened.error, DeviceError):  # which says nothing of how many there is memory for
            self._learn(turn, lacked)
        return opened

    def _learn(self, turn: _Turn, lacked: bool) -> None:
        """How many clips memory is enough for: where it was not, but was for one, a quarter less, once for
        all that began under one number; after a while one more."""
        with self._changed:
            self._well += 1
            if lacked and turn.allowed <= self._most:
                self._most, self._well = max(1, min(self._most, turn.most) * 3 // 4), 0
            elif self._most < self._readers and self._well >= _WELL:
                self._most, self._well = self._most + 1, 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody reads meanwhile. Waits for those who do."""
        with self._turn(alone=True):
            yield

    def _waited_for(
        self, clip: Clip, opener: DistantOpener | None, launched: Callable[[], Launched]
    ) -> Opened:
        opened = self.read(clip, opener)
        try:
            launched().wait()
        except Exception as error:  # of the GPU, which tells late
            opened.read, opened.error = None, error
        return opened

    @contextmanager
    def _turn(self, *, alone: bool = False) -> Iterator[_Turn]:
        """Waits for a turn, which the value stands for."""

        def free() -> bool:
            if self._stopping.is_set():
                return True
            return not self._turns if alone else not self._crowded and len(self._turns) < self._most

        with self._changed:
            self._crowded += alone
            self._changed.wait_for(free)
            turn = _Turn(self._most)
            self._turns.append(turn)
            for one in self._turns:
                one.most = max(one.most, len(self._turns))
        try:
            self.check()
            yield turn
        finally:
            with self._changed:
                self._turns.remove(turn)
                self._crowded -= alone
                self._changed.notify_all()

    def _choose(self) -> tuple[int, Clip | None]:
        """The next clip and its place; None where there are no more. One thread at a time."""
        while not self._next.acquire(timeout=_LOOK_S):
            self.check()
        try:
            self.check()
            clip = None
            try:
                if self._last is None:
                    self._choosing = threading.current_thread()
                    clip = next(self._clips, None)
            except BaseException as error:  # the list of clips fails: nothing more comes, and this is why
                self._put(self._given, error)
                self._given += 1
            finally:
                self._choosing = None
            self.check()
            number = self._given
            if clip is None:
                with self._changed:
                    self._last = number
                    self._changed.notify_all()
                self._room.release()  # for the other threads to see it too
            else:
                self._given += 1
            return number, clip
        finally:
            self._next.release()

    def _put(self, number: int, opened: Opened | BaseException) -> None:
        with self._changed:
            self._ready[number] = opened
            self._changed.notify_all()

    def read(self, clip: Clip, opener: DistantOpener | None = None) -> Opened:
        """Reads a clip, in the thread that asks."""
        opened = Opened(clip)
        path = clip[0].path

        def on_stage(stage: str, done: int, total: int) -> None:
            self.check()
            self._listener.stage(path, stage, done, total)

        try:
            options = self._asking.options(clip[0])
            elsewhere = {} if opener is None else {"opener": partial(opener, check=self.check)}
            opened.read = self._session.read(path, options, on_stage=on_stage, warn=opened.warn, **elsewhere)
        except Exception as error:
            opened.error = error
        return opened

    def check(self) -> None:
        """Raises Stopped once nothing more is wanted: called in the middle of long work."""
        if self._stopping.is_set():
            raise Stopped
