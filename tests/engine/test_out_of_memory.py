"""Running out of memory at every stage: an error with advice, nothing held, and the next question right."""

import gc
import json
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from make_clips import pictures, tone, write_clip
from seats_cli.cli.ask_run import Request, answer_all
from seats_cli.cli.console import Terminal
from seats_cli.engine import fit, memory
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.graph import GraphDecoder
from seats_cli.engine.memory import GENERAL_ADVICE, Attempt, explained_memory
from seats_cli.errors import DeviceError
from seats_cli.measure.memory import Engine
from seats_cli.selection.methods import find_method
from seats_cli.session import AskOptions, ModelOptions, Session

SHORT = AskOptions(ratio=0.5, max_new_tokens=4)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


@pytest.fixture(scope="module")
def session(tiny_checkpoint_path: Path) -> Session:
    return Session(ModelOptions(model=str(tiny_checkpoint_path), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    return write_clip(path, pictures(30 * 12), audio=tone(12.0))


class Breaking:
    """Replaces a method of an object: after `at` calls the next raises; what it was given is watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
        real, self.left = getattr(owner, name), at
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.caches: list[weakref.ref[LayerCache]] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs) if self.left else None
            for value in (*args, *kwargs.values(), result):
                self._watch(value)
            if not self.left:
                raise FULL
            self.left -= 1
            return result

        monkeypatch.setattr(owner, name, call)

    def _watch(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.seen.append(weakref.ref(value))
        elif hasattr(value, "embeddings"):
            self._watch(value.embeddings)
        elif isinstance(value, LayerCache):
            self.caches.append(weakref.ref(value))

    @property
    def held(self) -> int:
        gc.collect()
        filled = (cache for ref in self.caches if (cache := ref()) is not None and cache.bytes())
        return sum(ref() is not None for ref in self.seen) + len(list(filled))


def breaking(monkeypatch: pytest.MonkeyPatch, session: Session, stage: str) -> Breaking:
    """Memory runs out in the middle of a stage."""
    adapter, method = session.adapter, find_method("seats")
    if stage == "encode":
        monkeypatch.setattr("seats_cli.engine.encode.FRAMES_AT_ONCE", 8)
        return Breaking(monkeypatch, adapter, "encode_video", 1)
    if stage == "stage I":
        monkeypatch.setattr("seats_cli.session.find_method", lambda _: method)
        return Breaking(monkeypatch, method, "before_llm", 1)
    if stage == "prefill":
        return Breaking(monkeypatch, adapter, "run_layer", 3)
    return Breaking(monkeypatch, adapter, "run_layer", adapter.n_layers + 2)


STAGES = {
    "encode": "while encoding",
    "stage I": "while encoding",
    "prefill": "in the prefill",
    "decode": "while answering",
}


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_held_and_the_next_answer_is_right(
    stage: str, session: Session, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session.ask(clip, "what is said?", SHORT).text
    with monkeypatch.context() as patch:
        broken = breaking(patch, session, stage)
        with pytest.raises(DeviceError, match=f"out of memory {STAGES[stage]}: CUDA out of memory") as raised:
            session.ask(clip, "what is said?", SHORT)
        error = raised.value
        del raised
    assert broken.left == 0
    assert len(broken.seen) >= 3, "something was watched"
    assert broken.held == 0, "while the error is still kept"
    assert "beside the weights" in str(error.hint)
    assert "--max-frames 12 (" in str(error.hint)
    assert "or --end 0:06 (" in str(error.hint)
    assert session.ask(clip, "what is said?", SHORT).text == expected


@pytest.mark.parametrize("stage", ["encode", "prefill"])
def test_a_batch_goes_on_after_it(
    stage: str,
    session: Session,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {"ratio": 0.5, "max_new_tokens": 4}
    expected = session.ask(clip, "what is said?", SHORT).text
    real = session.ask
    calls = iter([True, False])

    def ask(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            if next(calls):
                breaking(patch, session, stage)
            return real(*args, **kwargs)

    monkeypatch.setattr("seats_cli.cli.ask_run.open_session", lambda *_: session)
    monkeypatch.setattr(session, "ask", ask)
    request = Request((str(clip), str(clip)), "what is said?", {}, asked, True, False, False)
    assert answer_all(Terminal(), request) == 1
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert first["error"]["kind"] == "device"
    assert first["error"]["message"].startswith("out of memory")
    assert "--max-frames 12" in first["error"]["hint"]
    assert second["answer"] == expected


def test_reading_once_and_likelihoods_are_covered_too(
    session: Session, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken = breaking(patch, session, "encode")
        with pytest.raises(DeviceError, match="out of memory while encoding"):
            session.read(clip, SHORT)
        assert broken.held == 0
    with monkeypatch.context() as patch:
        breaking(patch, session, "prefill")
        with pytest.raises(DeviceError, match="out of memory in the prefill"):
            session.log_likelihood(clip, "what is said?", "fish", SHORT)


# ---- the advice -------------------------------------------------------------------------------------------


def asked_of(session: Session, **changes: Any) -> fit.Asked:
    options = AskOptions(ratio=0.5)
    clip = fit.ClipFacts(n_frames=8192, height=720, width=1280, sample_fps=2.0, n_samples=4096 * 16000)
    return fit.Asked(
        **{
            "clip": clip, "question": "what?", "method": find_method("seats"),
            "setup": session.setup(options), "ratio": 0.5, "new_tokens": 8, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def long_context(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory alone decides."""
    monkeypatch.setattr(type(session.adapter), "context_length", 10**9)


@pytest.mark.usefixtures("long_context")
def test_each_remedy_fits_and_the_next_milder_one_does_not(session: Session) -> None:
    asked, engine = asked_of(session, ratio=1.0), Engine(itemsize=2)
    needed = fit.forecast(session.adapter, asked, 0, engine, device_bytes=10**10).memory
    assert needed.largest == "prefill", "else the ratio decides nothing"
    room = round(0.6 * needed.peak)
    found = fit.remedies(session.adapter, asked, 0, engine, device_bytes=10**10, room=room)
    assert [remedy.option.split()[0] for remedy in found] == ["--ratio", "--max-frames", "--end"]
    assert all(remedy.forecast.memory.peak <= room for remedy in found)
    ratio = float(found[0].option.split()[1])
    milder = min(r for r in (*fit.RATIOS, 1.0) if r > ratio)
    again = fit.forecast(session.adapter, asked_of(session, ratio=milder), 0, engine, device_bytes=10**10)
    assert again.memory.peak > room
    assert fit.remedies(session.adapter, asked, 0, engine, device_bytes=10**10, room=1000) == []


@pytest.mark.usefixtures("long_context")
def test_full_is_told_of_another_method(session: Session) -> None:
    asked, engine = asked_of(session, ratio=1.0, method=find_method("full")), Engine(itemsize=2)
    needed = fit.forecast(session.adapter, asked, 0, engine, device_bytes=10**10).memory.peak
    found = fit.remedies(session.adapter, asked, 0, engine, device_bytes=10**10, room=round(0.6 * needed))
    assert found[0].option.startswith("--method seats --ratio 0.")


def test_a_remedy_is_within_the_context_too(session: Session) -> None:
    asked, engine = asked_of(session, ratio=1.0, new_tokens=30_000), Engine(itemsize=2)
    found = fit.remedies(session.adapter, asked, 0, engine, device_bytes=10**10, room=10**12)
    assert found
    for remedy in found:
        assert remedy.forecast.entering + 30_000 <= session.adapter.context_length


def test_without_a_clip_or_an_estimate_the_advice_is_general(session: Session) -> None:
    attempt = Attempt(session.adapter, None)
    with pytest.raises(DeviceError) as raised, explained_memory(attempt.advice):
        raise MemoryError
    assert str(raised.value) == "out of memory while reading the file"
    assert raised.value.hint == GENERAL_ADVICE
    with pytest.raises(DeviceError, match=r"^out of memory$"), explained_memory():
        raise MemoryError


def test_what_it_came_from_is_forgotten_as_well() -> None:
    class Large:
        pass

    watched: list[weakref.ref[Large]] = []

    def inner() -> None:
        large = Large()
        watched.append(weakref.ref(large))
        raise ValueError("first")

    def outer() -> None:
        try:
            inner()
        except ValueError as error:
            raise FULL from error

    with pytest.raises(DeviceError) as raised, explained_memory():
        outer()
    gc.collect()
    assert watched[0]() is None
    shown = "".join(traceback.format_exception(raised.value))
    assert "in inner" in shown, "the way to the error is still told"
    assert "in outer" in shown


def test_decoding_s_buffers_are_given_back(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        released = False

        def release(self) -> None:
            self.released = True

    graph: Any = Graph()
    attempt = Attempt(session.adapter, graph)
    monkeypatch.setattr(memory, "engine_of", lambda *_, **__: pytest.fail("no clip, no estimate"))
    attempt.advice()
    assert graph.released


def test_a_graph_s_buffers_are_gone_once_released(session: Session) -> None:
    graph = GraphDecoder(session.adapter)
    graph._make_room([10] * session.adapter.n_layers)
    watched = [weakref.ref(tensor) for tensor in (*graph._keys, *graph._values)]
    assert len(watched) == 2 * session.adapter.n_layers
    graph.release()
    gc.collect()
    assert all(ref() is None for ref in watched)
    graph._make_room([10] * session.adapter.n_layers)
    assert len(graph._keys) == session.adapter.n_layers


def test_clock_times() -> None:
    times: Callable[[int], str] = fit.clock_time
    assert [times(seconds) for seconds in (5, 65, 3600, 3725)] == ["0:05", "1:05", "1:00:00", "1:02:05"]
