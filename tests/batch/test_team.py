"""Workers: they find what one session finds, and a file that kills its worker takes no other along."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from make_clips import pictures, tone, write_clip
from seats_cli.batch import crew as crew_module
from seats_cli.batch import team as module
from seats_cli.batch import worker as worker_module
from seats_cli.batch.crew import Worker, _Shift
from seats_cli.batch.decoders import Pace
from seats_cli.batch.reading import Clip, Listener
from seats_cli.batch.records import Asking, Record
from seats_cli.batch.run import run_batch
from seats_cli.batch.sources import Item
from seats_cli.batch.team import Answering, AnsweringCrew
from seats_cli.batch.worker import Handed
from seats_cli.errors import ModelError, PlanError
from seats_cli.session import ModelOptions, Session

NAMES = "abcdef"


@pytest.fixture(scope="module")
def asking(tiny_checkpoint_path: Path) -> Asking:
    model = {"model": str(tiny_checkpoint_path), "dtype": "float32", "device": "cpu"}
    return Asking(model, {"max_new_tokens": 3, "ratio": 0.3})


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Six clips with two questions each; the third is broken."""
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(NAMES):
        write_clip(folder / f"{name}.mp4", pictures(20 + 2 * number), fps=10, audio=tone(2.0))
    (folder / "c.mp4").write_bytes(b"broken")
    return [
        tuple(
            Item(str(folder / f"{name}.mp4"), text, key=f"{name}{i}")
            for i, text in enumerate(("why?", "how?"))
        )
        for name in NAMES
    ]


@pytest.fixture(scope="module")
def plain(asking: Asking, clips: list[Clip]) -> list[Record]:
    session = Session(ModelOptions(**asking.model))
    return timeless(run_batch(session, clips, asking, ahead=0))


def timeless(records: Any) -> list[Record]:
    """By key, without what no two runs share."""
    return sorted(({**record, "timing": None} for record in records), key=lambda record: record["key"])


class Poisoned(Answering):
    """A worker that dies whenever it opens e.mp4, and once when it opens b.mp4."""

    def run(self, session: Any, handed: Iterator[Handed], folder: Path) -> Iterator[tuple[int, str, Record]]:
        read = session.read

        def reading(path: str, *rest: Any, **options: Any) -> Any:
            once = folder / "b-has-killed"
            name = Path(path).name
            if name == "e.mp4" or (name == "b.mp4" and not once.exists()):
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return read(path, *rest, **options)

        session.read = reading
        return super().run(session, handed, folder)


