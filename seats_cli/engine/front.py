"""Reading a file while the device works on what was read before."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Reader(Generic[Item]):
    """A thread that makes items until as much as `budget` waits to be taken, and at least one always."""

    def __init__(self, items: Iterator[Item], size: Callable[[Item], int], budget: int) -> None:
        self._items, self._size, self._budget = items, size, budget
        self._ready: deque[tuple[Item, int]] = deque()
        self._held = 0
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="seats-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._ended)
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self._ready.popleft()
                self._held -= size
                self._changed.notify_all()
            yield item

    def stop(self) -> None:
        """End the thread after the item that it is making, and wait for it."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._offer(item):
                    break
        except BaseException as raised:  # raised again in the thread that asks
            error = raised
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
            with self._changed:
                self._error, self._ended = error, True
                self._changed.notify_all()

    def _offer(self, item: Item) -> bool:
        size = self._size(item)
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._ready or self._held + size <= self._budget
            )
            if self._stopped:
                return False
            self._ready.append((item, size))
            self._held += size
            self._changed.notify_all()
        return True


@contextmanager
def read_ahead(
    items: Iterator[Item], *, size: Callable[[Item], int], budget: int
) -> Iterator[Iterator[Item]]:
    """The same items, made by another thread from now on, up to `budget` in all of what `size` says of each.

    An error in the thread is raised where the item would have come. Leaving the block ends the thread and
    closes `items` there.
    """
    if budget < 1:
        raise ValueError(f"reading ahead needs a budget of at least 1, not {budget}")
    reader = _Reader(items, size, budget)
    try:
        yield iter(reader)
    finally:
        reader.stop()
