"""Running out of memory, told as an error that says what to do, with nothing left behind."""

import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.engine.fit import Asked, advice, device_bytes_of, engine_of
from seats_cli.engine.graph import GraphDecoder
from seats_cli.errors import DeviceError
from seats_cli.model.adapter import Adapter
from seats_cli.model.placement import free_bytes

# How PyTorch and CUDA's libraries say it where they do not raise OutOfMemoryError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
GENERAL_ADVICE = (
    "lower --max-frames, --fps or --ratio, ask about a part with --start/--end, or use --dtype bfloat16"
)
Advice = Callable[[], tuple[str, str | None]]


class explained_memory:
    """Turn running out of memory into a DeviceError with advice, after giving back what was cached.

    The error keeps no tensor: what the frames between here and the failure held is dropped. So whatever is
    large must be held by functions called inside the block, not by the one that the block stands in.
    """

    def __init__(self, advise: Advice | None = None) -> None:
        """`advise` is asked once everything is given back: (what was being done, what would fit or None)."""
        self._advise = advise

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del trace  # this frame becomes part of the new error's traceback, and must not hold the old one
        if error is not None and is_out_of_memory(error):
            raise _out_of_memory(error, self._advise) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, in any of the ways that PyTorch and CUDA's libraries have."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


class Attempt:
    """How far a call has come, for the error where memory runs out: it holds host numbers and no tensor.

    stage: what is being done; asked: the question, once its clip is known
    """

    def __init__(
        self, adapter: Adapter, graph: GraphDecoder | None, *, cache: LayerCache | None = None
    ) -> None:
        """`graph`: whose buffers may be given back, since nothing decodes in it meanwhile; `cache`: of a
        prefill that callers hold, which is emptied."""
        self._adapter, self._graph, self._cache = adapter, graph, cache
        self.stage = "while reading the file"
        self.asked: Asked | None = None

    def at(self, stage: str) -> None:
        """What is being done from now on."""
        self.stage = stage

    def advice(self) -> tuple[str, str | None]:
        """The stage, and by estimate what would fit into what is free now; the buffers of decoding are given
        back first, since a shorter clip may need no such long ones."""
        adapter = self._adapter
        if self._cache is not None:
            self._cache.clear()
        if self._graph is not None:
            self._graph.release()
        _give_back_cached()
        room = free_bytes(adapter.device)
        if self.asked is None or room is None or not adapter.on_one_device:
            return self.stage, None
        engine = engine_of(adapter, graphs=self._graph is not None)
        size = device_bytes_of(adapter.device)
        return self.stage, advice(adapter, self.asked, engine, device_bytes=size, room=room)


def _out_of_memory(error: BaseException, advise: Advice | None) -> DeviceError:
    _forget(error)
    _give_back_cached()
    stage, hint = advise() if advise is not None else ("", None)
    where = f" {stage}" if stage else ""
    first_line = str(error).split("\n")[0]
    return DeviceError(
        f"out of memory{where}: {first_line}" if first_line else f"out of memory{where}",
        hint=hint or GENERAL_ADVICE,
    )


def _give_back_cached() -> None:
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # PyTorch refuses while another thread records a graph
            torch.cuda.empty_cache()


def _forget(error: BaseException) -> None:
    """Drop what an error, and those that it came from, hold; where each was raised stays as a note on it.

    A frame that is cleared still holds its function, and with a closure all that is in it, so the tracebacks
    have to go.
    """
    way = "".join(traceback.format_exception(error))
    pending, seen = [error], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
        pending += [other for other in (one.__cause__, one.__context__) if other is not None]
    error.add_note(way.rstrip())
