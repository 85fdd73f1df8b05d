"""What the encoders prepare once for inputs of a shape, kept for the shapes that they met last."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

from seats_cli.model.kernels import finished

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")
MOST = 32  # pictures of a folder may have a shape each, and some MB for each shape


class Kept(Generic[Key, Made]):
    """Tensors (see `tensors_in`) by what they were made for, the `MOST` that were asked for last.

    Several threads may ask, each with a stream of its own. What is let go while a stream still reads it stays
    in memory until that stream has.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[Key, Made] = {}  # the one asked for last at the end
        self._lock = Lock()

    def get(self, key: Key, make: Callable[[], Made]) -> Made:
        """What was made for `key`, or `make` makes it now."""
        with self._lock:
            made = self._kept.pop(key, None)
            if made is not None:
                self._kept[key] = made
        if made is None:
            fresh = make()  # two threads may both; neither waits for the other
            finished(self._device)  # before other streams read it
            with self._lock:
                made = self._kept.setdefault(key, fresh)
                if len(self._kept) > MOST:
                    del self._kept[next(iter(self._kept))]
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for tensor in tensors_in(made):
                tensor.record_stream(stream)
        return made

    def __len__(self) -> int:
        return len(self._kept)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a value: in its fields, or in what it lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
