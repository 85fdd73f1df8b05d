"""The scheduler: clips are read ahead, and questions are prefilled when a decoder asks for one.

clips -> ClipReader (its own thread: open, decode, resize, encode)
      -> Arrivals   (selection and prefill, in the thread that decodes; `PrefilledAhead`: in one of its own)
      -> a Decoder  (one at a time, or many at once)
      -> records, as they are finished
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from seats_cli.batch.reading import Clip, ClipReader, Listener, Opened
from seats_cli.batch.records import Asking, Record, failure, success
from seats_cli.batch.sources import Item
from seats_cli.batch.streams import take_over
from seats_cli.errors import DeviceError
from seats_cli.media import DistantOpener
from seats_cli.model.kernels import quick_attention

if TYPE_CHECKING:
    from seats_cli.answering import Run
    from seats_cli.asking import Answer
    from seats_cli.batch.prefilling import PrefilledAhead
    from seats_cli.session import Session


@dataclass(frozen=True)
class Arrival:
    """A question on its way: prefilled up to its first token's logits (`run`), failed (`error`), or neither
    yet, for which `Arrivals.prefilled` is there.

    clip:     what it is about; None once nothing more is asked of it
    warnings: what was lost of the clip, and said to this question
    seconds:  what reading the clip took
    """

    item: Item
    clip: Opened | None
    run: "Run | None" = None
    error: Exception | None = None
    warnings: Sequence[str] = ()
    seconds: float = 0.0

    def lacked_memory(self, error: Exception | None) -> bool:
        """Whether an error says that the question may be answered once others have given memory back: of its
        clip, which found too little to be read beside others, or of itself."""
        return isinstance(error, DeviceError) and self.clip is not None


class Arrivals:
    """Questions in the order in which their clips come, each prefilled when it is taken. Whoever decodes
    takes as many as it has room for.

    A clip is let go when the last of its questions was taken.
    """

    def __init__(self, session: "Session", reader: ClipReader, asking: Asking, listener: Listener) -> None:
        self._session, self._reader, self._asking, self._listener = session, reader, asking, listener
        self._clip: Opened | None = None
        self._left: deque[Item] = deque()

    def take(self, *, wait: bool = True) -> Arrival | None:
        """The next question; None where no clip is ready (without `wait`) or there are no more (`ended`)."""
        arrival = self.next(wait=wait)
        return None if arrival is None else self.prefilled(arrival)

    def next(self, *, wait: bool = True) -> Arrival | None:
        """The same, neither prefilled nor failed yet."""
        if not self._left:
            self._clip = self._reader.take(wait=wait)
            if self._clip is None:
                return None
            self._left.extend(self._clip.items)
        clip = self._clip
        assert clip is not None  # the questions left are about it
        item = self._left.popleft()
        if not self._left:
            self._clip = None
        return Arrival(item, clip)

    def prefilled(self, arrival: Arrival) -> Arrival:
        """A question prefilled by the thread that asks; once more, if there was no memory for what it had
        become."""
        assert arrival.clip is not None  # it has not joined the answers in the making
        return self._prefilled(arrival.item, arrival.clip)

    def again(self, arrival: Arrival) -> Arrival:
        """A question prefilled once more; from its file, decoded in this process, which has been read before,
        where nothing is left of what that had become."""
        clip = arrival.clip
        if clip is None or clip.read is None:
            clip = self._reader.read((arrival.item,))
        return self._prefilled(arrival.item, clip)

    def alone(self) -> AbstractContextManager[None]:
        """No clip is read meanwhile: what reading takes is given back first. Raises Stopped once nothing more
        is wanted."""
        return self._reader.alone()

    def hold(self) -> bool:
        """Memory is short: for a while a question is prefilled when it is taken, not before. Whether that
        gave any back."""
        return False

    def _prefilled(self, item: Item, clip: Opened) -> Arrival:
        if clip.read is None:
            return Arrival(item, clip, error=clip.error, warnings=tuple(clip.warnings))
        # Whoever took the clip is perhaps another thread than the one that now prefills.
        take_over(clip.read.encoded, self._session.adapter.device)

        def on_stage(stage: str, done: int, total: int) -> None:
            self._reader.check()
            self._listener.stage(item.path, stage, done, total)

        run = error = None
        try:
            options = self._asking.options(item)
            run = self._session.prefill(clip.read, item.question, options, on_stage=on_stage, warn=clip.warn)
        except Exception as met:
            error = met
        return Arrival(item, clip, run, error, tuple(clip.warnings), clip.read.seconds)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return not self._left and self._reader.ended

    def stop(self) -> None:
        """Nothing more is wanted: a `take` that waits, in whatever thread, returns."""
        self._reader.stop()


Outcome = tuple[Arrival, "Answer | Exception"]
Decoder = Callable[["Session", Arrivals, Listener], Iterator[Outcome]]
"""Takes arrivals, yields each once with its answer or what went wrong, in any order.

