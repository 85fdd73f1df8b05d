"""Running out of memory, told as an error that says what to do."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seats_cli.errors import DeviceError

# How PyTorch and CUDA's libraries say it where they do not raise OutOfMemoryError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn running out of memory into a DeviceError with advice, after giving back what was cached."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        raise _out_of_memory(error) from error


def _out_of_memory(error: BaseException) -> DeviceError:
    # Else the error itself would hold the tensors that did not fit.
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first_line = str(error).split("\n")[0]
    return DeviceError(
        f"out of memory: {first_line}" if first_line else "out of memory",
        hint="lower --max-frames, --fps or --ratio, ask about a part with --start/--end, or use "
        "--dtype bfloat16",
    )
