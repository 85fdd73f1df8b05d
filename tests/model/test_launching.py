"""Who may launch while others do."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from seats_cli.model.launching import LaunchOrder

SOON_S, IN_VAIN_S = 10.0, 0.2


def started(order: LaunchOrder) -> tuple[threading.Event, Callable[[], None]]:
    """Of a thread that begins a turn: whether it has, and what ends it."""
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        with order.in_turn():
            begun.set()
            end.wait(SOON_S)

    thread = threading.Thread(target=work)
    thread.start()

    def stop() -> None:
        end.set()
        thread.join(SOON_S)
        assert not thread.is_alive()

    return begun, stop


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_are_in_turn_at_once(at_once: int) -> None:
    order, lock, inside, most = LaunchOrder(at_once), threading.Lock(), [0], [0]

    def work(_: int) -> None:
        with order.in_turn():
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == [at_once]


def test_none_begins_while_another_is_first() -> None:
    order = LaunchOrder(2)
    begun_before, end_before = started(order)
    assert begun_before.wait(SOON_S)
    with order.first():  # waits for nobody
        begun, end = started(order)
        assert not begun.wait(IN_VAIN_S)
        end_before()
        assert not begun.wait(IN_VAIN_S)
    assert begun.wait(SOON_S)
    end()


def test_turns_are_given_as_they_were_asked_for() -> None:
    order, begun = LaunchOrder(1), []

    def work(number: int) -> None:
        with order.in_turn():
            begun.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    with order.in_turn():
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            until = time.monotonic() + SOON_S
            while len(order._queue) < waiting and time.monotonic() < until:
                time.sleep(0.001)
    work(-1)  # asks at once, and comes last all the same
    for thread in threads:
        thread.join(SOON_S)
    assert begun == [0, 1, 2, 3, 4, 5, -1]


def test_two_may_be_first_and_both_are_waited_for() -> None:
    order = LaunchOrder(1)
    with ThreadPoolExecutor(1) as pool, order.first():
        other = order.first()
        pool.submit(other.__enter__).result(SOON_S)
        begun, end = started(order)
        pool.submit(other.__exit__, None, None, None).result(SOON_S)
        assert not begun.wait(IN_VAIN_S)
    assert begun.wait(SOON_S)
    end()


def test_who_is_first_may_take_a_turn() -> None:
    order = LaunchOrder(1)
    with order.first():
        with order.first():
            pass
        begun, end = started(order)
        assert not begun.wait(IN_VAIN_S), "the outer block has not ended"
        with order.in_turn():
            pass
    assert begun.wait(SOON_S)
    end()


def test_what_fails_leaves_the_way_free() -> None:
    order = LaunchOrder(1)
    with pytest.raises(ValueError, match="of the block"), order.first():
        raise ValueError("of the block")
    with pytest.raises(ValueError, match="of the block"), order.in_turn():
        raise ValueError("of the block")
    begun, end = started(order)
    assert begun.wait(SOON_S)
    end()
