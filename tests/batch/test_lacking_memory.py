"""Where memory is short, questions wait for it, and none is lost."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batch.asked import ASKING, by_key
from seats_cli.batch import prefilling
from seats_cli.batch.prefilling import PrefilledAhead
from seats_cli.batch.reading import Clip
from seats_cli.batch.records import Record
from seats_cli.batch.run import Arrival, Decoder, one_by_one, run_batch
from seats_cli.batch.together import AnswersTogether, together
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.graph import GraphDecoder
from seats_cli.errors import DeviceError
from seats_cli.session import Session


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

    def add(self: AnswersTogether, run: Any, **options: Any) -> None:
        added.append(1)
        if len(added) == 2:
            time.sleep(0.2)  # the thread has gone on to the next clip
            raise DeviceError("out of memory")
        real(self, run, **options)

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

    def add(self: AnswersTogether, run: Any, **options: Any) -> None:
        added.append(1)
        if len(added) == 2:
            refused.append(weakref.ref(run))
            raise DeviceError("out of memory")
        real(self, run, **options)

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


def test_where_memory_was_short_it_is_prefilled_ahead_again_after_a_while(monkeypatch: Any) -> None:
    """When as many as it takes were prefilled without want of memory, one after the other."""
    monkeypatch.setattr(prefilling, "_WELL", 3)
    by: list[str] = []  # when each was prefilled
    asked: list[int] = []

    class Given:
        left = 12

        def next(self, *, wait: bool = True) -> Arrival | None:
            self.left -= 1
            return Arrival(None, SimpleNamespace(read=object())) if self.left >= 0 else None  # type: ignore[arg-type]

        def prefilled(self, arrival: Arrival) -> Arrival:
            asked.append(1)
            if len(asked) == 5:
                return replace(arrival, error=ValueError("of one"))  # which says nothing of memory
            return replace(arrival, run=SimpleNamespace(read=SimpleNamespace(logits=None)))  # type: ignore[arg-type]

        def stop(self) -> None:
            pass

    def take() -> None:
        arrival = ahead.take()
        assert arrival is not None
        by.append("taken" if arrival.run is None else "ahead")
        if arrival.run is None:
            ahead.prefilled(arrival)

    with PrefilledAhead(Given(), torch.device("cpu"), ahead=1) as ahead:  # type: ignore[arg-type]
        take()
        assert ahead.hold()
        take()
        take()
        assert not ahead.hold()  # short again, though nothing waits that could be given back
        for _ in range(9):
            take()
        assert by[:7] == ["ahead", *["taken"] * 6]
        assert by[7:] in (["taken", *["ahead"] * 4], ["ahead"] * 5)  # one may have been on its way
        assert ahead.hold()
        assert ahead.take() is None


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


@pytest.mark.parametrize("ahead", [0, 1, 2])
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
        (together(3, ahead=2), "prefill"),
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


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("decode", [one_by_one, together(3), together(3, ahead=2)])
def test_a_clip_without_memory_to_be_read_in_is_read_once_no_answer_is_in_the_making(
    session: Session, clips: list[Clip], monkeypatch: Any, decode: Decoder, fits: bool
) -> None:
    """One that does not fit then either fails alone."""
    alone = by_key(list(run_batch(session, clips, ASKING, ahead=0)))
    beside: list[int] = []
    read, step, begin = Session.read, AnswersTogether.step, AnswersTogether.__init__
    decoders: list[AnswersTogether] = []

    def reads(self: Session, path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("d.mp4"):
            here = threading.current_thread() is threading.main_thread()
            if here:
                beside.append(sum(map(len, decoders)))
            if not here or not fits:
                raise DeviceError("out of memory")
        return read(self, path, *args, **options)

    def begins(self: AnswersTogether, *args: Any) -> None:
        begin(self, *args)
        decoders.append(self)

    def slow(self: AnswersTogether) -> Any:
        time.sleep(0.02)  # so that clips come while answers are in the making
        return step(self)

    monkeypatch.setattr(Session, "read", reads)
    monkeypatch.setattr(AnswersTogether, "__init__", begins)
    monkeypatch.setattr(AnswersTogether, "step", slow)
    found = by_key(list(run_batch(session, clips, ASKING, ahead=4, readers=2, decode=decode)))
    assert beside == [0]
    assert [record for record in found if record["key"] != "d0"] == [r for r in alone if r["key"] != "d0"]
    d0 = next(record for record in found if record["key"] == "d0")
    if fits:
        assert d0 in alone
    else:
        assert d0["error"]["message"] == "out of memory"
