"""One run of one row: the whole way from frames and samples to the last token, timed.

Ours is the pipeline of `session.py`, call for call; the other side is transformers' own (`model.stock`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import DecodeOptions, Generation
from seats_cli.engine.encode import MediaSource, encode
from seats_cli.engine.enter import ModelInput
from seats_cli.engine.prefill import Prefilled, prefill
from seats_cli.lab.bench_input import Item
from seats_cli.lab.settings import Setting
from seats_cli.measure.clock import (
    FIRST_TOKEN,
    DeviceSpan,
    Stopwatch,
    peak_memory,
    reset_peak_memory,
    synchronise,
)
from seats_cli.measure.compute import prefill_flops, score_flops
from seats_cli.measure.flops import counting
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.preprocess import mel_spectrogram, resize_frames
from seats_cli.model.stock import StockRun
from seats_cli.selection.methods import find_method
from seats_cli.selection.options import Setup
from seats_cli.selection.plan import Plan
from seats_cli.session import AskOptions, Session, clip_counts

Counts = tuple[int, int, int]  # text, video, audio
Now = Callable[[], float]

SAMPLES_AT_ONCE = 1 << 20

# What one run times, in seconds; a name that does not apply is absent. Stages that launch work on a GPU are
# timed there, by events; the last three come from a run of its own with a clock of the host alone.
TIMES = (
    "read",
    "preprocess",
    "encode_video",
    "encode_audio",
    "select",
    "prefill",
    "prefill_device",  # by CUDA events
    "select_prefill",
    "generate",
    "answer",  # from decoded frames and samples, resized: the encoders, select, prefill, generate
    "per_token",  # each token after the first
    "first_token",  # from the start, nothing waited for on the way
    "whole",  # the last token from there
)


@dataclass(frozen=True)
class Facts:
    """What is the same in every run of a row.

    before, per_layer: tokens (text, video, audio) of the prompt, and in each layer
    retention:         mean over layers of the share of video and audio tokens processed
    flops:             multiply-adds of the prefill as the engine runs it: the head on one token, stage II's
                       scores included; `paper_flops` as the paper counts: the head on all that is left
    beyond_context:    whether the prompt reaches past what the model was made for
    """

    before: Counts
    per_layer: tuple[Counts, ...]
    retention: float | None
    flops: int
    paper_flops: int
    kv_bytes: int
    beyond_context: bool


@dataclass(frozen=True)
class RunResult:
    """One run: seconds by name (see TIMES), the peak of device memory, and the tokens generated.

    facts: None of the stock path, which keeps everything and is not asked
    """

    seconds: Mapping[str, float]
    peak_bytes: int | None
    token_ids: Sequence[int]
    facts: Facts | None = None


# ---- ours -------------------------------------------------------------------------------------------------


def run_row(
    session: Session, item: Item, setting: Setting, n_tokens: int, *, now: Now = time.perf_counter
) -> RunResult:
    """Everything once, each stage timed where it runs; on a GPU once more for the times of the whole.

    Raises kinds of SeatsError: a file that cannot be read, no plan within the ratio.
    """
    adapter = session.adapter
    reset_peak_memory(adapter.device)
    clock = Stopwatch(adapter.device, now=now, wait=not adapter.on_one_device)
    span = DeviceSpan(adapter.device)
    facts, ids, first, end = _pipeline(session, item, setting, n_tokens, clock, span)
    peak = peak_memory(adapter.device).bytes if adapter.device.type == "cuda" else None
    seconds = dict(clock.seconds)
    if span.seconds is not None:
        seconds["prefill_device"] = span.seconds
    seconds["select_prefill"] = seconds.get("select", 0.0) + seconds["prefill"]
    seconds["answer"] = sum(
        spent for name, spent in seconds.items()
        if name in ("encode_video", "encode_audio", "select", "prefill", "generate")
    )  # fmt: skip
    if adapter.device.type != "cpu":  # a clock of the host alone never waits
        free = Stopwatch("cpu", now=now)
        _, _, first, end = _pipeline(session, item, setting, n_tokens, free, DeviceSpan(torch.device("cpu")))
    seconds |= {"first_token": first, "whole": end}
    if n_tokens > 1:
        seconds["per_token"] = (end - first) / (n_tokens - 1)
    return RunResult(_ordered(seconds), peak, ids, facts)


def _pipeline(
    session: Session, item: Item, setting: Setting, n_tokens: int, clock: Stopwatch, span: DeviceSpan
) -> tuple[Facts, list[int], float, float]:
    """Facts, tokens, and seconds to the first token and to the end."""
    adapter = session.adapter
    setup = setup_of(session, setting)
    with item.opened(adapter, setup.preset, session.video_decoding) as (source, shape):
        prompt = item.prompt(adapter, shape)
        plan, given = _select(adapter, setup, setting, source, prompt, shape, clock)
    with clock.stage("prefill"), span:
        cache = LayerCache(adapter.n_layers, room=n_tokens)
        read = prefill(
            adapter, find_method(setting.method), plan, given.embeddings, given.layout, cache=cache,
            deepstack=given.deepstack,
        )  # fmt: skip
    facts = facts_of(adapter, plan, prompt, read, n_tokens)
    with clock.stage("generate"):
        decoding = DecodeOptions(max_new_tokens=n_tokens, ignore_end=True)
        generation = Generation(
            adapter, read, prompt.next_position, decoding, clock=clock, graph=session.graph
        )
        for _ in generation:
            pass
        synchronise(adapter.device)
        end = clock.elapsed
    first = clock.marked(FIRST_TOKEN)
    assert first is not None  # at least one token is asked for
    return facts, generation.token_ids, first, end


def _select(
    adapter: Adapter,
    setup: Setup,
    setting: Setting,
    source: MediaSource,
    prompt: Prompt,
    shape: MediaShape,
    clock: Stopwatch,
) -> tuple[Plan, ModelInput]:
    """The row's plan, and what it lets into the language model."""
    method = find_method(setting.method)
    plan = method.plan(setup.preset, setting.ratio, clip_counts(prompt, shape), setup.options)
    given = encode(
        adapter, method, plan, source, prompt, shape, clock=clock,
        saliency_positions=setup.preset.windows.audio_saliency_positions,
    )  # fmt: skip
    return plan, given


