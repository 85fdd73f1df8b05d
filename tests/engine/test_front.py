"""Reading ahead: the same items in order, errors in their place, never above the budget, no thread left."""

import threading
from collections.abc import Iterator

import pytest

from seats_cli.engine.front import read_ahead


def _threads() -> int:
    return sum(thread.name == "seats-read-ahead" for thread in threading.enumerate())


def test_the_items_come_in_order_and_the_thread_ends() -> None:
    with read_ahead(iter(range(100)), size=lambda _: 1, budget=7) as items:
        assert list(items) == list(range(100))
    assert _threads() == 0


def test_an_error_comes_where_its_item_would_have() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk went away")

    with read_ahead(failing(), size=lambda _: 1, budget=9) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OSError, match="disk"):
            next(items)
    assert _threads() == 0


def test_no_more_is_held_than_the_budget_and_one_item_always_fits() -> None:
    made: list[int] = []
    taken = threading.Semaphore(0)

    def counting() -> Iterator[int]:
        for size in (3, 3, 3, 50, 3):
            made.append(size)
            taken.release()
            yield size

    with read_ahead(counting(), size=lambda item: item, budget=6) as items:
        for _ in range(3):  # two fit, the third is made and waits
            assert taken.acquire(timeout=5)
        assert not taken.acquire(timeout=0.2)
        assert len(made) == 3
        assert list(items) == [3, 3, 3, 50, 3]


def test_leaving_early_stops_the_thread_and_closes_the_source() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with read_ahead(endless(), size=lambda _: 1, budget=3) as items:
        assert next(items) == 0
    assert closed.is_set()
    assert _threads() == 0


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="budget"), read_ahead(iter([1]), size=lambda _: 1, budget=0):
        pass
