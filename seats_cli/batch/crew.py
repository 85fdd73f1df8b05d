"""Work in several processes, each with a session of its own; this process hands out tasks, one whenever a
worker asks for one, so that nobody sits on tasks that another could begin.

Workers talk over a pipe each, so one that dies takes nothing along: what it had in hand goes to fresh workers
once, each task alone, so that the guilty one is known; it is recorded as failed if that worker dies too.
"""

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast

from seats_cli.batch.devices import shared_gpu
from seats_cli.batch.worker import Doing, Recipe, Record, serve
from seats_cli.errors import DeviceError, SeatsError

TRIES = 2  # of a task whose worker dies
GRACE_S = 5.0  # for workers to end by themselves

Task = TypeVar("Task")
Job = TypeVar("Job")


class WorkerError(SeatsError):
    """A worker process ended before its work did."""

    kind = "worker"


class Hears(Protocol):
    """Who is told of losses: a message, and the task that it is about."""

    @property
    def warn(self) -> Callable[[str, str | None], None]: ...


@dataclass
class Worker:
    """One process and the tasks that it has in hand, oldest first. `ready` once its model is loaded, `asks`
    while it waits for a task."""

    device: str
    process: BaseProcess
    link: Connection
    ready: bool = False
    asks: bool = False
    hand: list[int] = field(default_factory=list)

    @property
    def index(self) -> int | None:
        """The task that it is at, if anything."""
        return self.hand[0] if self.hand else None


