"""Slots of memory that two processes share, through which arrays go without a copy.

The memory has no name: its file descriptor is handed over. So nothing can be left behind, and the size of
/dev/shm, 64 MB in many containers, does not matter.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import numpy as np

_AIM = 64 * 2**20  # bytes of a ring, within these bounds on its slots
_FEWEST, _MOST = 3, 8


def slots_for(slot_bytes: int) -> int:
    """How many slots of a size a ring has: a few, fewer where they are large."""
    return min(max(_AIM // max(slot_bytes, 1), _FEWEST), _MOST)


def new_memory(n_bytes: int) -> int:
    """A file descriptor of `n_bytes` zeros that have no name. Raises OSError. POSIX only."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("seats")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    try:
        os.truncate(handle, n_bytes)
    except OSError:
        os.close(handle)
        raise
    return handle


class _Memory:
    """Mapped slots of equal size."""

    def __init__(self, handle: int, slots: int, slot_bytes: int) -> None:
        """Maps the memory and closes its descriptor."""
        self.slots, self.slot_bytes = slots, slot_bytes
        try:
            self._map = mmap.mmap(handle, slots * slot_bytes)
        finally:
            os.close(handle)

    def array(self, slot: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array over the beginning of a slot; it keeps the memory mapped."""
        count = int(np.prod(shape, dtype=np.int64))
        n_bytes = count * np.dtype(dtype).itemsize
        if n_bytes > self.slot_bytes:
            raise ValueError(f"{n_bytes} bytes do not fit a slot of {self.slot_bytes}")
        return np.frombuffer(self._map, dtype, count, slot * self.slot_bytes).reshape(shape)


class _Loan:
    """What arrays over a lent slot hold on to, so that the slot is free when the last of them is gone."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__


class Lender(_Memory):
    """The side that takes arrays out of the slots that the other has filled."""

    def __init__(self, handle: int, slots: int, slot_bytes: int) -> None:
        super().__init__(handle, slots, slot_bytes)
        self._lent = 0
        self._back: deque[int] = deque()  # by finalizers, in whatever thread

    def take(self, slot: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What stands in a slot: the slot itself until nobody holds the array any more, or a copy when so
        many are lent that the other side would run out of them."""
        array = self.array(slot, shape, dtype)
        if self._lent > self.slots - _FEWEST:
            self._back.append(slot)
            self._lent += 1
            return array.copy()
        self._lent += 1
        loan = _Loan(array)
        weakref.finalize(loan, self._back.append, slot).atexit = False
        return np.asarray(loan)

    def skip(self, slot: int) -> None:
        """A slot that nobody wants is free again."""
        self._lent += 1
        self._back.append(slot)

    def returned(self) -> list[int]:
        """The slots that came free since last asked."""
        slots: list[int] = []
        while self._back:
            slots.append(self._back.popleft())
        self._lent -= len(slots)
        return slots


class Filler(_Memory):
    """The side that fills slots; `free` are those that it may."""

    def __init__(self, handle: int, slots: int, slot_bytes: int) -> None:
        super().__init__(handle, slots, slot_bytes)
        self.free = deque(range(slots))

    @classmethod
    def received(cls, slots: int, slot_bytes: int, link: Connection) -> Filler:
        """Over memory that the other process sends by `send_handle`."""
        return cls(recv_handle(link), slots, slot_bytes)
