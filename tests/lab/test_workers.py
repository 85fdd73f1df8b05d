"""Workers: how many and where, and that a dead one costs nothing but time."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from lab.sweeping import ASKING, SETTINGS, run, timeless
from seats_cli.batch import crew as crew_module
from seats_cli.batch import devices as workers
from seats_cli.batch.devices import choose_workers, shared_gpu
from seats_cli.errors import ModelError, UsageError
from seats_cli.lab.records import Record
from seats_cli.lab.sweep import ClipTask, Listener
from seats_cli.lab.workers import Crew


@pytest.mark.parametrize(
    ("asked", "n_clips", "device", "model", "gpus", "expected"),
    [
        (None, 40, "auto", "tiny", 0, ["auto"] * 4),
        (None, 3, "cpu", "tiny", 0, ["cpu"] * 3),
        (None, 1, "cpu", "tiny", 0, ["cpu"]),
        (None, 40, "cpu", "Qwen/Qwen2.5-Omni-7B", 0, ["cpu"]),
        (3, 40, "cpu", "Qwen/Qwen2.5-Omni-7B", 0, ["cpu"] * 3),
        (None, 40, "auto", "omni-7b", 1, ["auto"]),
        (None, 40, "auto", "omni-7b", 2, ["cuda:0", "cuda:1"]),
        (4, 40, "auto", "tiny", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        (4, 40, "cuda:1", "tiny", 2, ["cuda:1"] * 4),
        (None, 40, "cuda:1", "tiny", 2, ["cuda:1"]),
        (None, 40, "cpu", "tiny", 2, ["cpu"] * 4),
        (1, 40, "auto", "omni-7b", 2, ["auto"]),
        (None, 40, "mps", "tiny", 0, ["mps"]),
    ],
)
def test_how_many_workers_and_where(
    asked: int | None,
    n_clips: int,
    device: str,
    model: str,
    gpus: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: gpus)
    monkeypatch.setattr(workers, "_has_mps", lambda: False)
    monkeypatch.setattr(workers, "cores", lambda: 4)
    assert choose_workers(asked, n_clips, {"device": device, "model": model}) == expected


def test_a_model_spread_over_the_gpus_has_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: 2)
    spread = {"device": "auto", "device_map": "auto", "model": "omni-7b"}
    assert choose_workers(None, 40, spread) == choose_workers(1, 40, spread) == ["auto"]
    with pytest.raises(UsageError, match="--workers 2 and --device-map auto contradict"):
        choose_workers(2, 40, spread)


def test_a_checkpoint_is_small_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 4)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    assert len(choose_workers(None, 9, {"device": "cpu", "model": str(tmp_path)})) == 4
    monkeypatch.setattr(workers, "SMALL_MODEL", 99)
    assert len(choose_workers(None, 9, {"device": "cpu", "model": str(tmp_path)})) == 1


def crew(path: Path, n: int, told: list[str]) -> Crew:
    """Workers with the tiny random checkpoint."""
    model = {"model": str(path), "dtype": "float32"}
    return Crew(["cpu"] * n, model, SETTINGS, ASKING, warn=told.append, log=lambda _: None)


def test_workers_find_what_one_session_finds_and_a_dead_one_costs_nothing(
    tiny_checkpoint_path: Path, tasks: list[ClipTask], plain: dict[str, Record]
) -> None:
    """Each clip's first worker is killed in the middle of it."""
    warned: list[str] = []
    order: list[str] = []
    killed: set[int | None] = {None}  # clips whose worker was killed, and no clip
    with crew(tiny_checkpoint_path, 2, warned) as team:

        def kill(done: int, _: int) -> None:
            for worker in team._workers:
                if done and worker.index not in killed and worker.process.pid:
                    killed.add(worker.index)
                    os.kill(worker.process.pid, signal.SIGKILL)

        kept = run(
            team,
            tasks,
            record=lambda record: order.append(record["clip"]),
            progress=kill,
            warn=lambda message, _: warned.append(message),
        )
        processes = [worker.process for worker in team._workers]
    assert not any(process.is_alive() for process in processes)
    assert killed == {None, 0, 1}
    assert timeless({key: kept[key] for key in plain}) == timeless(plain)
    assert order == ["a.mp4"] * 12 + ["b.mp4"] * 12
    assert [message for message in warned if "signal 9" in message]


def test_a_crew_may_run_again_and_its_workers_end_by_themselves(
    tiny_checkpoint_path: Path,
    tasks: list[ClipTask],
    plain: dict[str, Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second time, one of the two has died in between."""
    monkeypatch.setattr(crew_module, "GRACE_S", 60.0)  # a busy machine takes its time to end a process
    warned: list[str] = []
    with crew(tiny_checkpoint_path, 2, warned) as team:
        for died in (False, True):
            if died:
                victim = next(worker for worker in team._workers if worker.ready).process
                victim.kill()
                victim.join()
            kept = run(team, tasks, warn=lambda message, _: warned.append(message))
            assert timeless(kept) == timeless(plain)
            assert all(worker.index is None for worker in team._workers)
        finished = [worker.process for worker in team._workers if worker.ready]
        assert team.size == 2
    assert [process.exitcode for process in finished] == [0] * len(finished)
    assert finished
    assert warned == ["a worker died (signal 9) while it was idle; a fresh one takes its place"]


def test_an_idle_worker_that_dies_with_nothing_left_is_replaced_by_the_next_run(
    tiny_checkpoint_path: Path, tasks: list[ClipTask], plain: dict[str, Record]
) -> None:
    warned: list[str] = []
    with crew(tiny_checkpoint_path, 1, warned) as team:
        (worker,) = team._workers
        worker.process.kill()
        team._lose_idle(worker, None, Listener(warn=lambda message, _: warned.append(message)), rehire=False)
        assert team.size == 0
        assert timeless(run(team, tasks[:1])).items() <= timeless(plain).items()
        assert team.size == 1
    assert warned == ["a worker died (signal 9) while it was idle"]


@pytest.mark.slow
def test_a_clip_that_kills_its_worker_twice_is_recorded_as_failed(
    tiny_checkpoint_path: Path, tasks: list[ClipTask]
) -> None:
    with crew(tiny_checkpoint_path, 1, []) as team:

        def kill(done: int, _: int) -> None:
            (worker,) = team._workers
            if worker.index == 0 and worker.process.pid:
                os.kill(worker.process.pid, signal.SIGKILL)

        kept = run(team, tasks, progress=kill)
    failed = [record for record in kept.values() if record["error"] is not None]
    assert failed
    assert {record["clip"] for record in failed} == {"a.mp4"}
    assert {record["error"]["kind"] for record in failed} == {"worker"}
    assert len(kept) == 24


def test_workers_that_cannot_load_the_model_say_why(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ModelError, match=r"no config\.json"):
        crew(tmp_path, 2, told)
    assert told == []  # what all of them would meet is told once, as the error
    assert multiprocessing.active_children() == []


def test_workers_that_share_a_gpu_do_without_fast_paths() -> None:
    assert shared_gpu(["cuda:0", "cuda:0"]) == {"compile": False, "graphs": False}
    assert shared_gpu(["cuda:0", "cuda:1"]) == {}
    assert shared_gpu(["cpu", "cpu"]) == {}
