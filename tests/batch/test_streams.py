"""What PyTorch takes of the CPU while a batch runs."""

import threading
from collections.abc import Iterator

import pytest
import torch

from seats_cli.batch.streams import one_core_each


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
