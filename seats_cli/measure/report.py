"""What one answer cost and what it was made from: frozen numbers, as `--json` prints them.

The fields of `Report` are the document's keys, the same for every clip; what does not apply is null. A later
version only adds keys, and raises SCHEMA_VERSION when it changes what one means.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from seats_cli import __version__
from seats_cli.measure.clock import FIRST_TOKEN, PeakMemory, Stopwatch
from seats_cli.selection.plan import Plan

SCHEMA_VERSION = 1
Counts = tuple[int, int, int]  # tokens of kind text, video, audio


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of each kind at one point; image tokens are never pruned and count as text."""

    text: int
    video: int
    audio: int
    total: int

    @staticmethod
    def of(counts: Counts) -> "TokenCounts":
        """From (text, video, audio), the order of `TokenLayout.counts`."""
        return TokenCounts(*counts, total=sum(counts))


@dataclass(frozen=True)
class DropCounts:
    """What was left after the cut behind 1-based layer `after_layer`."""

    after_layer: int
    left: TokenCounts


@dataclass(frozen=True)
class TokenReport:
    """Where the prompt's tokens went.

    before:        as laid out, before any selection
    after_stage_1: what the language model was given
    drops:         what was left after each cut inside it, the late one included
    end:           what came out of its last layer
    per_layer:     what each layer processed, first layer first
    generated:     tokens of the answer, without the one that ended it
    finish_reason: "stop" for an end token, "length" for the limit
    """

    before: TokenCounts
    after_stage_1: TokenCounts
    drops: tuple[DropCounts, ...]
    end: TokenCounts
    per_layer: tuple[TokenCounts, ...]
    generated: int
    finish_reason: str


@dataclass(frozen=True)
class Ratios:
    """A fraction over video and audio together and of each kind; None for a kind that the clip lacks."""

    overall: float | None
    video: float | None
    audio: float | None


@dataclass(frozen=True)
class RetentionReport:
    """Mean over all layers of (tokens processed in the layer / tokens before selection)."""

    asked: Ratios
    reached: Ratios


@dataclass(frozen=True)
class ComputeReport:
    """Prefill of the language model, 1 multiply-add = 1 FLOP as the paper counts (docs/method.md).

    full is what the whole prompt would have cost, kept what was spent, ratio = kept / full.
    """

    full_flops: int
    kept_flops: int
    ratio: float


@dataclass(frozen=True)
class TimingReport:
    """Seconds. `stages` are exclusive of one another; measure/clock.py names them.

    load_s: loading the model, once a session and in no other number here
    time_to_first_token_s: from the call to the choice of the first token
    tokens_per_s: decoding steps a second after that; None where the answer took none
    """

    stages: Mapping[str, float]
    load_s: float
    time_to_first_token_s: float | None
    tokens_per_s: float | None
    total_s: float


@dataclass(frozen=True)
class MemoryReport:
    """Bytes. The KV cache is as prefill left it, and as the whole prompt would have filled it."""

    kv_bytes: int
    kv_bytes_full: int
    peak_bytes: int | None
    peak_source: str


@dataclass(frozen=True)
class EnvironmentReport:
    """What it ran on. `random_weights` means that the answer says nothing about the model; `quantization` is
    how its weights are quantised, None where they are not."""

    seats: str
    python: str
    torch: str
    transformers: str
    av: str
    platform: str
    device: str
    device_name: str
    dtype: str
    attention: str
    model: str
    revision: str | None
    family: str
    parameters: int
    random_weights: bool
    quantization: str | None = None


