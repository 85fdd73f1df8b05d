"""Who traces: a session in this process, or several in others, as `seats eval` has them."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from seats_cli.errors import SeatsError, unexpected
from seats_cli.lab.records import Record
from seats_cli.lab.settings import Setting
from seats_cli.lab.sweep import ClipTask, Described, Job, Listener, describe
from seats_cli.lab.trace import trace_clip
from seats_cli.lab.tracing import Tracing
from seats_cli.lab.workers import Crew, Recipe, Work, Worker, _interrupts_held_back, _send, _session
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


class TracingCrew(Crew):
    """Processes that trace, each with a session of its own."""

    def _hire(self, device: str) -> Worker:
        model = {**self._model, "device": device}
        recipe = Recipe(model, self._threads, self._settings, self._asking, Path(self._place.name))
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve_traces, args=(there, recipe), daemon=True)
        with _interrupts_held_back():
            process.start()
        there.close()  # so that the worker's death closes the pipe
        return Worker(device, process, here)


def serve_traces(link: Connection, recipe: Recipe) -> None:
    """What `workers.serve` does, for traces."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    setting, tracing = recipe.settings[0], cast(Tracing, recipe.asking)
    try:
        session: Any = _session(link, recipe)
        link.send(("hello", describe_trace(session, setting, tracing)))
        while (message := link.recv()) is not None:
            task, jobs = message
            for job, record in trace_clip(session, task, jobs, setting, tracing, recipe.folder):
                link.send(("record", job, record))
            link.send(("done",))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is there any more
        with suppress(OSError):  # another worker is not done yet: it will take the folder away
            recipe.folder.rmdir()
        sys.exit(1)
    except Exception as error:
        shown = error if isinstance(error, SeatsError) else unexpected(error)
        shown.add_note(traceback.format_exc())  # travels with it, for --debug
        shown.__cause__ = None
        _send(link, ("failed", shown))
