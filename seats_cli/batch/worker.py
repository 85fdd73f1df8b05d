"""What each process of a crew does: it loads a model, then asks for tasks and does them until told to end."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from seats_cli.errors import SeatsError, unexpected

Task = TypeVar("Task", contravariant=True)
Job = TypeVar("Job", contravariant=True)
Record = dict[str, Any]
Handed = tuple[int, Any, tuple[Any, ...]]  # a task's index, itself, and which of its jobs are to be done


class Doing(Protocol[Task, Job]):
    """What workers do; it travels to them, so its class stands in a module.

    limits: keywords of media.Limits for the session
    """

    @property
    def limits(self) -> Mapping[str, Any]: ...

    def describe(self, session: Any) -> Any:
        """What a loaded model has to tell. Raises what keeps it from the work."""
        ...

    def run(self, session: Any, handed: Iterator[Handed], folder: Path) -> Iterator[tuple[int, Any, Record]]:
        """Every job of every task that is handed, as they are finished: (task's index, job, record).

        `handed` may be asked from another thread, and is when there is room for another task: then only does
        one come. `folder`: for what is made on the way."""
        ...

    def failure(self, task: Task, job: Job, error: Exception) -> Record:
        """The record of a job whose worker died."""
        ...

    def name(self, task: Task) -> str:
        """A task in words."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to begin. `model`: keywords of ModelOptions; `threads`: None leaves them alone."""

    model: Mapping[str, Any]
    threads: int | None
    doing: Doing[Any, Any]
    folder: Path


class _Link:
    """The worker's end of the pipe, which several threads may speak into."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._speaking = threading.Lock()

    def say(self, *message: Any) -> None:
        """Send a message."""
        with self._speaking:
            self._link.send(message)

    def handed(self) -> Iterator[Handed]:
        """Tasks, each asked for, until None comes."""
        while True:
            self.say("next")
            message = self._link.recv()
            if message is None:
                return
            yield message


def serve(connection: Connection, recipe: Recipe) -> None:
    """Load a model, then do the tasks that come over the pipe until it closes or None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    link = _Link(connection)
    try:
        session = _session(link, recipe)
        from seats_cli.batch.streams import one_core_each

        link.say("hello", recipe.doing.describe(session))
        with one_core_each(session.adapter.device):
            for index, job, record in recipe.doing.run(session, link.handed(), recipe.folder):
                link.say("record", index, job, record)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is there any more
        with suppress(OSError):  # another worker is not done yet: it will take the folder away
            recipe.folder.rmdir()
        sys.exit(1)
    except Exception as error:
        shown = error if isinstance(error, SeatsError) else unexpected(error)
        shown.add_note(traceback.format_exc())  # travels with it, for --debug
        shown.__cause__ = None
        with suppress(OSError):
            link.say("failed", shown)


def _session(link: _Link, recipe: Recipe) -> Any:
    import torch

    from seats_cli.session import Limits, ModelOptions, Session

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    loading = True

    def log(message: str) -> None:
        if loading:  # what each question is asked with is nobody's interest here
            link.say("log", message)

    session = Session(
        ModelOptions(**recipe.model),
        log=log,
        note=lambda _: None,
        warn=lambda message: link.say("warn", message),
        limits=Limits(**recipe.doing.limits),
    )
    loading = False
    return session
