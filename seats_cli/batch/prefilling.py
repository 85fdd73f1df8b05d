"""Questions are prefilled by a thread of its own while others are answered: decoding does not stand still for
as long as a prefill is launched."""

import threading
from collections import deque
from types import TracebackType
from typing import Self

import torch

from seats_cli.batch.reading import JOIN_S
from seats_cli.batch.run import Arrival, Arrivals
from seats_cli.batch.streams import own_stream, taken_over


class PrefilledAhead:
    """`Arrivals` that come prefilled, in their order; a context manager.

    ahead: how many wait at most, their keys and values in memory, besides the one in the making
    """

    def __init__(self, arrivals: Arrivals, device: torch.device, *, ahead: int = 1) -> None:
        self._arrivals, self._device, self._ahead = arrivals, device, ahead
        self._changed = threading.Condition()
        self._ready: deque[Arrival | BaseException] = deque()
        self._over = self._stopped = False
        self.ended = False  # nothing more will come
        self._thread = threading.Thread(target=self._work, name="seats-prefill", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool = True) -> Arrival | None:
        """As `Arrivals.take`."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._ready or self._over)
            if not self._ready:
                self.ended = self._over
                return None
            arrival = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(arrival, BaseException):
            self.ended = True
            raise arrival
        if arrival.run is not None:
            taken_over((arrival.run.read.logits, *arrival.run.read.cache.tensors()), self._device)
        return arrival

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread behind the prefill in the making, and the reading before it."""
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
                    done()
                    self._put(arrival)
        except BaseException as error:  # raised again in the thread that takes
            last = error
        with self._changed:
            if last is not None:
                self._ready.append(last)
            self._over = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits for room; whether anything more is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._ahead)
            return not self._stopped

    def _put(self, arrival: Arrival) -> None:
        with self._changed:
            if not self._stopped:
                self._ready.append(arrival)
                self._changed.notify_all()
