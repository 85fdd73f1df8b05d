"""Answers decoded together are those of one at a time, and what fails takes nothing else along."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seats_cli.batch import prefilling
from seats_cli.batch.prefilling import PrefilledAhead
from seats_cli.batch.reading import Clip
from seats_cli.batch.records import Asking, Record
from seats_cli.batch.run import Arrival, one_by_one, run_batch
from seats_cli.batch.sources import Item
from seats_cli.batch.streams import FIRST
from seats_cli.batch.together import AnswersTogether, together
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.graph import GraphDecoder
from seats_cli.errors import DeviceError
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


@pytest.mark.parametrize(("slots", "room_open", "room"), [(2, 9, 2), (4, 2, 3), (4, 9, 1), (3, 1, 9)])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_all_are_answered_where_memory_holds_a_few(
    session: Session, clips: list[Clip], monkeypatch: Any, slots: int, room_open: int, room: int, ahead: int
) -> None:
    """Room for so many open answers, and for so many of them and of prefilled questions together."""
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    opened: set[int] = set()
    caches: list[weakref.ref[LayerCache]] = []
    prefill, begin, retire = Session.prefill, GraphDecoder.begin, GraphDecoder.retire

    def live() -> int:
        return len(opened) + sum((cache := ref()) is not None and any(cache.lengths) for ref in caches)

    def prefilling(self: Session, *args: Any, **options: Any) -> Any:
        if live() >= room:
            raise DeviceError("out of memory in the prefill")
        run = prefill(self, *args, **options)
        caches.append(weakref.ref(run.read.cache))
        return run

    def beginning(self: GraphDecoder, cache: LayerCache, position: float, room: int, slot: int = 0) -> None:
        if len(opened) >= room_open:
            raise torch.OutOfMemoryError("CUDA out of memory")
        begin(self, cache, position, room, slot)
        opened.add(slot)

    def retiring(self: GraphDecoder, slot: int) -> None:
        opened.discard(slot)
        retire(self, slot)

    monkeypatch.setattr(Session, "prefill", prefilling)
    monkeypatch.setattr(GraphDecoder, "begin", beginning)
    monkeypatch.setattr(GraphDecoder, "retire", retiring)
    many = [tuple(replace(item, key=f"{item.key}{n}") for item in clip) for n in range(3) for clip in clips]
    decode = together(slots, ahead)
    found = by_key(list(run_batch(session, many, ASKING, ahead=4, readers=2, decode=decode)))
    assert [record["answer"] for record in found] == [r["answer"] for r in alone for _ in range(3)]


def test_an_error_that_the_gpu_tells_late_is_its_question_s(
    session: Session, clips: list[Clip], monkeypatch: Any
) -> None:
    """Of a clip that is read, and of a question that is prefilled: the others are answered."""
    for where in ("reading", "prefilling"):
        waits: list[int] = []

        @contextmanager
        def stream(*_: Any, waits: list[int] = waits) -> Iterator[Any]:
            def done() -> None:
                waits.append(1)
                if len(waits) == 3:
                    raise RuntimeError("CUDA error: late")

            yield done

        with monkeypatch.context() as patch:
            patch.setattr(f"seats_cli.batch.{where}.own_stream", stream)
            found = list(run_batch(session, clips, ASKING, ahead=2, decode=together(2, ahead=1)))
        failed = {record["key"] for record in found if not record["ok"]}
        assert len(found) == 6
        assert failed == ({"b0", "c0", "c1"} if where == "reading" else {"b0", "c0"})


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


def test_a_run_short_of_memory_waits_for_no_clip(
    session: Session, clips: list[Clip], monkeypatch: Any
) -> None:
    """A worker's next clip comes when its records have been heard, perhaps."""
    whole, everything_told = [clips[0], clips[2]], threading.Event()
    expected = by_key(list(run_batch(session, whole, ASKING, ahead=0)))

    def handed() -> Iterator[Clip]:
        yield from whole
        everything_told.wait()

    added, real = [], AnswersTogether.add

    def add(self: AnswersTogether, run: Any) -> None:
        added.append(1)
        if len(added) == 2:
            time.sleep(0.2)  # the thread has gone on to the next clip
            raise DeviceError("out of memory")
        real(self, run)

    monkeypatch.setattr(AnswersTogether, "add", add)
    found: list[Record] = []

    def answer() -> None:
        for record in run_batch(session, handed(), ASKING, ahead=1, decode=together(8, ahead=1)):
            found.append(record)
            if len(found) == len(expected):
                everything_told.set()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(60)
    over = not thread.is_alive()
    everything_told.set()
    assert over
    assert by_key(found) == expected


def test_an_answer_that_waits_for_room_takes_none(
    session: Session, clips: list[Clip], monkeypatch: Any
) -> None:
    """What its prompt had become is gone, also from the frames of the error."""
    added: list[int] = []
    refused: list[Any] = []
    alive: list[bool] = []
    real, step = AnswersTogether.add, AnswersTogether.step

    def add(self: AnswersTogether, run: Any) -> None:
        added.append(1)
        if len(added) == 2:
            refused.append(weakref.ref(run))
            raise DeviceError("out of memory")
        real(self, run)

    def watched(self: AnswersTogether) -> Any:
        alive.extend(run() is not None for run in refused)
        return step(self)

    monkeypatch.setattr(AnswersTogether, "add", add)
    monkeypatch.setattr(AnswersTogether, "step", watched)
    gc.disable()
    try:
        whole = [clips[0], clips[2]]
        found = list(run_batch(session, whole, ASKING, ahead=0, decode=together(4)))
    finally:
        gc.enable()
    assert [record["ok"] for record in found] == [True] * 3
    assert alive
    assert not any(alive)