def setup_of(session: Session, setting: Setting) -> Setup:
    """The preset and options that a row runs with."""
    return session.setup(
        AskOptions(
            ratio=setting.ratio,
            method=setting.method,
            preset=setting.preset,
            settings=dict(setting.settings),
        )
    )


def facts_of(adapter: Adapter, plan: Plan, prompt: Prompt, read: Prefilled, n_tokens: int) -> Facts:
    """Counted from what the prefill did."""
    geometry, before, layers = adapter.geometry, prompt.layout.counts, read.layer_counts
    lengths = [sum(counts) for counts in layers]
    media = before[1] + before[2]
    kept = sum(video + audio for _, video, audio in layers)
    scores = sum(score_flops(lengths[layer - 1], geometry) for layer in plan.score_layers)
    last = max(lengths[0] + n_tokens, prompt.next_position + n_tokens)
    return Facts(
        before=before,
        per_layer=layers,
        retention=kept / (media * len(layers)) if media else None,
        flops=prefill_flops(lengths, geometry, head_tokens=1, as_run=True) + scores,
        paper_flops=prefill_flops(lengths, geometry),
        kv_bytes=read.cache.bytes(),
        beyond_context=last > adapter.context_length,
    )


def count_flops(session: Session, item: Item, setting: Setting) -> tuple[int, int]:
    """Multiply-adds of the row's prefill: (as PyTorch counts what runs, as `Facts.flops` says)."""
    adapter, setup = session.adapter, setup_of(session, setting)
    with item.opened(adapter, setup.preset, session.video_decoding) as (source, shape):
        prompt = item.prompt(adapter, shape)
        clock = Stopwatch(adapter.device)
        plan, given = _select(adapter, setup, setting, source, prompt, shape, clock)
    with counting() as counted:
        read = prefill(
            adapter,
            find_method(setting.method),
            plan,
            given.embeddings,
            given.layout,
            deepstack=given.deepstack,
        )
    return counted.flops, facts_of(adapter, plan, prompt, read, 1).flops


