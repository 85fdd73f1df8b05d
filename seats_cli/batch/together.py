"""Answers of several questions decoded at once: all share the reading of the weights, which a token costs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from seats_cli.batch.prefilling import PrefilledAhead
from seats_cli.batch.reading import Listener
from seats_cli.batch.run import Arrival, Arrivals, Decoder, Outcome, by_itself, one_by_one
from seats_cli.engine.graph import GraphDecoder
from seats_cli.engine.memory import explained_memory
from seats_cli.engine.together import DecodeTogether, Sequence
from seats_cli.errors import DeviceError
from seats_cli.measure.clock import FIRST_TOKEN

if TYPE_CHECKING:
    from seats_cli.answering import Run
    from seats_cli.asking import Answer
    from seats_cli.session import Session


class AnswersTogether:
    """Questions whose answers are decoded together; each comes prefilled (`Session.prefill`)."""

    def __init__(self, session: "Session", slots: int) -> None:
        self._session = session
        self._decoder = GraphDecoder(session.adapter, slots)
        self._decoding = DecodeTogether(session.adapter, self._decoder)
        self._runs: dict[int, tuple[Run, float]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def free(self) -> int:
        """Questions that can be added now."""
        return self._decoding.free

    def add(self, run: "Run", *, other_stream: bool = False) -> None:
        """Begin an answer; uses up the run's cache (`DecodeTogether.add`). Raises DeviceError where memory
        runs out."""
        with torch.inference_mode(), explained_memory():
            sequence = self._decoding.add(
                run.read, run.prompt.next_position, run.options.decoding, other_stream=other_stream
            )
        self._runs[id(sequence)] = run, run.clock.elapsed

    def step(self) -> list[tuple["Run", "Answer | Exception"]]:
        """One more token of every answer; returns those that ended, or what went wrong at an end. Raises
        DeviceError where memory runs out, after which only `clear` makes sense."""
        with torch.inference_mode(), explained_memory():
            ended = self._decoding.step()
            for run, _ in self._runs.values():
                run.clock.mark(FIRST_TOKEN)
            return [self._answer(sequence) for sequence in ended]

    def _answer(self, sequence: Sequence) -> tuple["Run", "Answer | Exception"]:
        run, began = self._runs.pop(id(sequence))
        run.clock.add("generate", run.clock.elapsed - began)
        try:
            return run, self._session.answer(run, sequence)
        except Exception as error:  # the others go on
            return run, error

    def clear(self) -> None:
        """Forget the answers that have not ended, and give their memory back."""
        self._decoding.clear()
        self._decoder.release()
        self._runs.clear()


def together(slots: int, ahead: int = 0) -> Decoder:
    """The decoder of up to `slots` answers at a time: each joins when it was prefilled and leaves when it
    ends. Where the session has no graph to decode in, it is one at a time.

    ahead: questions that are prefilled, or in the making, by a thread of its own before they are taken; 0:
           each when there is room, between two steps
    """

    def decode(session: "Session", arrivals: Arrivals, listener: Listener) -> Iterator[Outcome]:
        if session.graph is None:
            yield from one_by_one(session, arrivals, listener)
        elif ahead:
            with PrefilledAhead(arrivals, session.adapter.device, ahead=ahead) as prefilled:
                yield from decode_all(session, prefilled, listener)
        else:
            yield from decode_all(session, arrivals, listener)

    def decode_all(
        session: "Session", arrivals: Arrivals | PrefilledAhead, listener: Listener
    ) -> Iterator[Outcome]:
        answers = AnswersTogether(session, slots)
        making: dict[int, Arrival] = {}
        waiting: Arrival | None = None  # there was no memory for it beside the others
        crowded = False  # and none of these has ended since
        while making or waiting or not arrivals.ended:
            while answers.free and not crowded:
                waited = waiting is not None
                arrival, waiting = waiting or arrivals.take(wait=not making), None
                if arrival is None:
                    break
                elsewhere = arrival.run is not None and isinstance(arrivals, PrefilledAhead)
                if arrival.run is None and (waited or arrival.error is None):
                    arrival = arrivals.prefilled(arrival)
                error = arrival.error
                if arrival.run is not None:
                    try:
                        answers.add(arrival.run, other_stream=elsewhere)
                        making[id(arrival.run)] = replace(arrival, clip=None)  # whose memory others may need
                    except Exception as met:
                        error = met
                if error is None:
                    continue
                if not arrival.lacked_memory(error):
                    yield arrival, error
                    continue
                arrival = replace(arrival, run=None)
                error = None  # whose frames hold what it had become
                if arrivals.hold() or making:
                    waiting, crowded = arrival, bool(making)
                else:  # one place may fit where buffers of all places do not
                    answers.clear()
                    yield by_itself(session, arrivals, arrival, listener)
            ended, failed = [], None
            try:
                ended = answers.step() if making else []
            except Exception as met:  # where a step fails, it does for all that take part
                answers.clear()
                failed, crowded = met, False
            if failed is not None:
                lost, alone = list(making.values()), isinstance(failed, DeviceError)
                making.clear()
                if alone:  # there may be memory for each by itself
                    arrivals.hold()
                for arrival in lost:
                    if alone:
                        yield by_itself(session, arrivals, arrival, listener)
                    else:
                        yield arrival, failed
            for run, answer in ended:
                crowded = False
                yield making.pop(id(run)), answer

    return decode
