"""What is kept for shapes is made once, bounded, and safe to let go."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seats_cli.model import kept as module
from seats_cli.model.kept import Kept, tensors_in

CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)


def test_the_shapes_that_were_asked_for_last_are_kept(few: None) -> None:
    table: Kept[int, torch.Tensor] = Kept(CPU)
    made: list[int] = []

    def get(key: int) -> float:
        def make() -> torch.Tensor:
            made.append(key)
            return torch.tensor(float(key))

        return table.get(key, make).item()

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]  # 2 made room for 3, and 3 for 2
    assert len(table) == 2


def test_threads_that_make_at_once_wait_for_nobody_and_get_the_same() -> None:
    table: Kept[int, torch.Tensor] = Kept(CPU)
    both = threading.Barrier(2, timeout=30)
    found: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        both.wait()  # for the other to be making it too
        return torch.zeros(1)

    def ask() -> None:
        found.append(table.get(0, make))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = found
    assert first is second


class Noting(torch.Tensor):
    """Notes which streams are recorded."""

    streams: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


@dataclass(frozen=True)
class Table:
    values: torch.Tensor
    sizes: tuple[int, ...]


def test_every_stream_that_reads_is_noted_and_the_first_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    streams = [SimpleNamespace(synchronize=lambda name=name: waited.append(name)) for name in "ab"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[0])
    table: Kept[str, Table] = Kept(torch.device("cuda"))
    values = torch.zeros(3).as_subclass(Noting)
    values.streams = []
    made = table.get("x", lambda: Table(values, (3,)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[1])
    assert table.get("x", lambda: pytest.fail("made twice")) is made
    assert waited == ["a"]
    assert values.streams == streams


def test_tensors_are_found_in_fields_and_lists() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert [*map(id, tensors_in((Table(one, (1,)), [two, 3, "x"])))] == [id(one), id(two)]
    assert not list(tensors_in(None))
