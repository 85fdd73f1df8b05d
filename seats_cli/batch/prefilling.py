"""Questions are prefilled by a thread of its own while others are answered: decoding does not stand still for
as long as a prefill is launched."""

import threading
from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from seats_cli.batch.reading import JOIN_S, Stopped
from seats_cli.batch.run import Arrival, Arrivals
from seats_cli.batch.streams import own_stream, take_over


class PrefilledAhead:
    """`Arrivals` that come prefilled, in their order; a context manager.

    ahead: how many are prefilled, with their keys and values in memory, or in the making, before they are
           taken
    """

    def __init__(self, arrivals: Arrivals, device: torch.device, *, ahead: int = 1) -> None:
        self._arrivals, self._device, self._ahead = arrivals, device, ahead
        self._changed = threading.Condition()
        self._ready: deque[Arrival | BaseException] = deque()
        self._over = False  # the thread makes nothing more
        self._stopped = self._held = False
        self.ended = False  # nothing more will come
        self._thread = threading.Thread(target=self._work, name="seats-prefill", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool = True) -> Arrival | None:
        """As `Arrivals.take`."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._ready or self._over)
            arrival = self._ready.popleft() if self._ready else None
            over = arrival is None and self._over  # seen together, or what comes in between would be lost
            self._changed.notify_all()
        if over and self._held:
            arrival = self._arrivals.take(wait=wait)
        if over:
            self.ended = self._arrivals.ended if self._held else True
        if isinstance(arrival, BaseException):
            self.ended = True
            raise arrival
        if arrival is not None and arrival.run is not None:
            take_over((arrival.run.read.logits, *arrival.run.read.cache.tensors()), self._device)
        return arrival

    def again(self, arrival: Arrival) -> Arrival:
        """See `Arrivals.again`."""
        return self._arrivals.again(arrival)

    def hold(self) -> bool:
        """See `Arrivals.hold`; waits for the prefill in the making, and lets go of all that wait."""
        if self._held:
            return False
        with self._changed:
            self._held = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over)
            self._ready = deque(
                replace(arrival, run=None) if isinstance(arrival, Arrival) else arrival
                for arrival in self._ready
            )
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
            with own_stream(self._device) as done:
                while self._has_room() and (arrival := self._arrivals.take()) is not None:
                    try:
                        done()
                    except Exception as error:  # of the GPU, which tells late
                        arrival = replace(arrival, run=None, error=error)
                    if arrival.lacked_memory(arrival.error):  # beside others: its turn comes
                        arrival, self._held = replace(arrival, error=None), True
                    self._put(arrival)
        except Stopped:
            pass
        except BaseException as error:  # raised again in the thread that takes
            last = error
        with self._changed:
            if last is not None:
                self._ready.append(last)
            self._over = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits for room; whether anything more is wanted ahead."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._held or len(self._ready) < self._ahead)
            return not (self._stopped or self._held)

    def _put(self, arrival: Arrival) -> None:
        with self._changed:
            if not self._stopped:
                self._ready.append(arrival)
                self._changed.notify_all()
