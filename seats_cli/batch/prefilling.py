"""Questions are prefilled by a thread of its own while others are answered: decoding does not stand still for
as long as a prefill is launched.

It takes one question after the other, so this is where clips queue. Its work goes before all other work on
the GPU: else each of a prefill's hundreds of short kernels waits for those of every clip that is encoded
meanwhile, and too few answers are decoded together. Nor does an encoder begin to launch while it does
(`Session.prefill`). And it launches the next while the GPU is still at the one before, unless a drop has to
ask the GPU how many tokens it left."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

from seats_cli.batch.reading import JOIN_S, Stopped
from seats_cli.batch.run import Arrival, Arrivals
from seats_cli.batch.streams import FIRST, Launched, own_stream, take_over

_WELL = 32  # questions prefilled when they are taken, without want of memory, before it is done ahead again


@dataclass
class _Ready:
    """An arrival, or what ends everything; and what was launched for a run."""

    what: Arrival | BaseException
    launched: Launched | None = None

    @property
    def done(self) -> bool:
        """Whether it can be taken without waiting."""
        return self.launched is None or self.launched.done


class PrefilledAhead:
    """`Arrivals` that come prefilled, in their order; a context manager.

    ahead: how many are prefilled, with their keys and values in memory, or in the making, before they are
           taken
    """

    def __init__(self, arrivals: Arrivals, device: torch.device, *, ahead: int = 1) -> None:
        self._arrivals, self._device, self._ahead = arrivals, device, ahead
        self._changed = threading.Condition()
        self._ready: deque[_Ready] = deque()
        self._prefilling = False  # the thread holds memory that nobody has taken
        self._over = False  # the thread makes nothing more
        self._stopped = self._held = self._let_go = False
        self._well = 0  # prefilled when taken since memory was last short
        self.ended = False  # nothing more will come
        self._thread = threading.Thread(target=self._work, name="seats-prefill", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool = True) -> Arrival | None:
        """As `Arrivals.take`, and without `wait` None as well while the GPU is at the next one; after `hold`
        what comes is not `prefilled` yet.

        A run's cache was made on another stream (`DecodeTogether.add`): the allocator is not told that this
        thread's uses it (`take_over`), which would take two events a layer."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._ready or self._over)
            # Both are seen together, or what comes in between would be lost.
            ready, self.ended = self._next(wait), self._over and not self._ready
            self._changed.notify_all()
        if ready is None:
            return None
        if isinstance(ready.what, BaseException):
            raise ready.what
        return self._taken_over(ready.what, ready.launched)

    def _next(self, wait: bool) -> _Ready | None:
        """What is to be taken now."""
        if not self._ready or not (wait or self._ready[0].done):
            return None
        return self._ready.popleft()

    def _taken_over(self, arrival: Arrival, launched: Launched | None) -> Arrival:
        """An arrival for this thread's stream, or with the error of the GPU, which tells late."""
        if arrival.run is None or launched is None:
            return arrival
        try:
            launched.wait()
            take_over(arrival.run.read.logits, self._device)
        except Exception as error:
            return replace(arrival, run=None, error=error)
        return arrival

    def prefilled(self, arrival: Arrival) -> Arrival:
        """See `Arrivals.prefilled`. Where that has gone well for a while, there is memory to prefill ahead
        again."""
        arrival = self._arrivals.prefilled(arrival)
        with self._changed:
            self._well += arrival.run is not None
            if self._well >= _WELL:
                self._held, self._let_go, self._well = False, False, 0
        return arrival

    def again(self, arrival: Arrival) -> Arrival:
        """See `Arrivals.again`."""
        return self._arrivals.again(arrival)

    def alone(self) -> AbstractContextManager[None]:
        """See `Arrivals.alone`."""
        return self._arrivals.alone()

    def hold(self) -> bool:
        """See `Arrivals.hold`; waits for the prefill that is being launched, not for the GPU, and lets go of
        all that wait."""
        with self._changed:
            self._well = 0
            if self._let_go:
                return False
            self._let_go = self._held = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or not self._prefilling)
            for ready in self._ready:
                if isinstance(ready.what, Arrival):
                    ready.what, ready.launched = replace(ready.what, run=None), None
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread, behind the layer that it is at, and the reading before it."""
        self._arrivals.stop()
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(JOIN_S)

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            with own_stream(self._device, FIRST) as launched:
                while self._has_room() and self._pass_on(launched):
                    pass
        except Stopped:
            pass
        except BaseException as error:  # raised again in the thread that takes
            last = error
        with self._changed:
            if last is not None:
                self._ready.append(_Ready(last))
            self._over, self._prefilling = True, False
            self._changed.notify_all()

    def _pass_on(self, launched: Callable[[], Launched]) -> bool:
        """The next question; whether there was one."""
        arrival = self._arrivals.next()
        if arrival is None:
            return False
        made = None
        if self._may_prefill():
            arrival = self._arrivals.prefilled(arrival)
            try:
                made = launched() if arrival.run is not None else None
            except Exception as error:
                arrival = replace(arrival, run=None, error=error)
        self._put(arrival, made)
        return True

    def _has_room(self) -> bool:
        """Waits for room, holding nothing; whether anything more is wanted ahead."""
        with self._changed:
            self._prefilling = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._ahead)
            return not self._stopped

    def _may_prefill(self) -> bool:
        """Whether memory may be taken; from here on somebody who holds waits for it."""
        with self._changed:
            self._prefilling = not self._held
            return self._prefilling

    def _put(self, arrival: Arrival, launched: Launched | None) -> None:
        with self._changed:
            if arrival.lacked_memory(arrival.error):  # beside others: its turn comes
                arrival, self._held, self._well = replace(arrival, error=None), True, 0
            if self._held:  # meanwhile
                arrival, launched = replace(arrival, run=None), None
            if not self._stopped:
                self._ready.append(_Ready(arrival, launched))
            self._changed.notify_all()
