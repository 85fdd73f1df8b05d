"""What PyTorch takes of the CPU while a batch runs, and when another thread's work is done."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from seats_cli.batch import streams
from seats_cli.batch.streams import Launched, one_core_each, own_stream


def in_a_thread() -> int:
    """PyTorch's threads as a thread sees them that starts now."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("device", "inside"), [("cuda", 1), ("cpu", 3)])
def test_beside_a_gpu_each_thread_has_one_core(device: str, inside: int) -> None:
    with one_core_each(torch.device(device)):
        assert (torch.get_num_threads(), in_a_thread()) == (inside, inside)
    assert (torch.get_num_threads(), in_a_thread()) == (3, 3)


def test_an_error_gives_the_cores_back() -> None:
    with pytest.raises(KeyError), one_core_each(torch.device("cuda")):
        raise KeyError
    assert torch.get_num_threads() == 3


class Event:
    """Of a GPU that is at work until it is waited for, or has failed."""

    def __init__(self, *, fails: bool) -> None:
        self._fails, self._done = fails, False

    def query(self) -> bool:
        if self._fails:
            raise RuntimeError("CUDA error")
        return self._done

    def synchronize(self) -> None:
        if self._fails:
            raise RuntimeError("CUDA error")
        self._done = True


def test_what_was_launched_is_done_once_it_was_waited_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "recorded", lambda _: Event(fails=False))
    launched = Launched(torch.device("cuda"))
    assert not launched.done
    launched.wait()
    assert launched.done


def test_a_gpu_that_failed_is_not_waited_for_for_ever(monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "recorded", lambda _: Event(fails=True))
    launched = Launched(torch.device("cuda"))
    assert launched.done
    with pytest.raises(RuntimeError, match="CUDA error"):
        launched.wait()


def test_without_a_gpu_all_is_done() -> None:
    with own_stream(torch.device("cpu")) as launched:
        assert launched().done
        launched().wait()
