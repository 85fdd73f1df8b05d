"""A sweep in several processes, each with a session of its own; this process hands out clips one at a time.

Workers talk over a pipe each, so one that dies takes nothing along: its clip goes to a fresh worker once, and
is recorded as failed if that one dies too.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, cast

from seats_cli.errors import DeviceError, SeatsError, UsageError, unexpected
from seats_cli.lab.records import Record, failure
from seats_cli.lab.settings import Setting
from seats_cli.lab.sweep import Asking, ClipTask, Described, Job, Listener, describe, run_clip

MOST_ON_A_CPU = 8
SMALL_MODEL = 512 * 2**20  # bytes of weights that every core may hold a copy of
TRIES = 2  # of a clip whose worker dies
GRACE_S = 2.0  # for workers to end by themselves

Work = Sequence[tuple[ClipTask, tuple[Job, ...]]]


class WorkerError(SeatsError):
    """A worker process ended before its work did."""

    kind = "worker"


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to begin. `model`: keywords of ModelOptions; `threads`: None leaves them alone.

    describes, runs: what it does, as `sweep.describe` and `sweep.run_clip`; functions of a module, where
    another process finds them.
    """

    model: Mapping[str, Any]
    threads: int | None
    settings: tuple[Setting, ...]
    asking: Asking
    folder: Path
    describes: Callable[..., Described] = describe
    runs: Callable[..., Iterator[tuple[Job, Record]]] = run_clip


def choose_workers(asked: int | None, n_clips: int, model: Mapping[str, Any]) -> list[str]:
    """The device of each worker: as many as were asked for, else one a GPU or one a core; at most one a clip.

    model: keywords of ModelOptions. On a CPU at most 8, and a single one for a model that is not small: each
    would hold its own copy. A model that is spread over the devices has one worker; UsageError for more.
    """
    device, spread = model.get("device", "auto"), model.get("device_map", "none")
    if spread != "none":
        if asked is not None and asked > 1:
            raise UsageError(
                f"--workers {asked} and --device-map {spread} contradict each other: a model that is spread "
                "over the devices leaves none for another worker",
                hint="leave out one of them",
            )
        return [device]
    n_gpus = _gpus() if device in ("auto", "cuda") else 0
    if n_gpus:
        n = asked or n_gpus
        devices = [f"cuda:{index % n_gpus}" for index in range(n)]
    else:
        one_a_core = (device == "cpu" or (device == "auto" and not _has_mps())) and _is_small(
            model.get("model", "tiny")
        )
        n = asked or (min(cores(), MOST_ON_A_CPU) if one_a_core else 1)
        devices = [device] * n
    devices = devices[: max(1, n_clips)]
    return devices if len(devices) > 1 else [device]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def shared_gpu(devices: Sequence[str]) -> dict[str, bool]:
    """Keywords of ModelOptions where several workers share a GPU: no fast paths, since each process would
    compile its kernels and record its graphs first, which takes longer than most sweeps."""
    on_gpu = [device for device in devices if device.startswith("cuda")]
    return {"compile": False, "graphs": False} if len(set(on_gpu)) < len(on_gpu) else {}


def _is_small(model: str) -> bool:
    from seats_cli.presets import resolve_model

    folder = Path(resolve_model(model)).expanduser()
    if resolve_model(model) == "tiny":
        return True
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    return bool(sizes) and sum(sizes) <= SMALL_MODEL


# ---- the parent's side ------------------------------------------------------------------------------------


@dataclass
class Worker:
    """One process: what it is at, if anything. `ready` once its model is loaded."""

    device: str
    process: BaseProcess
    link: Connection
    ready: bool = False
    index: int | None = None


