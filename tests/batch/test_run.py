"""The scheduler: the same records whatever is read ahead, in bounded memory, and failures stop nothing."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seats_cli.batch.reading import Clip, ClipReader, Listener
from seats_cli.batch.records import Asking, Record
from seats_cli.batch.run import Arrivals, Outcome, run_batch
from seats_cli.batch.sources import Item
from seats_cli.errors import DeviceError, MediaError
from seats_cli.session import ModelOptions, Session

ASKING = Asking({"model": "tiny"}, {"max_new_tokens": 4, "ratio": 0.3})
QUESTIONS = ("what is said?", "which shape is white")


@pytest.fixture(scope="module")
def session(tiny_checkpoint_path: Path) -> Session:
    return Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Three clips with two questions each, one of them broken."""
    from make_clips import pictures, tone, write_clip

    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", pictures(30), fps=10, audio=tone(3.0))
    (folder / "b.mp4").write_bytes(b"broken")
    write_clip(folder / "c.mp4", pictures(20), fps=10)
    return [
        tuple(Item(str(folder / f"{name}.mp4"), text, key=f"{name}{i}") for i, text in enumerate(QUESTIONS))
        for name in "abc"
    ]


def timeless(records: list[Record]) -> list[Record]:
    return [{**record, "timing": None} for record in records]


def in_turns(session: Session, arrivals: Arrivals, listener: Listener) -> Iterator[Outcome]:
    """A decoder as a batched one takes: whatever is ready, up to three, then the last of them first."""
    held: list[Any] = []
    while held or not arrivals.ended:
        arrival = arrivals.take(wait=not held) if len(held) < 3 else None
        if arrival is None:
            if held:
                done = held.pop()
                yield done, session.generate(done.run)
        elif arrival.run is None:
            assert arrival.error is not None
            yield arrival, arrival.error
        else:
            held.append(arrival)


def test_reading_ahead_and_another_decoder_change_nothing(session: Session, clips: list[Clip]) -> None:
    plain = list(run_batch(session, clips, ASKING, ahead=0))
    assert [record["key"] for record in plain] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert [record["ok"] for record in plain] == [True, True, False, False, True, True]
    for record in plain[:2]:
        asked = session.ask(record["path"], record["question"], ASKING.options(clips[0][0]))
        assert record["answer"] == asked.text
        assert record["tokens"]["video"] == asked.report.tokens.before.video > 0
        assert record["tokens"]["kept"] == asked.report.retention.reached.overall
        assert min(record["timing"].values()) > 0
    assert plain[2]["error"]["kind"] == "media_format"
    for ahead in (1, 2):
        assert timeless(list(run_batch(session, clips, ASKING, ahead=ahead))) == timeless(plain)
    other = list(run_batch(session, clips, ASKING, decode=in_turns))
    assert sorted(timeless(other), key=lambda record: record["key"]) == timeless(plain)


class Scripted:
    """A session whose clips are their names; it notes what is read, and by which thread."""

    adapter = SimpleNamespace(device=torch.device("cpu"), fused=True)

    def __init__(self, **failing: Exception) -> None:
        self.failing = failing
        self.reads: list[tuple[str, str]] = []
        self.answered: list[str] = []
        self.most_ahead = 0

    def read(self, path: str, options: Any, *, on_stage: Any, warn: Any) -> Any:
        self.reads.append((path, threading.current_thread().name))
        self.most_ahead = max(self.most_ahead, len(self.reads) - len(self.answered))
        warn(f"{path} is short")
        on_stage("read", 1, 1)
        if path in self.failing:
            raise self.failing[path]
        return SimpleNamespace(path=path, seconds={}, encoded=None)

    def prefill(self, read: Any, question: str, options: Any, *, on_stage: Any, warn: Any) -> Any:
        return SimpleNamespace(path=read.path, question=question)

    def generate(self, run: Any, *, on_stage: Any) -> Any:
        time.sleep(0.005)  # the reader may run ahead as far as it can
        self.answered.append(run.path)
        if run.question in self.failing:
            raise self.failing[run.question]
        return None


