"""Sequences that are decoded together say what each says alone, whenever they join and leave."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seats_cli.engine import together as module
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import DecodeOptions, Generation
from seats_cli.engine.graph import ROUNDING, GraphDecoder
from seats_cli.engine.prefill import Prefilled
from seats_cli.engine.together import DecodeTogether, Sequence
from seats_cli.errors import DeviceError
from seats_cli.model.adapter import Adapter
from seats_cli.model.load import load_model


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint_path: Path) -> Adapter:
    return load_model(str(tiny_checkpoint_path), device="cpu", dtype="float32", fuse=True)


def _read(adapter: Adapter, n_tokens: int) -> Prefilled:
    """A prompt of random embeddings, of which every second layer forgot two thirds."""
    hidden = torch.randn(
        1, n_tokens, adapter.geometry.hidden, generator=torch.Generator().manual_seed(n_tokens)
    )
    position = torch.arange(n_tokens).expand(3, -1)
    cache = LayerCache(adapter.n_layers)
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, adapter.rotary(position), cache)
    for index in range(1, adapter.n_layers, 2):
        cache.trim(index, torch.arange(0, n_tokens, 3))
    logits = adapter.final_logits(hidden, last_only=True)[0, -1].float()
    return Prefilled(logits, cache, (), (), None)  # type: ignore[arg-type]


def _alone(adapter: Adapter, n_tokens: int, options: DecodeOptions) -> Generation:
    generation = Generation(adapter, _read(adapter, n_tokens), n_tokens, options)
    assert "".join(generation) == generation.text
    return generation


def _same(found: Sequence, alone: Generation) -> None:
    assert found.token_ids == alone.token_ids
    assert found.text == alone.text
    assert found.finish_reason == alone.finish_reason


def test_sequences_join_and_leave_when_they_like(adapter: Adapter) -> None:
    """Seven prompts through three slots; limits, draws and lengths differ, so no two end together."""
    asked = [
        (n_tokens, DecodeOptions(limit, temperature=temperature, seed=n_tokens, ignore_end=True))
        for n_tokens, limit, temperature in (
            (30, 9, 0.0), (7, 1, 0.0), (12, 14, 0.9), (40, 3, 0.0), (9, 6, 0.5), (21, 2, 0.0), (5, 8, 0.0),
        )
    ]  # fmt: skip
    together = DecodeTogether(adapter, GraphDecoder(adapter, slots=3))
    waiting, owner, ended = list(asked), {}, []
    while waiting or len(together):
        while waiting and together.free:
            n_tokens, options = waiting.pop(0)
            sequence = together.add(_read(adapter, n_tokens), n_tokens, options)
            owner[id(sequence)] = n_tokens, options, sequence
        ended += together.step()
    assert len(ended) == len(asked)
    for sequence in ended:
        n_tokens, options, _ = owner[id(sequence)]
        _same(sequence, _alone(adapter, n_tokens, options))
    assert together.free == 3


def test_what_fails_to_join_leaves_its_slot_idle(adapter: Adapter, monkeypatch: Any) -> None:
    """An idle slot that counted on would write behind its buffer's end."""
    decoder = GraphDecoder(adapter, slots=2)
    together = DecodeTogether(adapter, decoder)
    sampler = module.TokenSampler

    def failing(*_: Any) -> Any:
        raise ValueError("no draw")

    monkeypatch.setattr(module, "TokenSampler", failing)
    with pytest.raises(ValueError, match="no draw"):
        together.add(_read(adapter, 9), 9, DecodeOptions(3))
    assert decoder._active.tolist() == [0, 0]
    assert together.free == 2
    monkeypatch.setattr(module, "TokenSampler", sampler)
    options = DecodeOptions(3, ignore_end=True)
    sequence = together.add(_read(adapter, 9), 9, options)
    while len(together):
        together.step()
    _same(sequence, _alone(adapter, 9, options))


def test_an_end_token_ends_one_and_the_others_go_on(adapter: Adapter, monkeypatch: Any) -> None:
    options = DecodeOptions(12)
    first = _alone(adapter, 30, options).token_ids
    ending = first[4]  # whatever the fifth token of one answer is, it now ends answers
    monkeypatch.setattr(adapter, "eos_token_ids", (ending,))
    together = DecodeTogether(adapter, GraphDecoder(adapter, slots=2))
    sequences = {n: together.add(_read(adapter, n), n, options) for n in (30, 11)}
    for _ in range(13):
        together.step()
    assert sequences[30].finish_reason == "stop"
    assert sequences[30].token_ids == first[: first.index(ending)]
    for n, sequence in sequences.items():
        _same(sequence, _alone(adapter, n, options))
    assert together.free == 2