@dataclass(frozen=True)
class Report:
    """One answer: `to_json()` is what `--json` prints, and the table is a view of it.

    media:   the file as probed and what was read of it; `size_bytes` and `mtime` tell whether it changed
    answer:  the text
    method:  name, preset and the whole plan
    options: every option of the call, by its name in ModelOptions and AskOptions: enough to run it again
    """

    schema_version: int
    media: Mapping[str, Any]
    question: str
    answer: str
    method: Mapping[str, Any]
    tokens: TokenReport
    retention: RetentionReport
    compute: ComputeReport
    timing: TimingReport
    memory: MemoryReport
    environment: EnvironmentReport
    options: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings, finite numbers, booleans and None; ValueError for anything else."""
        plain: dict[str, Any] = jsonable(self)
        return plain

    def rows(self) -> tuple[tuple[str, TokenCounts], ...]:
        """(label, tokens) from the whole prompt to the last layer, as the table shows them."""
        drops = tuple((f"after layer {drop.after_layer}", drop.left) for drop in self.tokens.drops)
        return (
            ("before", self.tokens.before),
            ("after stage I", self.tokens.after_stage_1),
            *drops,
            ("end", self.tokens.end),
        )


def token_report(
    before: Counts,
    layer_counts: Sequence[Counts],
    cuts: Sequence[tuple[int, Counts]],
    generated: int,
    reason: str,
) -> TokenReport:
    """From what prefill recorded: `layer_counts` per layer, `cuts` as (after layer, what was left)."""
    end = cuts[-1][1] if cuts else layer_counts[-1]
    return TokenReport(
        before=TokenCounts.of(before),
        after_stage_1=TokenCounts.of(layer_counts[0]),
        drops=tuple(DropCounts(layer, TokenCounts.of(left)) for layer, left in cuts),
        end=TokenCounts.of(end),
        per_layer=tuple(TokenCounts.of(counts) for counts in layer_counts),
        generated=generated,
        finish_reason=reason,
    )


def retention_report(plan: Plan, before: Counts, layer_counts: Sequence[Counts]) -> RetentionReport:
    """Asked: the plan's ratios; reached: the mean over layers of what they processed."""
    _, video, audio = before
    n_layers = len(layer_counts)
    seen_video = sum(counts[1] for counts in layer_counts)
    seen_audio = sum(counts[2] for counts in layer_counts)

    def share(seen: int, of: int) -> float | None:
        return seen / (of * n_layers) if of else None

    return RetentionReport(
        asked=Ratios(
            plan.ratio if video + audio else None,
            plan.retention_video if video else None,
            plan.retention_audio if audio else None,
        ),
        reached=Ratios(
            share(seen_video + seen_audio, video + audio), share(seen_video, video), share(seen_audio, audio)
        ),
    )


def timing_report(clock: Stopwatch, decoding_steps: int, load_s: float) -> TimingReport:
    """Read a finished stopwatch. `decoding_steps`: forward passes after the prompt's own."""
    seconds = clock.seconds
    generating = seconds.get("generate", 0.0)
    return TimingReport(
        stages=seconds,
        load_s=load_s,
        time_to_first_token_s=clock.marked(FIRST_TOKEN),
        tokens_per_s=decoding_steps / generating if decoding_steps and generating else None,
        total_s=clock.elapsed,
    )


def memory_report(kv_bytes: int, kv_bytes_full: int, peak: PeakMemory) -> MemoryReport:
    """The cache after prefill, what it would be with every token, and the peak."""
    return MemoryReport(kv_bytes, kv_bytes_full, peak.bytes, peak.source)


def compute_report(full_flops: int, kept_flops: int) -> ComputeReport:
    """Both counts and their ratio."""
    return ComputeReport(full_flops, kept_flops, kept_flops / full_flops)


def method_record(plan: Plan) -> dict[str, Any]:
    """The plan as the report shows it: what was decided before anything ran."""
    return {
        "name": plan.method,
        "preset": plan.preset,
        "entry": {"video": plan.entry_video, "audio": plan.entry_audio},
        "stage_1_window": {"video": plan.video_window, "audio": plan.audio_window},
        "drops": plan.drops,
        "late_layer": plan.late_layer,
        "expected_retention": plan.expected_retention,
        "options": plan.options,
        "notes": plan.notes,
    }


def environment_report(
    *,
    device: torch.device,
    dtype: str,
    attention: str,
    model: str,
    revision: str | None,
    family: str,
    parameters: int,
    random_weights: bool,
    quantization: str | None = None,
) -> EnvironmentReport:
    """This machine, these libraries and that model."""
    return EnvironmentReport(
        **versions(),
        platform=platform.platform(),
        device=str(device),
        device_name=device_name(device),
        dtype=dtype,
        attention=attention,
        model=model,
        revision=revision,
        family=family,
        parameters=parameters,
        random_weights=random_weights,
        quantization=quantization,
    )


def device_name(device: torch.device) -> str:
    """What the device calls itself; for a CPU its architecture and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return device.type


def versions() -> dict[str, str]:
    """Of what decides a result: this package, Python and the libraries underneath."""
    found = {"seats": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "av"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def jsonable(value: Any) -> Any:
    """`value` as JSON can carry it; dataclasses become objects. ValueError for NaN and unknown types."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no JSON number")
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"JSON keys are strings, not {sorted(map(repr, value))}")
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    raise ValueError(f"{type(value).__name__} has no place in JSON")
