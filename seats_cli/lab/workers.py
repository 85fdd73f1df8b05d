"""A sweep in several processes, each with a session of its own: clips are handed out one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from seats_cli.batch.crew import Crew as AnyCrew
from seats_cli.batch.worker import Handed
from seats_cli.lab.records import Record, failure
from seats_cli.lab.settings import Setting
from seats_cli.lab.sweep import Asking, ClipTask, Described, Job, describe, run_clip

Work = Sequence[tuple[ClipTask, tuple[Job, ...]]]


@dataclass(frozen=True)
class Sweeping:
    """What the workers of a sweep do (see `batch.worker.Doing`).

    describes, runs: as `sweep.describe` and `sweep.run_clip`; functions of a module, where another process
    finds them
    """

    settings: tuple[Setting, ...]
    asking: Asking
    describes: Callable[..., Described] = describe
    runs: Callable[..., Iterator[tuple[Job, Record]]] = run_clip
    limits: Mapping[str, Any] = field(default_factory=dict)

    def describe(self, session: Any) -> Described:
        """What the session is, and what each setting comes to on it."""
        return self.describes(session, self.settings, self.asking)

    def run(self, session: Any, handed: Iterator[Handed], folder: Path) -> Iterator[tuple[int, Job, Record]]:
        """Clip after clip."""
        for index, task, jobs in handed:
            for job, record in self.runs(session, task, jobs, self.settings, self.asking, folder):
                yield index, job, record

    def failure(self, task: ClipTask, job: Job, error: Exception) -> Record:
        """The record of a job whose worker died."""
        return failure(task.samples[job[0]], self.settings[job[1]], error)

    def name(self, task: ClipTask) -> str:
        """The clip's."""
        return task.clip


class Crew(AnyCrew[ClipTask, Job]):
    """A team of processes (see `sweep.Team`). Another kind of work is a subclass with its own `describes` and
    `runs` (see `Sweeping`)."""

    described: Described
    describes: ClassVar[Callable[..., Described]] = staticmethod(describe)
    runs: ClassVar[Callable[..., Iterator[tuple[Job, Record]]]] = staticmethod(run_clip)

    def __init__(
        self,
        devices: Sequence[str],
        model: Mapping[str, Any],
        settings: Sequence[Setting],
        asking: Asking,
        *,
        warn: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        """`devices`: one a worker; `model`: the other keywords of ModelOptions."""
        doing = Sweeping(tuple(settings), asking, self.describes, self.runs)
        super().__init__(devices, model, doing, warn=warn, log=log)