One that decodes several at once takes with `wait=False` while it has some in the making, and with `wait=True`
when it has none. An arrival without a run has failed already: it is yielded with its error, at once.
"""


def one_by_one(session: "Session", arrivals: Arrivals, listener: Listener) -> Iterator[Outcome]:
    """The decoder that any other is held to: a question is answered before the next is prefilled."""
    while (arrival := arrivals.take()) is not None:
        answer = answer_of(session, arrival, listener)
        if isinstance(answer, Exception) and arrival.lacked_memory(answer):
            del answer
            arrival = replace(arrival, run=None)
            yield by_itself(session, arrivals, arrival, listener)
        else:
            yield arrival, answer


def by_itself(
    session: "Session", arrivals: "Arrivals | PrefilledAhead", arrival: Arrival, listener: Listener
) -> Outcome:
    """What becomes of a question that found no memory, while no clip is read and none other is answered."""
    with arrivals.alone():
        arrival = arrivals.again(arrival)
        answer = answer_of(session, arrival, listener)
        if session.graph is not None:
            session.graph.release()  # for those that come
    return arrival, answer


def answer_of(session: "Session", arrival: Arrival, listener: Listener) -> "Answer | Exception":
    """What becomes of a question that is answered by itself."""
    if arrival.run is None:
        return arrival.error or RuntimeError("a question came neither prefilled nor failed")
    path = arrival.item.path
    try:
        return session.generate(
            arrival.run, on_stage=lambda stage, done, total: listener.stage(path, stage, done, total)
        )
    except Exception as error:
        return error


def run_batch(
    session: "Session",
    clips: Iterable[Clip],
    asking: Asking,
    *,
    listener: Listener = Listener(),  # noqa: B008 - frozen
    ahead: int = 1,
    readers: int = 1,
    openers: Sequence[DistantOpener] = (),
    overtake: int | None = 0,
    decode: Decoder = one_by_one,
) -> Iterator[Record]:
    """A record for every question, as they are finished.

    clips: taken one by one, by the thread that reads, when there is room for another
    ahead: clips that are read before they are needed; 0 reads each when its turn has come
    readers: of these, how many are read at the same time
    openers: of the readers, those who have their clips decoded elsewhere
    overtake: see `ClipReader`

    What fails is a record, and the next one comes. Raises DeviceError, after the record of the question that
    it happened at, where the device itself is lost. Closing the iterator ends the reading.
    """
    adapter = session.adapter
    with (
        nullcontext() if adapter.fused else quick_attention(adapter.device),
        ClipReader(
            session,
            clips,
            asking,
            listener,
            ahead=ahead,
            readers=readers,
            openers=openers,
            overtake=overtake,
        ) as reader,
    ):
        arrivals = Arrivals(session, reader, asking, listener)
        for arrival, outcome in decode(session, arrivals, listener):
            if isinstance(outcome, Exception):
                yield failure(arrival.item, asking, outcome, arrival.warnings)
                check_device(adapter.device, outcome)
            else:
                yield success(arrival.item, asking, outcome, arrival.seconds, arrival.warnings)


def check_device(device: torch.device, error: Exception) -> None:
    """Raise DeviceError where an error has taken the GPU along: nothing more will run in this process."""
    if device.type != "cuda" or not isinstance(error.__cause__ or error, RuntimeError):
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise DeviceError(
            f"the GPU no longer answers after an error: {str(lost).splitlines()[0]}",
            hint="the same command goes on with the next file",
        ) from lost
