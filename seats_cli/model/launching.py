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
    """Threads that launch long sequences of kernels: up to `at_once` of them `in_turn`, and none of these
    begins while another thread is `first`."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
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
        """The block begins when fewer than `at_once` threads are at theirs and no other thread is `first`."""
        me = get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 and not self._first.keys() - {me})
            self._free -= 1
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