# ---- transformers -----------------------------------------------------------------------------------------


class StockItem:
    """One input for the stock path, its patches and mel frames on the device: neither reading nor the
    processor's work is timed."""

    def __init__(self, session: Session, item: Item, setting: Setting) -> None:
        adapter, setup = session.adapter, setup_of(session, setting)
        with item.opened(adapter, setup.preset, session.video_decoding) as (source, shape):
            self.prompt = item.prompt(adapter, shape)
            self._device = adapter.device
            self._run = StockRun(adapter, self.prompt, shape, **_tensors(adapter, source, shape))

    def first_logits(self) -> torch.Tensor:
        """(V,) float32: the logits that the first token is chosen from."""
        return self._run.prefill(self._run.embed(self._run.encode_video(), self._run.encode_audio()))

    def time(self, n_tokens: int, *, now: Now = time.perf_counter) -> RunResult:
        """Each part once, waiting for the device after it; then `generate` as a whole, without."""
        device, run = self._device, self._run
        reset_peak_memory(device)
        clock, span = Stopwatch(device, now=now), DeviceSpan(device)
        with clock.stage("encode_video"):
            seen = run.encode_video()
        with clock.stage("encode_audio"):
            heard = run.encode_audio()
        embeddings = run.embed(seen, heard)
        synchronise(device)
        with clock.stage("prefill"), span:
            run.prefill(embeddings)
        seconds = dict(clock.seconds)
        if span.seconds is not None:
            seconds["prefill_device"] = span.seconds
        seconds["select_prefill"] = seconds["prefill"]
        del seen, heard, embeddings
        first, started = 0.0, now()

        def on_token(k: int) -> None:
            nonlocal first
            if k == 0:
                synchronise(device)
                first = now() - started

        ids = run.generate(n_tokens, on_token)
        synchronise(device)
        whole = now() - started
        seconds |= {"first_token": first, "whole": whole, "answer": whole, "generate": whole - first}
        if n_tokens > 1:
            seconds["per_token"] = (whole - first) / (n_tokens - 1)
        peak = peak_memory(device).bytes if device.type == "cuda" else None
        return RunResult(_ordered(seconds), peak, ids)


def _tensors(adapter: Adapter, source: MediaSource, shape: MediaShape) -> dict[str, torch.Tensor | None]:
    """What the family's processor would make of a source, but for the patches: resized frames, mel frames."""
    geometry, device = adapter.geometry, adapter.device
    found: dict[str, torch.Tensor | None] = {}
    if shape.video_grid is not None:
        size = (shape.video_grid[1] * geometry.patch, shape.video_grid[2] * geometry.patch)
        windows = source.video_windows(64)
        found["frames"] = torch.cat(
            [resize_frames(torch.from_numpy(window.frames).to(device), size) for window in windows]
        )
    if shape.image_grid is not None:
        size = (shape.image_grid[1] * geometry.patch, shape.image_grid[2] * geometry.patch)
        found["image"] = resize_frames(torch.from_numpy(source.image())[None].to(device), size)
    if shape.n_audio:
        samples = np.concatenate(list(source.audio_blocks(SAMPLES_AT_ONCE)))
        found["mel"] = mel_spectrogram(samples, adapter.mel_spec)
    return found


def _ordered(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds[name] for name in TIMES if name in seconds}