def test_workers_find_what_one_session_finds_whoever_dies(
    asking: Asking, clips: list[Clip], plain: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Answering", Poisoned)
    warned: list[str] = []
    listener = Listener(warn=lambda message, path: warned.append(message))
    with AnsweringCrew(["cpu", "cpu"], asking, warn=warned.append, log=lambda _: None) as crew:
        assert crew.described == {
            "is_embedded": False,
            "random_weights": False,
            "decodes_together": False,
        }
        found = timeless(crew.answers(clips, listener))
    assert multiprocessing.active_children() == []
    assert [record["key"] for record in found] == [record["key"] for record in plain]
    died = [record for record in found if Path(record["path"]).name == "e.mp4"]
    assert [record["error"]["kind"] for record in died] == ["worker", "worker"]
    assert "signal 9" in died[0]["error"]["message"]
    others = [record for record in found if record not in died]
    assert others == [record for record in plain if Path(record["path"]).name != "e.mp4"]
    assert [record["error"]["kind"] for record in others if not record["ok"]] == ["media_format"] * 2
    again = ("which is tried once more", "each tried once more, alone")  # by how many it had in hand
    assert any(message.endswith(again) for message in warned)


def test_a_crew_may_be_asked_again(asking: Asking, clips: list[Clip], plain: list[Record]) -> None:
    with AnsweringCrew(["cpu"], asking, warn=pytest.fail, log=lambda _: None) as crew:
        for part in (clips[:2], clips[2:]):
            keys = {item.key for clip in part for item in clip}
            found = timeless(crew.answers(part, Listener()))
            assert found == [record for record in plain if record["key"] in keys]
            assert all(not worker.hand for worker in crew._workers)


def test_many_and_large_tasks_fill_no_pipe(asking: Asking, tmp_path: Path) -> None:
    """A worker sent more than it asks for, that tells of more than is heard, would wait for ever."""
    path = str(tmp_path / "none.mp4")
    clips = [(Item(path, "why? " * 30_000, key=str(number)),) for number in range(20)]
    pace = Pace(readers=0, slots=8)
    found: set[str] = set()
    with AnsweringCrew(["cpu"], asking, warn=pytest.fail, log=lambda _: None, pace=pace) as crew:
        thread = threading.Thread(
            target=lambda: found.update(record["key"] for record in crew.answers(clips, Listener())),
            daemon=True,
        )
        thread.start()
        thread.join(120)
        assert not thread.is_alive()
    assert found == {str(number) for number in range(20)}


def test_the_first_to_be_ready_leaves_the_others_their_share(asking: Asking) -> None:
    class Sent:
        """A worker's end of a pipe, of which nobody is at the other."""

        def __init__(self) -> None:
            self.tasks: list[int] = []

        def send(self, message: Any) -> None:
            self.tasks.append(message[0])

    crew: Any = AnsweringCrew.__new__(AnsweringCrew)
    ready, loading = (Worker("cpu", None, Sent()) for _ in range(2))  # type: ignore[arg-type]
    crew._workers = [ready, loading]
    work: Any = [(None, (number,)) for number in range(5)]
    shift = _Shift(work, [list(jobs) for _, jobs in work], [4, 3, 2, 1, 0])
    for _ in range(10):
        ready.asks = True
        crew._hand_out(shift)
    assert ready.hand == [0, 1, 2]
    loading.asks = True
    crew._hand_out(shift)
    assert loading.hand == [3]
    crew._workers = [ready]  # the other has died
    crew._hand_out(shift)
    assert ready.hand == [0, 1, 2, 4]


def test_what_a_worker_had_in_hand_is_tried_once_more_each_alone(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew: Any = AnsweringCrew.__new__(AnsweringCrew)
    crew._doing = SimpleNamespace(name=str, failure=lambda task, job, error: {"error": error.message})
    monkeypatch.setattr(crew, "_replace", lambda worker, message: "a worker died", raising=False)
    worker = Worker("cpu", None, None, hand=[0, 1])  # type: ignore[arg-type]
    work: Any = [(f"{name}.mp4", ("x", "y")) for name in "abc"]
    shift = _Shift(work, [list(jobs) for _, jobs in work], [2])
    warned: list[str] = []
    listener = Listener(warn=lambda message, path: warned.append(message))
    assert list(crew._lost(shift, worker, None, listener)) == []
    assert warned == ["a worker died in the middle of a.mp4 or b.mp4, each tried once more, alone"]
    assert shift.waiting == [2, 1, 0]  # the next one last
    worker.hand = [0]
    failed = list(crew._lost(shift, worker, None, listener))
    told = {"error": "a worker died at this clip, 2 times"}
    assert failed == [(0, "x", told), (0, "y", told)]
    assert shift.waiting == [2, 1, 0]
    assert shift.left[0] == []


def test_workers_that_do_not_end_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Stuck:
        """A process that ends only when it is killed."""

        alive = True

        def join(self, timeout: float = 0.0) -> None:
            nonlocal now
            now += timeout

        def is_alive(self) -> bool:
            return self.alive

        def kill(self) -> None:
            self.alive = False

        terminate = join

    monkeypatch.setattr(crew_module, "time", SimpleNamespace(monotonic=lambda: now))
    crew: Any = AnsweringCrew.__new__(AnsweringCrew)
    processes = [Stuck() for _ in range(3)]
    link = SimpleNamespace(close=lambda: None)
    crew._workers = [Worker("cpu", process, link) for process in processes]  # type: ignore[arg-type]
    crew._place = SimpleNamespace(cleanup=lambda: None)
    crew.close()
    assert now == crew_module.GRACE_S
    assert not any(process.alive for process in processes)


def test_what_is_wrong_for_every_file_is_said_once(asking: Asking, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ModelError, match=r"no config\.json"):
        AnsweringCrew(["cpu"], asking.on(model=str(tmp_path)), warn=told.append, log=lambda _: None)
    misfit = replace(asking, asked={**asking.asked, "preset": "qwen2_5_omni_7b"})
    with pytest.raises(PlanError):
        AnsweringCrew(["cpu"], misfit, warn=told.append, log=lambda _: None)
    assert told == []


def test_a_worker_beside_a_gpu_works_on_one_core_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its model is there."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is none
    seen: list[int] = []

    class Noting(Answering):
        def describe(self, session: Any) -> dict[str, bool]:
            seen.append(torch.get_num_threads())
            return {}

        def run(self, session: Any, handed: Any, folder: Path) -> Iterator[tuple[int, str, Record]]:
            seen.append(torch.get_num_threads())
            yield from ()

    session = SimpleNamespace(adapter=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(worker_module, "_session", lambda *_: session)
    here, there = multiprocessing.Pipe()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        worker_module.serve(there, worker_module.Recipe({}, None, Noting(Asking({}, {})), tmp_path))
        assert (seen, torch.get_num_threads()) == ([3, 1], 3)
    finally:
        torch.set_num_threads(before)
    assert here.recv()[0] == "hello"
