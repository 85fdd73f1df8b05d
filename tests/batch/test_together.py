"""Answers decoded together are those of one at a time, and what fails takes nothing else along."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batch.asked import ASKING, by_key
from seats_cli import session as session_module
from seats_cli.batch import prefilling
from seats_cli.batch.prefilling import PrefilledAhead
from seats_cli.batch.reading import Clip
from seats_cli.batch.records import Record
from seats_cli.batch.run import Arrival, Decoder, one_by_one, run_batch
from seats_cli.batch.streams import FIRST
from seats_cli.batch.together import AnswersTogether, together
from seats_cli.engine.graph import GraphDecoder
from seats_cli.errors import DeviceError
from seats_cli.session import Session


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
    come, still_there = threading.Event(), []

    def one_that_comes_late() -> Iterator[Clip]:
        yield clips[0]
        come.wait(60)

    def watch() -> None:
        """Let the reader go once the other thread is gone, which must not wait for it."""
        end = time.monotonic() + 5
        while _prefilling() and time.monotonic() < end:
            time.sleep(0.01)
        still_there.append(_prefilling())
        come.set()

    for given in (one_that_comes_late(), clips):
        run = run_batch(session, given, ASKING, decode=together(1, ahead=1))
        assert next(run)["key"] == "a0"
        assert _prefilling()
        watcher = threading.Thread(target=watch)
        watcher.start()
        run.close()
        watcher.join()
        assert not _prefilling()
    assert still_there == [False, False]

    def broken() -> Iterator[Clip]:
        yield clips[0]
        raise OSError("the list ends here")

    found: list[Record] = []
    with pytest.raises(OSError, match="the list ends here"):
        found.extend(run_batch(session, broken(), ASKING, decode=together(2, ahead=1)))
    assert [record["key"] for record in found] in ([], ["a0"])  # whichever is noticed first
    assert not _prefilling()


@pytest.mark.parametrize("lacks_memory", [False, True])
def test_what_comes_while_nothing_is_there_is_not_lost(lacks_memory: bool) -> None:
    """The thread hands on its last question, and ends, just after `take` has found nothing."""
    clip, looked = SimpleNamespace(read=object()), threading.Event()
    last = Arrival(None, clip, error=DeviceError("out of memory") if lacks_memory else OSError())  # type: ignore[arg-type]

    class Given:
        ended = False

        def next(self, *, wait: bool = True) -> Arrival | None:
            if self.ended:
                return None
            looked.wait(30)
            self.ended = True
            return last

        def prefilled(self, arrival: Arrival) -> Arrival:
            return arrival

        def stop(self) -> None:
            pass

    class Condition(threading.Condition):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            if threading.current_thread().name != "seats-prefill" and not looked.is_set():
                looked.set()
                ahead._thread.join(30)

    ahead: Any = PrefilledAhead(Given(), torch.device("cpu"), ahead=2)  # type: ignore[arg-type]
    ahead._changed.__class__ = Condition
    assert ahead.take(wait=False) is None
    assert not ahead.ended
    assert ahead.take() is not None
    assert ahead.take() is None
    assert ahead.ended


def test_a_prefill_is_left_in_its_middle(session: Session, clips: list[Clip], monkeypatch: Any) -> None:
    begun, go_on, layers = threading.Event(), threading.Event(), []
    real = Session.prefill

    def prefill(self: Session, *args: Any, on_stage: Any, **options: Any) -> Any:
        if begun.is_set() or threading.current_thread().name != "seats-prefill":
            return real(self, *args, on_stage=on_stage, **options)

        def slow(*stage: Any) -> None:
            layers.append(stage)
            begun.set()
            go_on.wait(30)
            on_stage(*stage)

        return real(self, *args, on_stage=slow, **options)

    monkeypatch.setattr(Session, "prefill", prefill)
    run = run_batch(session, clips, ASKING, decode=together(1, ahead=1))
    thread = threading.Thread(target=lambda: next(run, None))
    thread.start()
    assert begun.wait(30)
    prefilling = next(one for one in threading.enumerate() if one.name == "seats-prefill")
    stop = run.gi_frame.f_locals["reader"].stop  # type: ignore[attr-defined]
    stop()
    go_on.set()
    prefilling.join(30)
    thread.join(30)
    assert len(layers) == 1


@pytest.mark.parametrize(
    ("where", "told_by", "lost"),
    [
        ("reading", "wait", {"c0", "c1"}),
        ("reading", "launched", {"c0", "c1"}),
        ("prefilling", "wait", {"c1"}),  # the third: nothing is launched for b
        ("prefilling", "launched", {"c1"}),
    ],
)
def test_an_error_that_the_gpu_tells_late_is_its_question_s(
    session: Session, clips: list[Clip], monkeypatch: Any, where: str, told_by: str, lost: set[str]
) -> None:
    """Of a clip that is read, and of a question that is prefilled: the others are answered."""
    told: list[str] = []

    def tell(what: str) -> None:
        told.append(what)
        if what == told_by and told.count(what) == 3:
            raise RuntimeError("CUDA error: late")

    def launched() -> Any:
        tell("launched")
        return SimpleNamespace(done=True, wait=lambda: tell("wait"))

    @contextmanager
    def stream(*_: Any) -> Iterator[Any]:
        yield launched

    monkeypatch.setattr(f"seats_cli.batch.{where}.own_stream", stream)
    found = list(run_batch(session, clips, ASKING, ahead=2, decode=together(2, ahead=1)))
    failed = {record["key"]: record["error"]["message"] for record in found if not record["ok"]}
    assert len(found) == 6
    assert failed.keys() == {"b0"} | lost
    assert all("CUDA error: late" in failed[key] for key in lost)


@contextmanager
def two_prefilled_ahead(monkeypatch: Any) -> Iterator[tuple[PrefilledAhead, list[Any], list[int]]]:
    """Two questions that were launched and that the GPU is still at, what they became, and a list that gets a
    number whenever it is waited for."""
    runs = [SimpleNamespace(read=SimpleNamespace(logits=None)) for _ in range(2)]
    left, waits, both = list(runs), [], threading.Event()

    class Given:
        def next(self, *, wait: bool = True) -> Arrival | None:
            return Arrival(None, None, run=left.pop(0)) if left else None  # type: ignore[arg-type]

        def prefilled(self, arrival: Arrival) -> Arrival:
            return arrival

        def stop(self) -> None:
            pass

    class Ahead(PrefilledAhead):
        def _put(self, *given: Any) -> None:
            super()._put(*given)
            if not left:
                both.set()

    @contextmanager
    def stream(*_: Any) -> Iterator[Any]:
        yield lambda: SimpleNamespace(done=False, wait=lambda: waits.append(1))

    monkeypatch.setattr(prefilling, "own_stream", stream)
    with Ahead(Given(), torch.device("cpu"), ahead=2) as ahead:  # type: ignore[arg-type]
        assert both.wait(10)
        yield ahead, runs, waits


def test_the_next_is_launched_while_the_gpu_is_at_the_one_before(monkeypatch: Any) -> None:
    """Who takes without waiting is not given what the GPU is still at, and who waits, waits for it."""
    with two_prefilled_ahead(monkeypatch) as (ahead, runs, waits):
        assert (ahead.take(wait=False), ahead.ended, waits) == (None, False, [])
        arrival = ahead.take()
        assert arrival is not None
        assert (arrival.run, ahead.ended, waits) == (runs[0], False, [1])
        ahead._thread.join(10)  # makes nothing more, while the second is still to come
        assert (ahead.take(wait=False), ahead.ended, waits) == (None, False, [1])
        arrival = ahead.take()
        assert arrival is not None
        assert (arrival.run, waits) == (runs[1], [1, 1])
        assert (ahead.take(), ahead.ended) == (None, True)


def test_who_holds_need_not_wait_for_the_gpu(monkeypatch: Any) -> None:
    """What was launched, also meanwhile, is let go of, and is there again as a question."""
    with two_prefilled_ahead(monkeypatch) as (ahead, runs, waits):
        assert ahead.hold()
        still_at_work: Any = SimpleNamespace(done=False)
        ahead._put(Arrival(None, None, run=runs[0]), still_at_work)  # type: ignore[arg-type]
        for _ in range(3):
            arrival = ahead.take(wait=False)
            assert arrival is not None
            assert arrival.run is None
        assert (ahead.take(), waits) == (None, [])


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


@pytest.mark.parametrize("where", ["report", "begin"])
def test_an_error_of_one_is_one_s(session: Session, clips: list[Clip], monkeypatch: Any, where: str) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    calls: list[int] = []

    def failing(real: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("of one")
            return real(*args)

        return call

    if where == "report":
        monkeypatch.setattr(Session, "answer", failing(Session.answer))
    else:
        monkeypatch.setattr(GraphDecoder, "begin", failing(GraphDecoder.begin))
    found = by_key(list(run_batch(session, clips, ASKING, ahead=0, decode=together(3))))
    failed = [record for record in found if not record["ok"] and "of one" in record["error"]["message"]]
    assert len(failed) == 1
    others = [record for record in alone if record["key"] != failed[0]["key"]]
    assert [record for record in found if record not in failed] == others


@pytest.mark.parametrize("ahead", [0, 1])
def test_who_prefilled_on_another_stream_is_known(
    session: Session, clips: list[Clip], monkeypatch: Any, ahead: int
) -> None:
    told, real = [], AnswersTogether.add

    def add(self: AnswersTogether, run: Any, *, other_stream: bool) -> None:
        told.append(other_stream)
        real(self, run, other_stream=other_stream)

    monkeypatch.setattr(AnswersTogether, "add", add)
    list(run_batch(session, clips, ASKING, decode=together(4, ahead)))
    assert told == [bool(ahead)] * 5


def test_prefills_go_first_on_a_gpu(session: Session, clips: list[Clip], monkeypatch: Any) -> None:
    asked: list[tuple[Any, ...]] = []
    real = prefilling.own_stream

    def stream(*given: Any) -> Any:
        asked.append(given)
        return real(*given)

    monkeypatch.setattr(prefilling, "own_stream", stream)
    list(run_batch(session, clips[:1], ASKING, decode=together(2, ahead=1)))
    assert asked == [(session.adapter.device, FIRST)]


# When a prefill is launched, the thread that does it has nothing to launch until the next.
@pytest.mark.parametrize(
    ("decode", "expected"),
    [(one_by_one, [False]), (together(2), [False]), (together(2, ahead=1), [False, True])],
)
def test_no_encoder_begins_while_a_prefill_is_launched(
    session: Session, clips: list[Clip], monkeypatch: Any, decode: Decoder, expected: list[bool]
) -> None:
    order, begun = session.adapter.launch_order, [threading.Event(), threading.Event()]
    found: list[bool] = []
    real, stream = session_module.prefill, prefilling.own_stream

    def encode(which: int) -> bool:
        def work() -> None:
            with order.in_turn():
                begun[which].set()

        threading.Thread(target=work, daemon=True).start()
        return begun[which].wait(0.3)

    def prefill(*args: Any, **options: Any) -> Any:
        found.append(encode(0))
        return real(*args, **options)

    @contextmanager
    def on_stream(*given: Any) -> Iterator[Any]:
        with stream(*given) as launched:
            yield lambda: (found.append(encode(1)), launched())[1]

    monkeypatch.setattr(session_module, "prefill", prefill)
    monkeypatch.setattr(prefilling, "own_stream", on_stream)
    (record,) = run_batch(session, clips[:1], ASKING, decode=decode)
    assert record["ok"]
    assert found == expected
    assert begun[0].wait(10)


def test_without_a_graph_it_is_one_at_a_time(session: Session, clips: list[Clip]) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    session.graph = None
    assert by_key(list(run_batch(session, clips, ASKING, decode=together(4)))) == alone
