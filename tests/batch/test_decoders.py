"""Decoding in processes changes no record, a decoder that dies costs its clip alone; how many there are."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from make_clips import pictures, tone, write_clip
from seats_cli.batch import decoders as module
from seats_cli.batch.decoders import Pace, choose_pace, decoders
from seats_cli.batch.reading import Clip
from seats_cli.batch.records import Asking, Record
from seats_cli.batch.run import run_batch
from seats_cli.batch.sources import Item
from seats_cli.batch.team import AnsweringCrew, Listener, answered
from seats_cli.media import DecoderProcess, open_clip
from seats_cli.session import ModelOptions, Session

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no decoder processes")


@pytest.fixture(scope="module")
def asking(tiny_checkpoint_path: Path) -> Asking:
    model = {"model": str(tiny_checkpoint_path), "dtype": "float32", "device": "cpu"}
    return Asking(model, {"max_new_tokens": 3, "ratio": 0.3})


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Video with and without sound, one cut short, one broken, and a sound."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", pictures(40), fps=10, audio=tone(4.0))
    write_clip(folder / "b.mkv", pictures(60), fps=10, audio=tone(6.0))
    whole = (folder / "b.mkv").read_bytes()
    (folder / "b.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "c.mp4").write_bytes(b"broken")
    write_clip(folder / "d.mp4", pictures(30), fps=10)
    write_clip(folder / "e.m4a", None, audio=tone(3.0))
    return [(Item(str(path), "why?", key=path.stem),) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def session(asking: Asking) -> Session:
    return Session(ModelOptions(**asking.model))


@pytest.fixture(scope="module")
def plain(session: Session, asking: Asking, clips: list[Clip]) -> list[Record]:
    return timeless(run_batch(session, clips, asking, ahead=0))


def timeless(records: Any) -> list[Record]:
    return sorted(({**record, "timing": None} for record in records), key=lambda record: record["key"])


def test_records_are_those_of_this_process(
    session: Session, asking: Asking, clips: list[Clip], plain: list[Record]
) -> None:
    assert [record["ok"] for record in plain] == [True, True, False, True, True]
    assert plain[1]["warnings"] != []
    assert timeless(answered(session, clips, asking, Pace(readers=2))) == plain


def test_a_clip_that_takes_long_is_overtaken(
    session: Session, asking: Asking, clips: list[Clip], plain: list[Record]
) -> None:
    """From the pace to the reader."""
    others_done = threading.Event()

    def opening(path: Any, *rest: Any, check: Any, **options: Any) -> Any:
        if Path(path).name == "a.mp4":
            others_done.wait(60)
        return open_clip(path, *rest, **options)

    records = answered(session, clips, asking, Pace(readers=2, overtake=None), openers=[opening, opening])
    found = [next(records) for _ in clips[1:]]
    others_done.set()
    found += records
    assert found[-1]["key"] == "a"
    assert timeless(found) == plain


def test_a_dead_decoder_costs_its_clip(
    session: Session, asking: Asking, clips: list[Clip], plain: list[Record]
) -> None:
    with DecoderProcess() as process:

        def opening(path: Any, *rest: Any, **options: Any) -> Any:
            clip = process.open(path, *rest, **options)
            if Path(path).name == "a.mp4":
                os.kill(process.pid or 0, signal.SIGKILL)
            return clip

        found = timeless(run_batch(session, clips, asking, openers=[opening]))
    assert found[0]["error"]["kind"] == "media"
    assert "a.mp4: the decoder crashed on it (signal 9)" in found[0]["error"]["message"]
    assert found[1:] == plain[1:]


def test_a_worker_has_decoders_of_its_own(asking: Asking, clips: list[Clip], plain: list[Record]) -> None:
    pace = Pace(readers=1, slots=2)
    with AnsweringCrew(["cpu"], asking, warn=pytest.fail, log=lambda _: None, pace=pace) as crew:
        assert timeless(crew.answers(clips, Listener())) == plain


def test_decoders_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DecoderProcess] = []

    class Noted(DecoderProcess):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(module, "DecoderProcess", Noted)
    with suppress(KeyError), decoders(Pace(readers=2)) as openers:
        assert len(openers) == 2
        pids = [process.pid or 0 for process in made]
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
        raise KeyError
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Pace(15, 16, 1, 64, 2)),
        ({"n_cores": 64}, Pace(16, 16, 4, 64)),
        ({"n_cores": 128, "n_clips": 2}, Pace(2, 16, 16, 64)),
        ({"n_cores": 6}, Pace(5, 16, 1, 64)),
        ({"n_cores": 1}, Pace(0, 16, 0, 64)),
        ({"sharing": 4}, Pace(3, 16, 1, 64)),
        ({"n_clips": 3}, Pace(3, 16, 5, 64)),
        ({"hwaccel": "cuda"}, Pace(4, 16, 4, 64)),
        ({"hwaccel": "auto", "n_cores": 3}, Pace(2, 16, 1, 64)),
        ({"hwaccel": "cuda", "readers": 2}, Pace(2, 16, 8, 64)),
        ({"graphs": False}, Pace(15, 1, 1, 64)),
        ({"graphs": False, "slots": 4}, Pace(15, 4, 1, 64)),
        ({"on_gpu": False}, Pace(0, 1, 0, 64)),
        ({"on_gpu": False, "readers": 2}, Pace(2, 1, 8, 64)),
        ({"readers": 20, "sharing": 2}, Pace(20, 16, 1, 64)),
        ({"readers": 0, "slots": 1}, Pace(0, 1, 0, 64)),
        ({"small_gpu": True}, Pace(4, 8, 4, 64, 1)),
        ({"small_gpu": True, "n_cores": 3}, Pace(2, 8, 1, 64, 1)),
        ({"small_gpu": True, "graphs": False}, Pace(4, 1, 4, 64, 1)),
        ({"small_gpu": True, "readers": 8, "slots": 12}, Pace(8, 12, 2, 64, 1)),
        ({"unordered": True}, Pace(15, 16, 1, None)),
        ({"hwaccel": "cuda", "sharing": 2, "on_one_gpu": 2}, Pace(2, 16, 4, 64)),
    ],
)
def test_how_many_by_default(
    changes: dict[str, Any], expected: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"on_gpu": True, "graphs": True, "hwaccel": "none", "n_clips": 100, "n_cores": 16}
    asked = {"readers": None, "slots": None, **usual, **changes}
    n_cores = asked.pop("n_cores")
    monkeypatch.setattr(module, "cores", lambda: n_cores)
    found = choose_pace(**asked)
    assert found == expected
    assert found.ahead > found.readers


@pytest.mark.parametrize(("readers", "ahead"), [(0, 1), (1, 3), (8, 10), (16, 20)])
def test_some_more_are_ready_than_are_read(readers: int, ahead: int) -> None:
    assert Pace(readers).ahead == ahead


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pace", [Pace(2, 1), Pace(2, 4)])
def test_records_on_a_gpu_are_those_without(pace: Pace, asking: Asking, clips: list[Clip]) -> None:
    """Frames go from shared memory to pinned memory and on, while slots are filled again."""
    on_gpu = asking.on(device="cuda")
    session = Session(ModelOptions(**on_gpu.model))
    many = [
        (Item(clip[0].path, f"why {number}?", key=f"{clip[0].key}{number}"),)
        for number in range(6)
        for clip in clips
    ]
    plain = timeless(run_batch(session, many, on_gpu, ahead=0))
    assert timeless(answered(session, many, on_gpu, pace)) == plain
