"""A question's way through the engine, and what is said of it at the end."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from seats_cli.asking import AskOptions, ModelOptions
from seats_cli.engine import fit
from seats_cli.engine.decode import Generation
from seats_cli.engine.prefill import Prefilled
from seats_cli.engine.together import Sequence
from seats_cli.measure import report as reporting
from seats_cli.measure.clock import Stopwatch, peak_memory
from seats_cli.measure.compute import kv_bytes, prefill_flops
from seats_cli.measure.report import EnvironmentReport, Report
from seats_cli.media import OpenedClip
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.presets import Preset
from seats_cli.selection.plan import Plan


@dataclass(frozen=True)
class Run:
    """One question's way up to its first token, from which the answer and its report are made."""

    media: str | Path
    question: str
    options: AskOptions
    clip: OpenedClip
    mtime: float
    prompt: Prompt
    plan: Plan
    read: Prefilled
    clock: Stopwatch
    kv_bytes: int


def media_shape(adapter: Adapter, clip: OpenedClip, preset: Preset) -> MediaShape:
    """How many tokens the clip becomes, from its counts alone; the preset caps the tokens of a frame."""
    return fit.media_shape(adapter, clip_facts(clip), preset)


def clip_facts(clip: OpenedClip, start_s: float | None = None) -> fit.ClipFacts:
    """What of an opened clip is looked at, from `start_s` of its file on."""
    info = clip.info
    if info.kind == "image":
        return fit.ClipFacts(image_size=(info.height, info.width))
    return fit.ClipFacts(
        n_frames=len(clip.frame_times_s),
        height=info.height,
        width=info.width,
        sample_fps=clip.sample_fps,
        n_samples=clip.n_samples,
        start_s=start_s or 0.0,
    )


def media_record(media: str | Path, clip: OpenedClip, mtime: float) -> dict[str, Any]:
    """The report's `media`: the file, and what of it was used."""
    return {
        **asdict(clip.info),
        "path": str(media),
        "mtime": mtime,
        "frames": len(clip.frame_times_s),
        "sample_fps": clip.sample_fps,
        "samples": clip.n_samples,
        "video_used": clip.video_used,
        "video_decoder": clip.video_decoder,
        "audio_used": clip.audio_used,
        "readable_fraction": clip.readable_fraction,
        "frames_replaced": clip.frames_replaced,
    }


def report_of(
    adapter: Adapter,
    run: Run,
    generation: Generation | Sequence,
    environment: EnvironmentReport,
    *,
    load_seconds: float,
    model_options: ModelOptions,
) -> Report:
    """Everything that was measured of a finished run, in the published form."""
    before, counts = run.prompt.layout.counts, run.read.layer_counts
    n_generated = len(generation.token_ids)
    reason = generation.finish_reason or "stop"
    steps = n_generated if reason == "stop" else n_generated - 1
    lengths = [sum(layer) for layer in counts]
    full = [sum(before)] * adapter.n_layers
    cuts = [(drop.after_layer, drop.after) for drop in run.read.drops]
    full_kv = kv_bytes(full, adapter.geometry, adapter.dtype.itemsize)
    return Report(
        schema_version=reporting.SCHEMA_VERSION,
        media=media_record(run.media, run.clip, run.mtime),
        question=run.question,
        answer=generation.text,
        method=reporting.method_record(run.plan),
        tokens=reporting.token_report(before, counts, cuts, n_generated, reason),
        retention=reporting.retention_report(run.plan, before, counts),
        compute=reporting.compute_report(
            prefill_flops(full, adapter.geometry), prefill_flops(lengths, adapter.geometry)
        ),
        timing=reporting.timing_report(run.clock, steps, load_seconds),
        memory=reporting.memory_report(run.kv_bytes, full_kv, peak_memory(adapter.device)),
        environment=environment,
        options={**asdict(model_options), **asdict(replace(run.options, method=run.plan.method))},
    )


def environment_of(adapter: Adapter) -> EnvironmentReport:
    """What an adapter runs on."""
    return reporting.environment_report(
        device=adapter.device,
        dtype=str(adapter.dtype).removeprefix("torch."),
        attention=adapter.attention,
        model=adapter.name,
        revision=adapter.revision,
        family=adapter.geometry.family,
        parameters=adapter.parameter_count,
        quantization=adapter.quantization,
        random_weights=adapter.random_weights,
    )
