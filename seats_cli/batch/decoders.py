"""Processes that decode for a batch, one a reader, for as long as it runs; and how many."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from seats_cli.batch.devices import cores
from seats_cli.media import DecoderProcess, DistantOpener
from seats_cli.media.process import AVAILABLE

MOST = 16  # readers by default
MOST_ON_GPU = 4  # where a GPU decodes: each holds a context there, and they are in each other's way
MOST_ON_SMALL = 4  # where a GPU has little memory for what is encoded at once
MOST_THREADS = 16  # of a process that decodes; FFmpeg warns of more
OVERTAKE = 64  # where records are written in order: what overtakes a clip waits for it, unwritten
ANSWERS_AT_ONCE, ANSWERS_ON_SMALL = 16, 8  # by default, where a CUDA graph decodes them
PREFILLED, PREFILLED_ON_SMALL = 2, 1  # one is launched while the GPU is at the one before; that takes memory


@dataclass(frozen=True)
class Pace:
    """How far a batch goes at once.

    readers:  clips that are read at the same time, each decoded by a process of its own; 0: one, in this
              process, while another is answered
    slots:    answers that are decoded together, where a CUDA graph decodes them
    threads:  of each reader's process; 0: one a core, which is quick for a single clip, while several at a
              time are then after the same cores
    overtake: how many places before its turn a clip may be answered while earlier ones are read; None: any
    prefilled: where answers are decoded together, questions that are prefilled, or in the making, before they
              are taken for it
    """

    readers: int = 0
    slots: int = 1
    threads: int = 0
    overtake: int | None = 0
    prefilled: int = PREFILLED

    @property
    def ahead(self) -> int:
        """Clips that are read before they are needed: those in the making, and some that are ready."""
        return self.readers + max(2, self.readers // 4) if self.readers else 1


IN_THIS_PROCESS = Pace()


def choose_pace(
    readers: int | None,
    slots: int | None,
    *,
    on_gpu: bool,
    graphs: bool,
    hwaccel: str,
    n_clips: int,
    small_gpu: bool = False,
    sharing: int = 1,
    on_one_gpu: int = 1,
    unordered: bool = False,
) -> Pace:
    """What was asked for, else, for each of `sharing` processes that answer: where the model is on a GPU, a
    reader for all but one of its share of the cores, at most 16, and where video is decoded there too at most
    4, shared between the `on_one_gpu`; none elsewhere, where decoding and the model are after the same cores.
    On a GPU with CUDA graphs 16 answers together. On a small GPU at most 4 readers and 8 answers, and one
    question prefilled before it is taken, else two. The readers share the cores. A clip that takes long is
    overtaken by any number of others if records come unordered, else by 64."""
    own = cores() // sharing
    if readers is None:
        most = MOST if hwaccel == "none" else max(1, MOST_ON_GPU // on_one_gpu)
        if small_gpu:
            most = min(most, MOST_ON_SMALL)
        readers = min(most, max(own - 1, 0)) if on_gpu and AVAILABLE else 0
    readers = min(readers, n_clips)
    if slots is None:
        together = ANSWERS_ON_SMALL if small_gpu else ANSWERS_AT_ONCE
        slots = together if on_gpu and graphs else 1
    threads = min(MOST_THREADS, max(1, own // readers)) if readers else 0
    prefilled = PREFILLED_ON_SMALL if small_gpu else PREFILLED
    return Pace(readers, slots, threads, None if unordered else OVERTAKE, prefilled)


@contextmanager
def decoders(pace: Pace) -> Iterator[tuple[DistantOpener, ...]]:
    """Openers of a process a reader, which start at once and are ended with the block. Raises UsageError
    where the system has none."""
    with ExitStack() as stack:
        yield tuple(
            stack.enter_context(DecoderProcess(threads=pace.threads)).open for _ in range(pace.readers)
        )
