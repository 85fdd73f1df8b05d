"""Who launches when several threads of a process launch work on one GPU.

A launch takes microseconds, under locks that all threads of the process share: the interpreter's, the
driver's. Of several threads that launch hundreds of kernels each takes several times as long, most of it
neither at work nor for want of a core (docs/benchmarks.md, "Batches on GPUs"). The GPU has enough to do when
one launches at a time: it is milliseconds behind.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock


class LaunchOrder:
    """Threads that launch long sequences of kernels: up to `at_once` of them `in_turn`, in the order in which
    they came, and none of these begins while another is `first`. The two are not nested: a thread would wait
    for itself."""

    def __init__(self, at_once: int) -> None:
        self._lock = Lock()
        self._free = at_once
        self._first = 0  # blocks under way
        self._queue: deque[Event] = deque()  # who waits for a turn; each is woken when it is given

    @contextmanager
    def first(self) -> Iterator[None]:
        """The block waits for nobody, and who is `in_turn` waits for its end before beginning."""
        with self._lock:
            self._first += 1
        try:
            yield
        finally:
            with self._lock:
                self._first -= 1
                self._give_turns()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block begins when fewer than `at_once` are under way, all that came before have begun, and none
        is `first`."""
        given = Event()
        try:
            with self._lock:
                self._queue.append(given)
                self._give_turns()
            given.wait()
            yield
        finally:
            with self._lock:
                if given.is_set():
                    self._free += 1
                elif given in self._queue:  # the wait was interrupted
                    self._queue.remove(given)
                self._give_turns()

    def _give_turns(self) -> None:
        while self._queue and self._free > 0 and not self._first:
            self._free -= 1
            self._queue.popleft().set()
