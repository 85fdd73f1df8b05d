"""Processes that decode for a batch, one a reader, for as long as it runs; and how many."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from seats_cli.batch.devices import cores
from seats_cli.media import DecoderProcess, Opener
from seats_cli.media.process import AVAILABLE

MOST = 8  # by default
ANSWERS_AT_ONCE = 8  # likewise, where a CUDA graph decodes them


@dataclass(frozen=True)
class Pace:
    """How far a batch goes at once.

    readers: clips that are read at the same time, each decoded by a process of its own; 0: one, in this
             process, while another is answered
    slots:   answers that are decoded together, where a CUDA graph decodes them
    """

    readers: int = 0
    slots: int = 1

    @property
    def ahead(self) -> int:
        """Clips that are read before they are needed: those in the making, and some that are ready."""
        return self.readers + 2 if self.readers else 1

    @property
    def in_hand(self) -> int:
        """Clips at one time, those whose answers are in the making included."""
        return self.slots + self.ahead


IN_THIS_PROCESS = Pace()


def choose_pace(
    readers: int | None,
    slots: int | None,
    *,
    on_gpu: bool,
    graphs: bool,
    hwaccel: str,
    n_clips: int,
    sharing: int = 1,
) -> Pace:
    """What was asked for, else: where the model is on a GPU and video is not, a reader for all but one of the
    cores, at most 8, shared between `sharing` processes that answer; none elsewhere, where decoding and the
    model are after the same cores. On a GPU with CUDA graphs 8 answers together."""
    if readers is None:
        free = cores() // sharing - 1
        readers = min(MOST, max(free, 0)) if on_gpu and hwaccel == "none" and AVAILABLE else 0
    return Pace(min(readers, n_clips), slots or (ANSWERS_AT_ONCE if on_gpu and graphs else 1))


@contextmanager
def decoders(count: int) -> Iterator[tuple[Opener, ...]]:
    """Openers of so many processes, which start at once and are ended with the block. Raises UsageError where
    the system has none."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(DecoderProcess()).open for _ in range(count))