class Crew(Generic[Task, Job]):
    """A team of processes. Use it as a context manager: leaving ends them all.

    Made once the first worker has its model. Raises what kept the workers from loading it. `described`: what
    it had to tell.
    """

    def __init__(
        self,
        devices: Sequence[str],
        model: Mapping[str, Any],
        doing: Doing[Task, Job],
        *,
        warn: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        """`devices`: one a worker; `model`: the other keywords of ModelOptions."""
        on_cpu = all(device in ("auto", "cpu") for device in devices)
        self._model = {**model, **shared_gpu(devices)}
        self._threads = 1 if on_cpu and len(devices) > 1 else None
        self._doing = doing
        self._warn, self._log = warn, log
        self._place = tempfile.TemporaryDirectory(prefix="seats-workers-")
        self._workers: list[Worker] = []
        self._vacant: list[str] = []  # devices whose idle workers ended
        self.described: Any = None
        try:
            for device in devices:
                self._workers.append(self._hire(device))
            while not any(worker.ready for worker in self._workers):
                for worker, message in self._heard():
                    self._take_in(worker, message)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def run(
        self, work: Sequence[tuple[Task, tuple[Job, ...]]], listener: Hears
    ) -> Iterator[tuple[int, Job, Record]]:
        """Hand out tasks in order to whoever has room; yields records as they arrive.

        Ends once every worker is idle again, so that it may be called once more.
        """
        self._fill_vacant()
        shift = _Shift(work, [list(jobs) for _, jobs in work], list(range(len(work)))[::-1])
        while any(shift.left) or any(worker.hand for worker in self._workers):
            self._hand_out(shift)
            for worker, message in self._heard():
                if not worker.hand and worker.ready and (message is None or message[0] == "failed"):
                    self._lose_idle(worker, message, listener, rehire=bool(shift.waiting))
                elif message is not None and message[0] == "record":
                    _, at, job, record = message
                    shift.left[at].remove(job)
                    if not shift.left[at]:
                        worker.hand.remove(at)
                    yield at, job, record
                elif message is not None and message[0] == "warn" and worker.hand:
                    listener.warn(message[1], self._doing.name(work[worker.hand[0]][0]))
                elif not worker.hand or (message is not None and message[0] in ("next", "log", "warn")):
                    self._take_in(worker, message)
                else:
                    yield from self._lost(shift, worker, message, listener)

    def close(self) -> None:
        """End every worker, at once if it is at work, and take away what they left."""
        for worker in self._workers:
            if not worker.hand and worker.ready:
                _send(worker.link, None)
            else:
                worker.process.terminate()
        until = time.monotonic() + GRACE_S
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.link.close()
        self._workers.clear()
        self._place.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- tasks -------------------------------------------------------------------------------------------
    def _hand_out(self, shift: "_Shift") -> None:
        """A task to each worker that asks for one, the emptiest first, but no more than its share of what is
        left: others may still be loading. What a worker may have died of goes to one that has nothing in
        hand, and nothing is put beside it.

        A worker that asks is listening, so sending to it never waits for long."""
        in_hand = sum(len(worker.hand) for worker in self._workers)
        share = -(-(len(shift.waiting) + in_hand) // len(self._workers)) if self._workers else 0
        for worker in sorted((w for w in self._workers if w.asks), key=lambda w: len(w.hand)):
            if not shift.waiting:
                return
            index = shift.waiting[-1]
            suspected = shift.deaths.get(index) or (worker.hand and shift.deaths.get(worker.hand[0]))
            if worker.hand and (suspected or len(worker.hand) >= share):
                continue
            # a worker that is gone is noticed when it is listened to
            if _send(worker.link, (index, shift.work[index][0], tuple(shift.left[index]))):
                worker.asks = False
                worker.hand.append(shift.waiting.pop())

    def _lost(
        self, shift: "_Shift", worker: Worker, message: tuple[Any, ...] | None, listener: Hears
    ) -> Iterator[tuple[int, Job, Record]]:
        """A worker died over what it had in hand: it is tried once more, or recorded as failed."""
        hand, why = list(worker.hand), self._replace(worker, message)
        again = [index for index in hand if shift.deaths.get(index, 0) + 1 < TRIES]
        for index in hand:
            shift.deaths[index] = shift.deaths.get(index, 0) + 1
        if again:
            names = " or ".join(self._doing.name(shift.work[index][0]) for index in again)
            how = "which is tried once more" if len(again) == 1 else "each tried once more, alone"
            listener.warn(f"{why} in the middle of {names}, {how}", None)
            shift.waiting.extend(again[::-1])
        for index in hand:
            if index in again:
                continue
            error = WorkerError(f"{why} at this clip, {TRIES} times", hint=_FEWER)
            for job in shift.left[index]:
                yield index, job, self._doing.failure(shift.work[index][0], job, error)
            shift.left[index].clear()

    # --- processes ---------------------------------------------------------------------------------------
    def _hire(self, device: str) -> Worker:
        model = {**self._model, "device": device}
        recipe = Recipe(model, self._threads, self._doing, Path(self._place.name))
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, recipe), daemon=True)
        with _interrupts_held_back():
            process.start()
        there.close()  # so that the worker's death closes the pipe
        return Worker(device, process, here)

    def _heard(self) -> list[tuple[Worker, tuple[Any, ...] | None]]:
        """What workers said since last time, at least one message; None from one that is gone."""
        by_link = {worker.link: worker for worker in self._workers}
        if not by_link:
            raise WorkerError("no worker is left", hint=_FEWER)
        said: list[tuple[Worker, tuple[Any, ...] | None]] = []
        for ready in wait(list(by_link)):
            worker = by_link[cast(Connection, ready)]
            try:
                said.append((worker, worker.link.recv()))
            except (EOFError, OSError):
                said.append((worker, None))
        return said

    def _take_in(self, worker: Worker, message: tuple[Any, ...] | None) -> None:
        """What a worker says that is about no task: it is ready, it asks for one, it cannot start, or it is
        gone."""
        if message is None or message[0] == "failed":
            error = (
                message[1]
                if message
                else WorkerError(f"{_death(worker)} while loading the model", hint=_FEWER)
            )
            self._dismiss(worker)
            if not self._workers or not isinstance(error, (DeviceError, WorkerError)):
                raise error  # the others would meet it as well
            self._warn(f"one worker less: {error}")
        elif message[0] == "hello":
            worker.ready = True
            self.described = self.described or message[1]
        elif message[0] == "next":
            worker.asks = True
        elif message[0] == "warn":
            self._warn(message[1])
        elif message[0] == "log":
            self._log(message[1])

    def _replace(self, worker: Worker, message: tuple[Any, ...] | None) -> str:
        """A fresh worker for one that ended; says how it did."""
        why = _end_of(worker, message)
        self._dismiss(worker)
        self._workers.append(self._hire(worker.device))
        return why

    def _lose_idle(
        self, worker: Worker, message: tuple[Any, ...] | None, listener: Hears, *, rehire: bool
    ) -> None:
        """An idle worker has ended: a fresh one comes at once if tasks wait, else with the next run."""
        why = _end_of(worker, message)
        self._dismiss(worker)
        self._vacant.append(worker.device)
        if rehire:
            self._fill_vacant()
        listener.warn(f"{why} while it was idle{'; a fresh one takes its place' if rehire else ''}", None)

    def _fill_vacant(self) -> None:
        while self._vacant:
            self._workers.append(self._hire(self._vacant.pop()))

    def _dismiss(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.link.close()
        worker.process.join(GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@dataclass
class _Shift:
    """One run: the tasks, the jobs left of each, those not in hand (the next one last), and how many workers
    died of each."""

    work: Sequence[tuple[Any, tuple[Any, ...]]]
    left: list[list[Any]]
    waiting: list[int]
    deaths: dict[int, int] = field(default_factory=dict)


_FEWER = "each worker needs memory of its own: try fewer --workers"


def _end_of(worker: Worker, message: tuple[Any, ...] | None) -> str:
    return _death(worker) if message is None else f"a worker gave up ({message[1]})"


def _death(worker: Worker) -> str:
    worker.process.join(GRACE_S)
    code = worker.process.exitcode
    how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
    return f"a worker died{how}"


def _send(link: Connection, message: Any) -> bool:
    try:
        link.send(message)
    except OSError:
        return False
    return True


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits, and processes started meanwhile never see one: it is this process that ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