def test_a_longer_sequence_joins_while_another_runs(adapter: Adapter) -> None:
    """The buffers grow, and what the other had in them is still there."""
    options = DecodeOptions(10, ignore_end=True)
    decoder = GraphDecoder(adapter, slots=2)
    together = DecodeTogether(adapter, decoder)
    short = together.add(_read(adapter, 8), 8, options)
    for _ in range(3):
        together.step()
    long = together.add(_read(adapter, ROUNDING + 5), ROUNDING + 5, options)
    while len(together):
        together.step()
    _same(short, _alone(adapter, 8, options))
    _same(long, _alone(adapter, ROUNDING + 5, options))


@pytest.mark.parametrize("end", ["step", "clear", "failure"])
def test_a_cache_of_another_stream_is_kept_until_it_was_copied(
    adapter: Adapter, monkeypatch: Any, end: str
) -> None:
    """Until a token has come that was chosen behind the copy, or all that was asked for is done."""
    together = DecodeTogether(adapter, GraphDecoder(adapter, slots=3))
    waited, real = [], module.sent_to_host

    def alive() -> list[bool]:
        return [tensor() is not None for tensor in held]

    def sent(*args: Any, **options: Any) -> Any:
        arrived = real(*args, **options)
        return lambda: (waited.append(all(alive())), arrived())[1]

    def failing(*_: Any) -> Any:
        raise DeviceError("out of memory")

    monkeypatch.setattr(module, "sent_to_host", sent)
    monkeypatch.setattr(module, "idle_until_done", lambda _: waited.append(all(alive())))
    own = _read(adapter, 9)
    held = [weakref.ref(tensor) for tensor in own.cache.tensors()]
    together.add(own, 9, DecodeOptions(4))
    assert held
    assert not any(alive()), "of this thread's stream: nothing need be kept"
    read = _read(adapter, 9)
    held = [weakref.ref(tensor) for tensor in read.cache.tensors()]
    if end == "failure":
        monkeypatch.setattr(module, "TokenSampler", failing)
        with pytest.raises(DeviceError):
            together.add(read, 9, DecodeOptions(4), other_stream=True)
    else:
        together.add(read, 9, DecodeOptions(4), other_stream=True)
        assert all(alive())
        getattr(together, end)()
    assert waited == [True]
    assert not any(alive())


def test_a_step_s_memory_stays_until_it_is_done(adapter: Adapter, monkeypatch: Any) -> None:
    """Where buffers grow or are given back: the recorded step uses them, and what it was recorded with."""
    decoder, waited = GraphDecoder(adapter, slots=2), []
    monkeypatch.setattr(
        "seats_cli.engine.graph.idle_until_done",
        lambda _: waited.append((decoder.held_bytes, decoder._graph is None)),
    )
    decoder._make_room([9] * adapter.n_layers)
    small = decoder.held_bytes
    decoder._graph = graph = SimpleNamespace()  # type: ignore[assignment]
    decoder._make_room([ROUNDING] * adapter.n_layers)
    assert decoder._graph is graph, "the same buffers are large enough"
    decoder._make_room([ROUNDING + 1] * adapter.n_layers)
    large = decoder.held_bytes
    decoder.release()
    assert waited == [(0, True), (small, False), (large, True)]


def test_an_idle_slot_stays_where_it_is(adapter: Adapter, monkeypatch: Any) -> None:
    """If it went on with every step, it would write past the end of its buffers in time."""
    monkeypatch.setattr("seats_cli.engine.graph.ROUNDING", 8)
    options = DecodeOptions(20, ignore_end=True)
    together = DecodeTogether(adapter, GraphDecoder(adapter, slots=2))
    for _ in range(3):  # 57 steps; the buffers hold 32 tokens
        _same(_run(together, together.add(_read(adapter, 6), 6, options)), _alone(adapter, 6, options))


def test_no_room_is_an_error_and_release_gives_all_back(adapter: Adapter) -> None:
    options = DecodeOptions(4)
    decoder = GraphDecoder(adapter, slots=1)
    together = DecodeTogether(adapter, decoder)
    together.add(_read(adapter, 5), 5, options)
    with pytest.raises(ValueError, match="1 slots are taken"):
        together.add(_read(adapter, 5), 5, options)
    together.clear()
    assert together.free == 1
    assert decoder.held_bytes > 0
    decoder.release()
    assert decoder.held_bytes == 0
    _same(_run(together, together.add(_read(adapter, 6), 6, options)), _alone(adapter, 6, options))


def _run(together: DecodeTogether, sequence: Sequence) -> Sequence:
    while len(together):
        together.step()
    return sequence
