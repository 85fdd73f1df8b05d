"""Who traces: a session in this process, or several in others, as `seats eval` has them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from seats_cli.lab.records import Record
from seats_cli.lab.settings import Setting
from seats_cli.lab.sweep import Asking, ClipTask, Described, Job, Listener, describe
from seats_cli.lab.trace import trace_clip
from seats_cli.lab.tracing import Tracing
from seats_cli.lab.workers import Crew, Work
from seats_cli.measure.report import jsonable
from seats_cli.session import Session


def describe_trace(session: Session, setting: Setting, tracing: Tracing) -> Described:
    """What the session is and what its traces depend on. Raises UsageError for layers that it has not."""
    tracing.removal_layers(session.adapter.n_layers)
    found = describe(session, (setting,), tracing)
    setup, geometry = session.setup(tracing.options(setting)), session.adapter.geometry
    resolved = {
        "model_type": geometry.family,
        "layers": geometry.n_layers,
        "hidden_size": geometry.hidden,
        "preset": setup.preset.name,
        "windows": jsonable(setup.preset.windows),
        "caps": jsonable(setup.preset.caps),
        "merge": setup.options.merge,
    }
    return replace(found, resolved=(resolved,))


@dataclass(frozen=True)
class TracingAlone:
    """A team of one. `at` is told of each clip before it is read."""

    session: Session
    setting: Setting
    tracing: Tracing
    described: Described
    at: Callable[[ClipTask], None] = lambda _: None
    size: int = 1

    def run(self, work: Work, listener: Listener) -> Iterator[tuple[int, Job, Record]]:
        """Clip after clip."""
        for index, (task, jobs) in enumerate(work):
            self.at(task)
            for job, record in trace_clip(self.session, task, jobs, self.setting, self.tracing):
                yield index, job, record


def trace_work(
    session: Session,
    task: ClipTask,
    jobs: Sequence[Job],
    settings: Sequence[Setting],
    asking: Asking,
    folder: Path | None = None,
) -> Iterator[tuple[Job, Record]]:
    """`trace_clip` as workers call it: a trace has one setting."""
    return trace_clip(session, task, jobs, settings[0], cast(Tracing, asking), folder)


def describe_work(session: Session, settings: Sequence[Setting], asking: Asking) -> Described:
    """`describe_trace`, likewise."""
    return describe_trace(session, settings[0], cast(Tracing, asking))


class TracingCrew(Crew):
    """Processes that trace, each with a session of its own."""

    describes = staticmethod(describe_work)
    runs = staticmethod(trace_work)
