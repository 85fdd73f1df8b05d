"""Threads that launch work on a GPU stream of their own, and hand over what they made; and what PyTorch takes
of the CPU meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from seats_cli.measure.clock import recorded
from seats_cli.model.kept import tensors_in

BESIDE, FIRST = 0, -2
"""Priorities of streams: where several have work, a GPU takes it from the lowest. Decoding's is between them
(`engine.graph.recording_stream`)."""


class Launched:
    """What the calling thread has launched so far on a device: on a GPU it may not be done yet."""

    def __init__(self, device: torch.device) -> None:
        self._event = recorded(device) if device.type == "cuda" else None

    @property
    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        try:
            return self._event is None or self._event.query()
        except RuntimeError:  # which `wait` raises
            return True

    def wait(self) -> None:
        """Waits for it, leaving the core to others. Raises the RuntimeError of a GPU that failed."""
        if self._event is not None:
            self._event.synchronize()


@contextmanager
def own_stream(device: torch.device, priority: int = BESIDE) -> Iterator[Callable[[], Launched]]:
    """On a GPU what the block launches runs beside what other threads launch, neither waiting for the other.

    The value gives what was launched so far, which must be done before another thread uses the result.
    """
    if device.type != "cuda":
        yield partial(Launched, device)
        return
    stream = torch.cuda.Stream(device, priority=priority)
    stream.wait_stream(torch.cuda.default_stream(device))  # the weights are there
    with torch.cuda.stream(stream):
        yield partial(Launched, device)


@contextmanager
def one_core_each(device: torch.device) -> Iterator[None]:
    """Beside a GPU, PyTorch works with one core in the calling thread and in each that is started inside.

    What is left to the CPU is copying, for which every reader would have a team of a thread a core, while all
    cores are decoding. The number is the process's: one block at a time, entered and left by one thread.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_over(made: Any, device: torch.device) -> None:
    """What another thread made, and is done, is used on this thread's stream from now on: its memory goes to
    nothing else before this stream is past it."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        for tensor in tensors_in(made):
            tensor.record_stream(stream)
