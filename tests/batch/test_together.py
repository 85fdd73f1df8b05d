"""Answers decoded together are those of one at a time, and what fails takes nothing else along."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seats_cli.batch.reading import Clip
from seats_cli.batch.records import Asking, Record
from seats_cli.batch.run import run_batch
from seats_cli.batch.sources import Item
from seats_cli.batch.together import AnswersTogether, together
from seats_cli.engine.graph import GraphDecoder
from seats_cli.session import ModelOptions, Session

ASKING = Asking({"model": "tiny"}, {"max_new_tokens": 6, "ratio": 0.3, "temperature": 0.7})


@pytest.fixture
def session(tiny_checkpoint_path: Path) -> Session:
    """On a CPU there is no graph; the same steps run without one."""
    session = Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32"))
    session.graph = GraphDecoder(session.adapter)
    return session


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Five clips of several lengths, one of them broken, one asked twice."""
    from make_clips import pictures, tone, write_clip

    folder = tmp_path_factory.mktemp("clips")
    made = []
    for name, n_frames in (("a", 30), ("b", 0), ("c", 20), ("d", 50), ("e", 10)):
        path = folder / f"{name}.mp4"
        if n_frames:
            write_clip(path, pictures(n_frames), fps=10, audio=tone(n_frames / 10))
        else:
            path.write_bytes(b"broken")
        questions = ("what is said?", "why") if name == "c" else ("what is said?",)
        made.append(tuple(Item(str(path), text, key=f"{name}{i}") for i, text in enumerate(questions)))
    return made


def by_key(records: list[Record]) -> list[Record]:
    return sorted(({**record, "timing": None} for record in records), key=lambda record: record["key"])


def test_the_answers_are_the_same(session: Session, clips: list[Clip], monkeypatch: Any) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    assert [record["ok"] for record in alone] == [True, False, True, True, True, True]
    with_others, steps = [], AnswersTogether.step

    def step(self: AnswersTogether) -> Any:
        with_others.append(len(self))
        return steps(self)

    monkeypatch.setattr(AnswersTogether, "step", step)
    for slots, ahead, readers, prefilled in (
        (1, 1, 1, 0), (3, 0, 1, 0), (8, 0, 1, 0), (8, 4, 4, 0), (2, 0, 1, 1), (1, 1, 1, 1), (8, 4, 4, 3),
    ):  # fmt: skip
        with_others.clear()
        decode = together(slots, prefilled)
        found = list(run_batch(session, clips, ASKING, ahead=ahead, readers=readers, decode=decode))
        assert by_key(found) == alone
        if not ahead and not prefilled:  # else an answer may end before the next clip was read
            assert max(with_others) == min(slots, 5)
        assert all(min(record["timing"].values()) > 0 for record in found if record["ok"])


def _prefilling() -> bool:
    return any(thread.name == "seats-prefill" for thread in threading.enumerate())


def test_prefilling_ahead_ends_with_the_run(session: Session, clips: list[Clip]) -> None:
    """Whether the thread waits for a clip, for room, or has an error to hand on."""
    come = threading.Event()

    def one_that_comes_late() -> Iterator[Clip]:
        yield clips[0]
        come.wait(60)

    for given in (one_that_comes_late(), clips):
        run = run_batch(session, given, ASKING, decode=together(1, ahead=1))
        assert next(run)["key"] == "a0"
        assert _prefilling()
        threading.Timer(0.2, come.set).start()
        run.close()
        assert not _prefilling()

    def broken() -> Iterator[Clip]:
        yield clips[0]
        raise OSError("the list ends here")

    found = []
    with pytest.raises(OSError, match="the list ends here"):
        found.extend(run_batch(session, broken(), ASKING, decode=together(2, ahead=1)))
    assert not _prefilling()


def test_no_more_is_prefilled_ahead_than_asked(session: Session, clips: list[Clip], monkeypatch: Any) -> None:
    prefilled, real = [], Session.prefill

    def prefill(self: Session, *args: Any, **options: Any) -> Any:
        prefilled.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(Session, "prefill", prefill)
    whole = [clip for clip in clips if "b.mp4" not in clip[0].path] * 2
    run = run_batch(session, whole, ASKING, ahead=4, readers=4, decode=together(1, ahead=1))
    for answered in range(1, 5):
        next(run)
        time.sleep(0.5)
        assert len(prefilled) <= answered + 1  # one waits
    run.close()


def test_a_step_that_fails_costs_those_that_took_part_and_no_others(
    session: Session, clips: list[Clip], monkeypatch: Any
) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    steps, real = [], GraphDecoder.step

    def step(self: GraphDecoder, token: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, token)

    given_back, release = [], GraphDecoder.release
    monkeypatch.setattr(GraphDecoder, "step", step)
    monkeypatch.setattr(GraphDecoder, "release", lambda self: (given_back.append(1), release(self)))
    found = by_key(list(run_batch(session, clips, ASKING, ahead=0, decode=together(2))))
    failed = [record["key"] for record in found if not record["ok"]]
    assert failed == ["a0", "b0", "c0"]
    assert given_back == [1]
    assert found[0]["error"]["kind"] == "device"
    assert [record for record in found if record["ok"]] == [r for r in alone if r["key"] not in failed]


@pytest.mark.parametrize(("refused", "lost"), [((3,), ""), ((3, 4), "c1"), ((1, 2), "a0 c0")])
def test_an_answer_without_room_waits_for_another_to_end(
    session: Session, clips: list[Clip], monkeypatch: Any, refused: tuple[int, ...], lost: str
) -> None:
    """It fails only where it is alone and there is no room all the same."""
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    begun, real = [], GraphDecoder.begin

    def begin(self: GraphDecoder, *args: Any) -> None:
        begun.append(1)
        if len(begun) in refused:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, *args)

    monkeypatch.setattr(GraphDecoder, "begin", begin)
    found = by_key(list(run_batch(session, clips, ASKING, ahead=0, decode=together(4))))
    assert {record["key"] for record in found if not record["ok"]} == {"b0", *lost.split()}
    assert [r for r in found if r["ok"]] == [r for r in alone if r["ok"] and r["key"] not in lost.split()]


def test_without_a_graph_it_is_one_at_a_time(session: Session, clips: list[Clip]) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    session.graph = None
    assert by_key(list(run_batch(session, clips, ASKING, decode=together(4)))) == alone
