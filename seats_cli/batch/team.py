"""Who answers a batch: a session in this process, or several in others; each reads clips ahead."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seats_cli.batch.crew import Crew
from seats_cli.batch.decoders import IN_THIS_PROCESS, Pace, decoders
from seats_cli.batch.reading import Clip, Listener
from seats_cli.batch.records import Asking, Record, failure
from seats_cli.batch.run import one_by_one, run_batch
from seats_cli.batch.together import together
from seats_cli.batch.worker import Handed
from seats_cli.media import DistantOpener

if TYPE_CHECKING:
    from seats_cli.session import Session


@dataclass(frozen=True)
class Answering:
    """What workers do (see `worker.Doing`): a task is a clip with its items, a job the key of one."""

    asking: Asking
    pace: Pace = IN_THIS_PROCESS

    @property
    def limits(self) -> Mapping[str, Any]:
        """What a file may cost."""
        return self.asking.limits

    def describe(self, session: "Session") -> dict[str, bool]:
        """What a person should know of the model. Raises what is wrong for every file."""
        return described(session, self.asking)

    def run(
        self, session: "Session", handed: Iterator[Handed], folder: Path
    ) -> Iterator[tuple[int, str, Record]]:
        """The scheduler over the clips that come, which it takes as it has room for them."""
        places: dict[str, int] = {}

        def clips() -> Iterator[Clip]:
            for index, clip, keys in handed:
                left = tuple(item for item in clip if item.key in keys)
                places.update((item.key, index) for item in left)
                yield left

        for record in answered(session, clips(), self.asking, self.pace):
            yield places.pop(record["key"]), record["key"], record

    def failure(self, task: Clip, job: str, error: Exception) -> Record:
        """The record of a question whose worker died."""
        return failure(next(item for item in task if item.key == job), self.asking, error)

    def name(self, task: Clip) -> str:
        """The file."""
        return task[0].path


def answered(
    session: "Session",
    clips: Iterable[Clip],
    asking: Asking,
    pace: Pace,
    *,
    openers: Sequence[DistantOpener] | None = None,
    listener: Listener = Listener(),  # noqa: B008 - frozen
) -> Iterator[Record]:
    """The records of `run_batch` at a pace. `openers`: of processes that are up already."""
    with decoders(pace if openers is None else IN_THIS_PROCESS) as own:
        yield from run_batch(
            session,
            clips,
            asking,
            listener=listener,
            ahead=pace.ahead,
            readers=max(pace.readers, 1),
            openers=own if openers is None else openers,
            overtake=pace.overtake,
            decode=together(pace.slots, ahead=pace.prefilled) if pace.slots > 1 else one_by_one,
        )


def described(session: "Session", asking: Asking) -> dict[str, bool]:
    """What a person should know of the model. Raises what is wrong with the options for every file."""
    from seats_cli.session import AskOptions

    session.setup(AskOptions(**asking.asked))
    return {
        "is_embedded": session.is_embedded,
        "random_weights": session.random_weights,
        "decodes_together": session.graph is not None,
    }


class AnsweringCrew(Crew[Clip, str]):
    """Processes that answer, one a device."""

    def __init__(
        self,
        devices: Sequence[str],
        asking: Asking,
        *,
        warn: Callable[[str], None],
        log: Callable[[str], None],
        pace: Pace = IN_THIS_PROCESS,
    ) -> None:
        """`devices`: one a worker; `pace`: of each."""
        super().__init__(devices, asking.model, Answering(asking, pace), warn=warn, log=log)

    def answers(self, clips: Sequence[Clip], listener: Listener) -> Iterator[Record]:
        """A record for every question, as they are finished."""
        work = [(clip, tuple(item.key for item in clip)) for clip in clips]
        for index, _, record in self.run(work, listener):
            listener.stage(clips[index][0].path, "answered", 0, 0)
            yield record
