"""Who may launch while others do."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from seats_cli.model import launching
from seats_cli.model.launching import LaunchOrder

SOON_S, IN_VAIN_S = 10.0, 0.2


def beside(work: Callable[[], None]) -> threading.Thread:
    """A thread that is left behind where it hangs."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@contextmanager
def another(order: LaunchOrder) -> Iterator[threading.Event]:
    """A thread asks for a turn, and ends it behind the block; the value says whether it has begun."""
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        with order.in_turn():
            begun.set()
            end.wait(SOON_S)

    thread = beside(work)
    yield begun
    end.set()
    thread.join(SOON_S)
    assert not thread.is_alive()


def is_free(order: LaunchOrder) -> bool:
    """Whether a turn asked for now begins and ends."""
    with another(order) as begun:
        return begun.wait(SOON_S)


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_are_in_turn_at_once(at_once: int) -> None:
    order, lock, inside, most = LaunchOrder(at_once), threading.Lock(), [0], [0]

    def work() -> None:
        for _ in range(3):
            with order.in_turn():
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.01)
                with lock:
                    inside[0] -= 1

    threads = [beside(work) for _ in range(8)]
    for thread in threads:
        thread.join(SOON_S)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [at_once]


def test_none_begins_while_another_is_first() -> None:
    order = LaunchOrder(2)
    first = order.first()
    with another(order) as before:
        assert before.wait(SOON_S)
        first.__enter__()
        with another(order) as begun:
            assert not begun.wait(IN_VAIN_S)
            first.__exit__(None, None, None)
            assert begun.wait(SOON_S)


def test_all_that_there_is_room_for_begin_when_no_other_is_first() -> None:
    order = LaunchOrder(2)
    first = order.first()
    first.__enter__()
    with another(order) as one, another(order) as other:
        first.__exit__(None, None, None)
        assert one.wait(SOON_S)
        assert other.wait(SOON_S)


def test_who_is_first_waits_for_nobody() -> None:
    order, passed = LaunchOrder(1), threading.Event()

    def work() -> None:
        with order.first(), order.first():
            passed.set()

    with order.in_turn():
        beside(work)
        assert passed.wait(SOON_S)
    assert is_free(order)


def test_two_may_be_first_and_both_are_waited_for() -> None:
    order = LaunchOrder(1)
    one, other = order.first(), order.first()
    one.__enter__()
    other.__enter__()
    with another(order) as begun:
        other.__exit__(None, None, None)
        assert not begun.wait(IN_VAIN_S)
        one.__exit__(None, None, None)
        assert begun.wait(SOON_S)


def test_turns_are_given_as_they_were_asked_for() -> None:
    order, begun = LaunchOrder(1), []

    def work(number: int) -> None:
        with order.in_turn():
            begun.append(number)

    threads = []
    with order.in_turn():
        for number in range(6):
            threads.append(beside(lambda number=number: work(number)))  # type: ignore[misc]
            until = time.monotonic() + SOON_S
            while len(order._queue) < len(threads) and time.monotonic() < until:
                time.sleep(0.001)
    threads.append(beside(lambda: work(-1)))  # asks at once, and comes last all the same
    for thread in threads:
        thread.join(SOON_S)
    assert begun == [0, 1, 2, 3, 4, 5, -1]


def test_what_fails_leaves_the_way_free() -> None:
    order = LaunchOrder(1)
    with pytest.raises(ValueError, match="of the block"), order.first():
        raise ValueError("of the block")
    with pytest.raises(ValueError, match="of the block"), order.in_turn():
        raise ValueError("of the block")
    assert is_free(order)


@pytest.mark.parametrize("taken", [False, True])
def test_who_is_interrupted_while_waiting_takes_no_place(
    monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    def interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(launching, "Event", Interrupted)
            with pytest.raises(KeyboardInterrupt), order.in_turn():
                pass

    order = LaunchOrder(1)
    if taken:
        with order.in_turn():
            interrupted()
    else:
        interrupted()
    assert is_free(order)
    turn = order.in_turn()
    turn.__enter__()
    with another(order) as begun:
        assert not begun.wait(IN_VAIN_S), "there is one place, as before"
        turn.__exit__(None, None, None)