class Crew:
    """A team of processes (see `sweep.Team`). Use it as a context manager: leaving ends them all.

    Made once the first worker has its model. Raises what kept the workers from loading it. Another kind of
    work is a subclass with its own `describes` and `runs` (see `Recipe`).
    """

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
        on_cpu = all(device in ("auto", "cpu") for device in devices)
        self._model = {**model, **shared_gpu(devices)}
        self._threads = 1 if on_cpu and len(devices) > 1 else None
        self._settings, self._asking = tuple(settings), asking
        self._warn, self._log = warn, log
        self._place = tempfile.TemporaryDirectory(prefix="seats-eval-")
        self._workers: list[Worker] = []
        self._vacant: list[str] = []  # devices whose idle workers ended
        self._described: Described | None = None
        try:
            for device in devices:
                self._workers.append(self._hire(device))
            while self._described is None:
                for worker, message in self._heard():
                    self._take_in(worker, message)
            self.described = self._described
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def run(self, work: Work, listener: Listener) -> Iterator[tuple[int, Job, Record]]:
        """Hand out clips in order to whoever is free; yields records as they arrive.

        Ends once every worker is idle again, so that it may be called once more.
        """
        self._fill_vacant()
        waiting = list(range(len(work)))[::-1]
        left = [list(jobs) for _, jobs in work]
        tries = [0] * len(work)
        while any(left) or any(worker.index is not None for worker in self._workers):
            for worker in [w for w in self._workers if w.ready and w.index is None][: len(waiting)]:
                index = waiting[-1]
                # a worker that is gone is noticed when it is listened to
                if _send(worker.link, (work[index][0], tuple(left[index]))):
                    worker.index = waiting.pop()
                    tries[index] += 1
            for worker, message in self._heard():
                at = worker.index
                if at is None and worker.ready and (message is None or message[0] == "failed"):
                    self._lose_idle(worker, message, listener, rehire=bool(waiting))
                elif at is None:
                    self._take_in(worker, message)
                elif message is not None and message[0] == "record":
                    left[at].remove(message[1])
                    yield at, message[1], message[2]
                elif message is not None and message[0] == "done":
                    assert not left[at]
                    worker.index = None
                elif message is not None and message[0] == "warn":
                    listener.warn(message[1], work[at][0].clip)
                else:
                    task, why = work[at][0], self._replace(worker, message)
                    if left[at] and tries[at] < TRIES:
                        listener.warn(f"{why} in the middle of {task.clip}, which is tried once more", None)
                        waiting.append(at)
                    else:
                        error = WorkerError(f"{why} at this clip, {TRIES} times", hint=_FEWER)
                        for i, k in left[at]:
                            yield at, (i, k), failure(task.samples[i], self._settings[k], error)
                        left[at].clear()

    def close(self) -> None:
        """End every worker, at once if it is at work, and take away what they left."""
        for worker in self._workers:
            if worker.index is None and worker.ready:
                _send(worker.link, None)
            else:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(GRACE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.link.close()
        self._workers.clear()
        self._place.cleanup()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hire(self, device: str) -> Worker:
        model = {**self._model, "device": device}
        folder = Path(self._place.name)
        recipe = Recipe(model, self._threads, self._settings, self._asking, folder, self.describes, self.runs)
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
        """What a worker says that is at no clip: it is ready, it cannot start, or it is gone."""
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
            self._described = self._described or message[1]
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
        self, worker: Worker, message: tuple[Any, ...] | None, listener: Listener, *, rehire: bool
    ) -> None:
        """An idle worker has ended: a fresh one comes at once if clips wait, else with the next run."""
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


# ---- the worker's side ------------------------------------------------------------------------------------


def serve(link: Connection, recipe: Recipe) -> None:
    """Load a model, then run the clips that come over the link until it closes or None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if recipe.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
    try:
        session = _session(link, recipe)
        link.send(("hello", recipe.describes(session, recipe.settings, recipe.asking)))
        while (message := link.recv()) is not None:
            task, jobs = message
            for job, record in recipe.runs(
                session, task, jobs, recipe.settings, recipe.asking, recipe.folder
            ):
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


def _session(link: Connection, recipe: Recipe) -> Any:
    import torch

    from seats_cli.session import ModelOptions, Session

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    loading = True

    def log(message: str) -> None:
        if loading:  # what each question is asked with is nobody's interest here
            link.send(("log", message))

    session = Session(
        ModelOptions(**recipe.model),
        log=log,
        note=lambda _: None,
        warn=lambda message: link.send(("warn", message)),
    )
    loading = False
    return session