def named(*names: str) -> list[Clip]:
    return [(Item(name, "why?", key=name),) for name in names]


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted answers have no report."""
    from seats_cli.batch import run

    whole = run.success

    def success(item: Item, asking: Asking, answer: Any, seconds: Any, warnings: list[str]) -> Record:
        if answer is not None:
            return whole(item, asking, answer, seconds, warnings)
        return {"key": item.key, "ok": True, "warnings": list(warnings)}

    monkeypatch.setattr(run, "success", success)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_no_more_clips_are_held_than_was_said(ahead: int) -> None:
    session: Any = Scripted()
    records = list(run_batch(session, named(*"abcdefgh"), ASKING, ahead=ahead))
    assert [record["key"] for record in records] == list("abcdefgh")
    assert session.most_ahead == ahead + 1  # and the one that is answered
    assert {thread for _, thread in session.reads} == {"seats-read-clips"}


def test_without_reading_ahead_there_is_no_thread() -> None:
    session: Any = Scripted()
    list(run_batch(session, named("a", "b"), ASKING, ahead=0))
    assert {thread for _, thread in session.reads} == {threading.current_thread().name}
    assert session.most_ahead == 1


def test_failures_and_losses_stand_in_the_records_of_their_clips() -> None:
    session: Any = Scripted(b=MediaError("no frame", hint="h"), how=ValueError("boom"))
    clips = [*named("a", "b"), (Item("c", "how", key="c0"), Item("c", "why", key="c1"))]
    records = list(run_batch(session, clips, ASKING))
    assert [(record["key"], record["ok"]) for record in records] == [
        ("a", True), ("b", False), ("c0", False), ("c1", True),
    ]  # fmt: skip
    assert records[1]["error"] == {"kind": "media", "message": "no frame", "hint": "h"}
    assert "ValueError: boom" in records[2]["error"]["message"]
    assert [record["warnings"] for record in records] == [
        ["a is short"], ["b is short"], ["c is short"], ["c is short"],
    ]  # fmt: skip


def test_a_run_that_is_closed_ends_its_thread_in_the_middle_of_a_clip() -> None:
    begun = threading.Event()

    class Endless(Scripted):
        def read(self, path: str, options: Any, *, on_stage: Any, warn: Any) -> Any:
            if path == "b":
                begun.set()
                while True:
                    on_stage("read", 1, 2)
                    time.sleep(0.001)
            return super().read(path, options, on_stage=on_stage, warn=warn)

    session: Any = Endless()
    records = run_batch(session, named("a", "b", "c"), ASKING)
    assert next(records)["key"] == "a"
    assert begun.wait(5)
    records.close()  # type: ignore[attr-defined]
    assert [thread for thread in threading.enumerate() if thread.name == "seats-read-clips"] == []


class Reads:
    """A session that reads at once, as far as told."""

    adapter = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, read: Any = lambda: None) -> None:
        self._read = read

    def read(self, *_: Any, **options: Any) -> Any:
        return self._read()


def test_a_run_that_ends_waits_for_no_clip_that_others_would_send() -> None:
    never = threading.Event()

    def handed() -> Iterator[Clip]:
        yield from named("a")
        never.wait()

    began = time.monotonic()
    with ClipReader(Reads(), handed(), ASKING, Listener(), ahead=5, readers=3) as reader:  # type: ignore[arg-type]
        assert reader.take() is not None
        time.sleep(0.2)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    never.set()


@pytest.mark.parametrize(
    ("overtake", "expected"), [(None, "bcdefa"), (5, "bcdefa"), (2, "bcadef"), (1, "bacdef"), (0, "abcdef")]
)
def test_a_clip_that_takes_long_is_overtaken(overtake: int | None, expected: str) -> None:
    long, taken = threading.Event(), []

    class Slow(Reads):
        def read(self, path: str, *_: Any, **options: Any) -> Any:
            if path == "a":
                long.wait(30)

    slow: Any = Slow()
    with ClipReader(
        slow, named(*"abcdef"), ASKING, Listener(), ahead=2, readers=2, overtake=overtake
    ) as reader:
        for place in range(6):
            if place == expected.index("a"):
                time.sleep(0.2)  # whoever is read meanwhile may not be taken
                assert reader.take(wait=False) is None
                long.set()
            opened = reader.take()
            assert opened is not None
            taken.append(opened.items[0].key)
        assert reader.take() is None
        assert reader.ended
    assert taken[: expected.index("a") + 1] == list(expected)[: expected.index("a") + 1]
    assert sorted(taken) == list("abcdef")


def test_the_end_of_the_list_overtakes_no_clip() -> None:
    long = threading.Event()

    def handed() -> Iterator[Clip]:
        yield from named("a")
        raise RuntimeError("the list ends")

    def read() -> None:
        long.wait(30)

    reads: Any = Reads(read)
    with ClipReader(reads, handed(), ASKING, Listener(), ahead=2, readers=2, overtake=None) as reader:
        time.sleep(0.2)
        assert reader.take(wait=False) is None
        long.set()
        opened = reader.take()
        assert opened is not None
        assert opened.items[0].key == "a"
        with pytest.raises(RuntimeError, match="the list ends"):
            reader.take()


def test_threads_that_do_not_end_are_given_one_time_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from seats_cli.batch import reading

    monkeypatch.setattr(reading, "JOIN_S", 1.0)
    go_on, everybody = threading.Event(), threading.Barrier(5)
    clips = named("a", "b", "c", "d")

    def read() -> None:
        everybody.wait(30)
        go_on.wait(30)

    with ClipReader(Reads(read), clips, ASKING, Listener(), ahead=4, readers=4):  # type: ignore[arg-type]
        everybody.wait(30)
        began = time.monotonic()
    assert 0.5 < time.monotonic() - began < 3
    go_on.set()


def test_a_clip_that_has_no_room_beside_others_is_read_by_itself() -> None:
    at_work, most, lock = [0], [0], threading.Lock()

    def read() -> None:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
            crowded = at_work[0] > 1
        time.sleep(0.1)
        with lock:
            crowded |= at_work[0] > 1
            at_work[0] -= 1
        if crowded:
            raise DeviceError("out of memory")

    clips = named(*"abcdefgh")
    with ClipReader(Reads(read), clips, ASKING, Listener(), ahead=6, readers=4) as reader:  # type: ignore[arg-type]
        found = [reader.take() for _ in clips]
    assert [opened.items[0].key for opened in found if opened] == list("abcdefgh")
    assert [opened.error for opened in found if opened] == [None] * 8
    assert most[0] > 1  # or nothing was tried


@pytest.mark.parametrize("returns", [False, True])
def test_as_many_are_read_at_once_as_memory_is_enough_for(
    monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    """Where it is for three of eight, few clips are read twice; where for eight again, eight."""
    from seats_cli.batch import reading

    monkeypatch.setattr(reading, "_WELL", 5 if returns else 1000)
    at_work: set[int] = set()
    together, failed, lock = [], [], threading.Lock()

    def read() -> None:
        me = threading.get_ident()
        with lock:
            at_work.add(me)
            together.append(len(at_work))
            room = 8 if returns and len(together) > 40 else 3
            lacked = len(at_work) > room
        time.sleep(0.02)
        with lock:
            at_work.remove(me)
            failed.extend([1] * lacked)
        if lacked:
            raise DeviceError("out of memory")

    clips = named(*map(str, range(120)))
    with ClipReader(Reads(read), clips, ASKING, Listener(), ahead=10, readers=8) as reader:  # type: ignore[arg-type]
        found = [reader.take() for _ in clips]
    assert [opened.error for opened in found if opened] == [None] * 120
    assert failed
    if returns:
        assert max(together[-40:]) == 8
    else:
        assert len(failed) <= 40  # some 15; 80 where nothing is learned
        assert max(together[80:]) in (2, 3)


def test_a_clip_that_never_fits_says_nothing_of_the_others() -> None:
    def read(path: str, *_: Any, **options: Any) -> None:
        time.sleep(0.01)
        if int(path) % 5 == 0:
            raise DeviceError("out of memory")

    session = SimpleNamespace(adapter=Reads().adapter, read=read)
    clips = named(*map(str, range(60)))
    with ClipReader(session, clips, ASKING, Listener(), ahead=6, readers=4) as reader:  # type: ignore[arg-type]
        found = [reader.take() for _ in clips]
        assert reader._most == 4
    assert sum(opened.error is not None for opened in found if opened) == 12


def test_a_lack_of_memory_by_itself_is_the_clip_s() -> None:
    """It is not read again where nothing was beside it."""
    reads = []

    def read() -> None:
        reads.append(1)
        raise DeviceError("out of memory")

    with ClipReader(Reads(read), named("a"), ASKING, Listener(), ahead=3, readers=3) as reader:  # type: ignore[arg-type]
        found = reader.take()
    assert found is not None
    assert isinstance(found.error, DeviceError)
    assert reads == [1]


def test_a_reader_without_a_stream_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from seats_cli.batch import reading

    def broken(_: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    # Also while another waits for a clip that does not come.
    whole, calls, never = reading.own_stream, [], threading.Event()

    def second_broken(device: Any) -> Any:
        calls.append(1)
        return broken(device) if len(calls) == 2 else whole(device)

    def handed() -> Iterator[Clip]:
        never.wait()
        yield from named("a")

    monkeypatch.setattr(reading, "own_stream", second_broken)
    began = time.monotonic()
    with (
        ClipReader(Reads(), handed(), ASKING, Listener(), ahead=2, readers=2) as reader,  # type: ignore[arg-type]
        pytest.raises(RuntimeError, match="CUDA error"),
    ):
        reader.take()
    assert time.monotonic() - began < 5
    never.set()


def test_a_row_s_range_leaves_the_call_s_where_it_has_none() -> None:
    asking = Asking({"model": "tiny"}, {"start_s": 2.0, "end_s": 9.0})
    options = asking.options(Item("a.mp4", "why?", end_s=3.0))
    assert (options.start_s, options.end_s) == (2.0, 3.0)
    options = asking.options(Item("a.mp4", "why?", start_s=5.0))
    assert (options.start_s, options.end_s) == (5.0, 9.0)


def test_what_goes_wrong_with_the_list_itself_is_raised() -> None:
    def clips() -> Iterator[Clip]:
        yield from named("a")
        raise RuntimeError("the list ends")

    session: Any = Scripted()
    records = run_batch(session, clips(), ASKING)
    assert next(records)["key"] == "a"
    with pytest.raises(RuntimeError, match="the list ends"):
        next(records)


def test_a_reader_that_has_ended_says_so() -> None:
    session: Any = Scripted()
    with ClipReader(session, named("a"), ASKING, Listener()) as reader:
        assert reader.take() is not None
        assert reader.take() is None
        assert reader.ended
        assert reader.take(wait=False) is None


def test_stages_name_the_file_that_they_are_about() -> None:
    session: Any = Scripted()
    told: list[tuple[Any, ...]] = []
    list(run_batch(session, named("a", "b"), ASKING, listener=Listener(lambda *what: told.append(what))))
    assert [what for what in told if what[1] == "read"] == [("a", "read", 1, 1), ("b", "read", 1, 1)]
