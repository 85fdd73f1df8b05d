"""Who launches when several threads of a process launch work on one GPU.

A launch takes microseconds, under locks that all threads of the process share: the interpreter's, the
driver's. Two threads that launch hundreds of kernels each hand these locks to and fro, once a kernel or more,
and each time the one that waits has to be woken: all of it takes several times as long, and the more so where
a machine is slow to give a core that slept back (docs/benchmarks.md, "Batches on GPUs"). The GPU has enough
to do meanwhile: what is launched in ten milliseconds keeps it busy for a hundred.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident


class LaunchOrder:
    """Threads that launch long sequences of kernels: up to `at_once` of them `in_turn`, in the order in which
    they came, and none of these begins while another thread is `first`."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._queue: list[object] = []  # who waits, in the order in which they came
        self._first: Counter[int] = Counter()  # blocks by thread
        self._changed = Condition()

    @contextmanager
    def first(self) -> Iterator[None]:
        """The block waits for nobody, and who is `in_turn` waits for its end before beginning."""
        me = get_ident()
        with self._changed:
            self._first[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._first[me] -= 1
                self._first += Counter()  # forgets who is at none
                self._changed.notify_all()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block begins when fewer than `at_once` threads are at theirs, all that came before have begun
        and no other thread is `first`. Whoever is, waits for a place only."""
        me, ticket = get_ident(), object()

        def may_begin() -> bool:
            next_one = not self._first and self._queue[0] is ticket
            return self._free > 0 and (next_one or me in self._first)

        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(may_begin)
                self._free -= 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
