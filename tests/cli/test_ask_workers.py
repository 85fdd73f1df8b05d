"""`seats ask` over many files: who decodes and who answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from cli.conftest import Run, Script, lines
from seats_cli.batch.reading import Clip
from seats_cli.batch.records import Asking, Record, failure
from seats_cli.errors import DeviceError, MediaError

ROOT = Path(__file__).parents[2]


def test_clips_are_decoded_in_as_many_processes_as_asked(run: Run, script: Script, folder: Path) -> None:
    result = run("ask", "videos", "why?", "--readers", "2", "-v", "--device", "cpu")
    assert result.exit_code == 0
    assert script.elsewhere == 3
    assert "clips decoded at once by processes: 2\n" in result.stderr
    result = run("ask", "videos", "why?", "-v", "--device", "cpu")  # decoding and model want the same cores
    assert script.elsewhere == 3
    assert "clips decoded at once by processes: 0\nanswers decoded together: 1\n" in result.stderr
    assert run("ask", "videos", "why?", "--readers", "-1").exit_code == 2


def test_a_batch_size_without_a_graph_has_no_effect_and_says_so(
    run: Run, script: Script, folder: Path
) -> None:
    result = run("ask", "videos", "why?", "--batch-size", "4", "--device", "cpu")
    assert result.exit_code == 0
    assert "warning: --batch-size 4 has no effect" in result.stderr
    assert result.stdout.count("a red star") == 3
    assert "batch-size" not in run("ask", "videos", "why?", "--device", "cpu").stderr
    assert run("ask", "videos", "why?", "--batch-size", "0").exit_code == 2


def test_a_device_that_is_lost_keeps_what_is_done_and_ends_the_run(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seats_cli.batch import run as scheduler

    def lost(device: Any, error: Exception) -> None:
        raise DeviceError("the GPU no longer answers", hint="the same command goes on with the next file")

    monkeypatch.setattr(scheduler, "check_device", lost)
    script.replies = {"b.mp4": RuntimeError("CUDA error")}
    result = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert result.exit_code == 1
    assert "error: the GPU no longer answers" in result.stderr
    assert "1 ok, 1 failed, 1 not asked" in result.stderr
    assert [record["ok"] for record in lines("out.jsonl")] == [True, False]  # b is not met again


@pytest.mark.parametrize(
    ("gpus", "arguments", "expected"),
    [
        (0, [], None),
        (1, [], None),
        (2, [], ["cuda:0", "cuda:1"]),
        (2, ["--device", "cuda:1"], None),
        (2, ["--device", "cpu"], None),
        (2, ["--workers", "1"], ["auto"]),
        (0, ["--workers", "2"], ["auto", "auto"]),
        (2, ["--workers", "3"], ["cuda:0", "cuda:1", "cuda:0"]),
    ],
)
def test_who_answers(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, arguments: list[str],
    expected: list[str] | None,
) -> None:  # fmt: skip
    """A process a GPU where there are several, as many as were asked for, else this process."""
    from seats_cli.batch import devices, team

    crews: list[list[str]] = []

    class ScriptedCrew:
        described: ClassVar[dict[str, bool]] = {"is_embedded": True, "random_weights": False}

        def __init__(self, devices: list[str], asking: Asking, **_: Any) -> None:
            crews.append(list(devices))
            self.asking = asking

        def __enter__(self) -> "ScriptedCrew":
            return self

        def __exit__(self, *_: object) -> None:
            crews.append(["ended"])

        def answers(self, clips: list[Clip], listener: Any) -> Iterator[Record]:
            listener.warn("a worker died", clips[0][0].path)
            for clip in clips[::-1]:
                yield failure(clip[0], self.asking, MediaError("no frame"))

    monkeypatch.setattr(devices, "_gpus", lambda: gpus)
    monkeypatch.setattr(devices, "_has_mps", lambda: False)
    monkeypatch.setattr(team, "AnsweringCrew", ScriptedCrew)
    result = run("ask", "videos", "why?", "-o", "out.jsonl", *arguments)
    assert [Path(record["path"]).stem for record in lines("out.jsonl")] == ["a", "b", "c"]
    if expected is None:
        assert (crews, len(script.opened), result.exit_code) == ([], 1, 0)
    else:
        assert (crews, script.opened, result.exit_code) == ([expected, ["ended"]], [], 1)
        assert "warning: videos/a.mp4: a worker died" in result.stderr


def test_a_session_of_this_process_is_asked_on_one_core_each_beside_a_gpu(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seats_cli.batch import streams

    seen: list[tuple[str, int]] = []

    @contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        seen.append((device.type, len(script.read)))
        yield
        seen.append((device.type, len(script.read)))

    monkeypatch.setattr(streams, "one_core_each", noted)
    assert run("ask", "videos", "why?", "-o", "out.jsonl").exit_code == 0
    assert seen == [("cpu", 0), ("cpu", 3)]


def test_gpus_without_room_for_a_model_each_share_one(
    run: Run, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seats_cli.batch import devices, team

    def full(*_: Any, **__: Any) -> None:
        raise DeviceError("out of memory")

    monkeypatch.setattr(devices, "_gpus", lambda: 2)
    monkeypatch.setattr(team, "AnsweringCrew", full)
    result = run("ask", "videos", "why?", "-o", "out.jsonl")
    assert (result.exit_code, len(script.opened)) == (0, 1)
    assert "warning: no GPU has room for a model of its own: out of memory" in result.stderr
    assert run("ask", "videos", "how?", "-o", "out.jsonl", "--workers", "2").exit_code == 1


@pytest.mark.parametrize(
    ("typed", "problem", "expected"),
    [
        ([], None, {"unordered": False, "hwaccel": "none", "small_gpu": False}),
        (["--unordered"], None, {"unordered": True, "hwaccel": "none"}),
        (["--hwaccel", "auto"], None, {"hwaccel": "auto", "on_one_gpu": 1, "gpu": 0}),
        (["--hwaccel", "cuda", "--device", "cuda:1"], None, {"hwaccel": "cuda", "gpu": 1, "small_gpu": True}),
        (["--hwaccel", "auto"], "there is no driver", {"hwaccel": "none"}),
    ],
)
def test_the_pace_is_that_of_what_was_asked(
    run: Run,
    script: Script,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: list[str],
    problem: str | None,
    expected: dict[str, Any],
) -> None:
    from seats_cli.batch import decoders, devices
    from seats_cli.media import nvdec

    monkeypatch.setattr(devices, "on_small_gpu", lambda device: device == "cuda:1")
    told: dict[str, Any] = {}
    whole = decoders.choose_pace

    def noted(*numbers: Any, **named: Any) -> Any:
        told.update(named)
        return whole(*numbers, **named)

    monkeypatch.setattr(decoders, "choose_pace", noted)

    def why_not(gpu: int) -> str | None:
        told["gpu"] = gpu
        return problem

    monkeypatch.setattr(nvdec, "why_not", why_not)
    assert run("ask", "videos", "why?", "--jsonl", "--readers", "0", *typed).exit_code == 0
    assert {name: told[name] for name in expected} == expected