def test_who_holds_is_heard_also_where_the_thread_has_met_the_lack_itself() -> None:
    clip, prefills = SimpleNamespace(read=object()), []

    class Given:
        def __init__(self) -> None:
            self.left = [Arrival(None, clip) for _ in range(3)]  # type: ignore[arg-type]

        def next(self, *, wait: bool = True) -> Arrival | None:
            return self.left.pop() if self.left else None

        def prefilled(self, arrival: Arrival) -> Arrival:
            prefills.append(1)
            return replace(arrival, error=DeviceError("out of memory"))

        def stop(self) -> None:
            pass

    with PrefilledAhead(Given(), torch.device("cpu"), ahead=1) as ahead:  # type: ignore[arg-type]
        first = ahead.take()
        assert (ahead.hold(), ahead.hold()) == (True, False)
        rest = [ahead.take(), ahead.take()]
        assert ahead.take() is None
        assert ahead.ended
    assert prefills == [1], "nothing is prefilled ahead any more"
    assert [arrival is not None and (arrival.run, arrival.error) for arrival in (first, *rest)] == [
        (None, None)
    ] * 3


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


@pytest.mark.parametrize("lacks_memory", [True, False])
def test_a_step_that_fails_costs_those_that_took_part_and_no_others(
    session: Session, clips: list[Clip], monkeypatch: Any, lacks_memory: bool
) -> None:
    """Where memory is short not even those: they are asked again, each alone."""
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    steps, real = [], GraphDecoder.step

    def step(self: GraphDecoder, token: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory") if lacks_memory else ValueError("a step")
        return real(self, token)

    given_back, release = [], GraphDecoder.release
    monkeypatch.setattr(GraphDecoder, "step", step)
    monkeypatch.setattr(GraphDecoder, "release", lambda self: (given_back.append(self.slots), release(self)))
    found = by_key(list(run_batch(session, clips, ASKING, ahead=0, decode=together(2))))
    failed = [record["key"] for record in found if not record["ok"]]
    assert failed == (["b0"] if lacks_memory else ["a0", "b0", "c0"])
    assert given_back == ([2, 1, 1] if lacks_memory else [2])
    assert [record for record in found if record["ok"]] == [r for r in alone if r["key"] not in failed]


@pytest.mark.parametrize(
    ("refused", "lost"), [((3,), ""), ((3, 4), ""), ((3, 4, 5), "c1"), ((1,), ""), ((1, 2), "a0")]
)
def test_an_answer_without_room_waits_for_another_to_end(
    session: Session, clips: list[Clip], monkeypatch: Any, refused: tuple[int, ...], lost: str
) -> None:
    """Alone, it has the buffers of one; it fails only where there is no room for these all the same."""
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


@pytest.mark.parametrize("ahead", [0, 1])
def test_where_there_is_room_for_one_place_only_all_are_answered(
    session: Session, clips: list[Clip], monkeypatch: Any, ahead: int
) -> None:
    """Buffers are of all places, so the longest sequences may fit into one and not into several."""
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    held, real = [], GraphDecoder.begin
    many: list[GraphDecoder] = []

    def begin(self: GraphDecoder, *args: Any) -> None:
        if self.slots > 1:
            many.append(self)
            real(self, *args)
            self.retire(args[-1])
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.append(many[-1].held_bytes)
        real(self, *args)

    monkeypatch.setattr(GraphDecoder, "begin", begin)
    found = by_key(list(run_batch(session, clips, ASKING, ahead=ahead, decode=together(4, ahead))))
    assert found == alone
    assert held == [0] * 5  # the others' were given back


@pytest.mark.parametrize(
    ("decode", "name"),
    [
        (one_by_one, "prefill"),
        (one_by_one, "generate"),
        (together(3), "prefill"),
        (together(3, ahead=1), "prefill"),
    ],
)
def test_what_finds_no_memory_is_answered_while_nobody_reads(
    session: Session, clips: list[Clip], monkeypatch: Any, decode: Any, name: str
) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    many = [tuple(replace(item, key=f"{item.key}{n}") for item in clip) for n in range(3) for clip in clips]
    reading: set[int] = set()
    read, whole = Session.read, getattr(Session, name)
    lacked = []

    def reads(self: Session, *args: Any, **options: Any) -> Any:
        reading.add(threading.get_ident())
        try:
            time.sleep(0.1)
            return read(self, *args, **options)
        finally:
            reading.remove(threading.get_ident())

    def needs_all(self: Session, *args: Any, **options: Any) -> Any:
        if reading:
            lacked.append(1)
            raise DeviceError("out of memory")
        return whole(self, *args, **options)

    monkeypatch.setattr(Session, "read", reads)
    monkeypatch.setattr(Session, name, needs_all)
    found = by_key(list(run_batch(session, many, ASKING, ahead=4, readers=3, decode=decode)))
    assert [record["answer"] for record in found] == [r["answer"] for r in alone for _ in range(3)]
    assert lacked


def test_prefills_go_first_on_a_gpu(session: Session, clips: list[Clip], monkeypatch: Any) -> None:
    asked: list[tuple[Any, ...]] = []
    real = prefilling.own_stream

    def stream(*given: Any) -> Any:
        asked.append(given)
        return real(*given)

    monkeypatch.setattr(prefilling, "own_stream", stream)
    list(run_batch(session, clips[:1], ASKING, decode=together(2, ahead=1)))
    assert asked == [(session.adapter.device, FIRST)]


def test_without_a_graph_it_is_one_at_a_time(session: Session, clips: list[Clip]) -> None:
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    session.graph = None
    assert by_key(list(run_batch(session, clips, ASKING, decode=together(4)))) == alone
