"""Making a plan: from a preset, a ratio and a clip's counts to the numbers of every layer.

Host arithmetic only. What a plan promises is computed in whole tokens, as stages I and II will take them.
Source: docs/method.md, "The plan".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from seats_cli.errors import PlanError
from seats_cli.presets import Preset, RatioPair, Schedule
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, DropStep, Plan, Stage, keep_count, keep_total, spread_total
from seats_cli.selection.schedule import effective_drops, keep_ratios, mean_level, segment_lengths
from seats_cli.selection.split import Bounds, split_ratio

ALMOST_NOTHING = 1e-9  # a retention so small that only the floors of one token are left
TOLERANCE = 1e-6


@dataclass(frozen=True)
class KindTokens:
    """One kind's tokens in a clip: n, in stage-I windows of `window`; the last may be shorter."""

    n: int
    window: int

    @property
    def n_windows(self) -> int:
        """Stage-I windows of this kind."""
        return -(-self.n // self.window)

    def entering(self, entry: float) -> int:
        """Tokens that stage I keeps when every window rounds by itself."""
        if not self.n:
            return 0
        whole, rest = divmod(self.n, self.window)
        return whole * keep_count(entry, self.window) + (keep_count(entry, rest) if rest else 0)

    def entering_spread(self, entry: float) -> int:
        """Tokens that stage I keeps when windows share their rounding; one a window at least."""
        return spread_total(entry, self.n, self.window)


@dataclass(frozen=True)
class KindPlan:
    """One kind's part of a plan: the asked retention, entry ratio, what each effective drop keeps, and the
    tokens `left` after stage I and after each drop."""

    retention: float
    entry: float
    keeps: tuple[float, ...]
    left: tuple[int, ...]


def check_ratio(ratio: float) -> None:
    """Raise PlanError unless 0 < ratio <= 1."""
    if not (isfinite(ratio) and 0 < ratio <= 1):
        raise PlanError(
            f"ratio {ratio:g} is out of range", hint="--ratio is above 0 and at most 1 (all tokens)"
        )


def check_schedule(schedule: Schedule, n_layers: int) -> None:
    """Raise PlanError for drop layers out of order or layers that the network does not have."""
    drops, late = schedule.drop_layers, schedule.late_layer
    if list(drops) != sorted(set(drops)):
        raise PlanError(f"drop_layers {list(drops)} are out of order", hint="give each layer once, ascending")
    if drops and not 1 <= drops[0] <= drops[-1] < n_layers:
        raise PlanError(
            f"drop_layers {list(drops)} do not fit a network of {n_layers} layers",
            hint=f"drop_layers are 1 to {n_layers - 1}",
        )
    if late is not None and not 2 <= late <= n_layers:
        raise PlanError(
            f"late_layer {late} does not fit a network of {n_layers} layers",
            hint=f"late_layer is 2 to {n_layers}, or null to keep tokens to the end",
        )


def kinds_of(preset: Preset, counts: ClipCounts) -> tuple[KindTokens, KindTokens]:
    """The clip's video and audio with their stage-I windows in tokens."""
    if counts.n_video and not counts.tokens_per_grid:
        raise ValueError("a clip with video tokens needs tokens_per_grid")
    video_window = preset.windows.video_grids * max(counts.tokens_per_grid, 1)
    return KindTokens(counts.n_video, video_window), KindTokens(counts.n_audio, preset.windows.audio_tokens)


def staged_plan(
    method: str, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions
) -> Plan:
    """SEATS: stage I, the decay over the middle layers, the late cut. Raises PlanError."""
    check_ratio(ratio)
    check_schedule(preset.schedule, preset.n_layers)
    if ratio == 1.0 or not counts.n_video + counts.n_audio:
        return full_plan(method, preset, counts, options)
    schedule, notes = _with_room(preset.schedule, preset.n_layers, ratio)
    kinds = kinds_of(preset, counts)
    floors = [_plan_kind(kind, ALMOST_NOTHING, schedule, preset.n_layers, options) for kind in kinds]
    most = max(ratio, _layers_with_media(preset.schedule, preset.n_layers) / preset.n_layers)
    bounds = [
        Bounds(_mean(kind, floor, schedule, preset.n_layers), most)
        for kind, floor in zip(kinds, floors, strict=True)
    ]
    video, audio = split_between_kinds(
        split_table(preset, options), ratio, counts, (bounds[0], bounds[1]), method
    )
    planned = (
        _plan_kind(kinds[0], video, schedule, preset.n_layers, options),
        _plan_kind(kinds[1], audio, schedule, preset.n_layers, options),
    )
    if options.budgets == "exact":
        for kind, one, bound in zip(kinds, planned, bounds, strict=True):
            if kind.n and one.retention > bound.least * (1 + TOLERANCE):
                _check_entry_scale(one, schedule, preset.n_layers, options.entry_scale)
    return assemble(
        method, preset, ratio, counts, options, schedule, planned, notes=notes, needs_saliency=True
    )


def flat_plan(
    method: str,
    preset: Preset,
    ratio: float,
    counts: ClipCounts,
    options: SelectionOptions,
    *,
    needs_saliency: bool,
) -> Plan:
    """All selection before the LLM: the same tokens in every layer, kinds split as `split_table` says.

    Whole-clip totals are exact (windows share their rounding), with one token a window at
    least.
    """
    check_ratio(ratio)
    if ratio == 1.0 or not counts.n_video + counts.n_audio:
        return full_plan(method, preset, counts, options)
    kinds = kinds_of(preset, counts)
    bounds = [Bounds(kind.n_windows / max(kind.n, 1), 1.0) for kind in kinds]
    pair = split_between_kinds(split_table(preset, options), ratio, counts, (bounds[0], bounds[1]), method)
    planned = [
        KindPlan(retention, retention, (), (kind.entering_spread(retention),))
        for kind, retention in zip(kinds, pair, strict=True)
    ]
    nothing = Schedule((), None, 1.0, options.tau)
    return assemble(
        method,
        preset,
        ratio,
        counts,
        options,
        nothing,
        (planned[0], planned[1]),
        needs_saliency=needs_saliency,
        spread_entry=True,
    )


def full_plan(method: str, preset: Preset, counts: ClipCounts, options: SelectionOptions) -> Plan:
    """Every token in every layer: `Plan.keeps_all` holds."""
    kinds = kinds_of(preset, counts)
    return Plan(
        method=method,
        preset=preset.name,
        ratio=1.0,
        n_layers=preset.n_layers,
        n_video=counts.n_video,
        n_audio=counts.n_audio,
        n_windows=counts.n_windows,
        tokens_per_grid=counts.tokens_per_grid,
        retention_video=1.0,
        retention_audio=1.0,
        entry_video=1.0,
        entry_audio=1.0,
        video_window=kinds[0].window,
        audio_window=kinds[1].window,
        drops=(),
        late_layer=None,
        stages=(),
        expected_retention=1.0,
        options=options,
        needs_saliency=False,
        score_layers=(),
    )


def assemble(
    method: str,
    preset: Preset,
    ratio: float,
    counts: ClipCounts,
    options: SelectionOptions,
    schedule: Schedule,
    planned: tuple[KindPlan, KindPlan],
    *,
    needs_saliency: bool,
    spread_entry: bool = False,
    notes: tuple[str, ...] = (),
) -> Plan:
    """A `Plan` from the two kinds' parts, whose `keeps` and `left` follow `schedule`'s effective drops.

    A drop that keeps everything is left out. The building block for methods with plans of their own.
    """
    kinds = kinds_of(preset, counts)
    video, audio = planned
    drops: list[DropStep] = []
    stages = [Stage("stage I", 0, video.left[0], audio.left[0])]
    for index, layer in enumerate(effective_drops(schedule.drop_layers, schedule.late_layer)):
        left = Stage(f"after layer {layer}", layer, video.left[index + 1], audio.left[index + 1])
        if (left.n_video, left.n_audio) != (stages[-1].n_video, stages[-1].n_audio):
            drops.append(DropStep(layer, video.keeps[index], audio.keeps[index]))
            stages.append(left)
    if schedule.late_layer is not None:
        stages.append(Stage("late", schedule.late_layer - 1, 0, 0))
    total = sum(
        _mean(kind, one, schedule, preset.n_layers) * kind.n for kind, one in zip(kinds, planned, strict=True)
    )
    return Plan(
        method=method,
        preset=preset.name,
        ratio=ratio,
        n_layers=preset.n_layers,
        n_video=counts.n_video,
        n_audio=counts.n_audio,
        n_windows=counts.n_windows,
        tokens_per_grid=counts.tokens_per_grid,
        retention_video=video.retention,
        retention_audio=audio.retention,
        entry_video=video.entry,
        entry_audio=audio.entry,
        video_window=kinds[0].window,
        audio_window=kinds[1].window,
        drops=tuple(drops),
        late_layer=schedule.late_layer,
        stages=tuple(stages),
        expected_retention=total / (counts.n_video + counts.n_audio),
        options=options,
        needs_saliency=needs_saliency,
        score_layers=tuple(drop.after_layer for drop in drops),
        spread_entry=spread_entry,
        notes=notes,
    )


def _plan_kind(
    kind: KindTokens, retention: float, schedule: Schedule, n_layers: int, options: SelectionOptions
) -> KindPlan:
    """One kind's entry and decay. With exact budgets the decay starts from the tokens that really enter, and
    without middle drops the entry alone meets the ratio, whatever lambda is."""
    if not kind.n:
        n_drops = len(effective_drops(schedule.drop_layers, schedule.late_layer))
        return KindPlan(0.0, 0.0, (0.0,) * n_drops, (0,) * (n_drops + 1))
    scale = options.entry_scale
    if options.budgets == "exact" and not effective_drops(schedule.drop_layers, schedule.late_layer):
        scale = n_layers / _layers_with_media(schedule, n_layers)
    entry = min(1.0, scale * retention)
    left = [kind.entering(entry)]
    entering = left[0] / kind.n if options.budgets == "exact" else entry
    decay = keep_ratios(retention, entering, n_layers, schedule.drop_layers, schedule.late_layer)
    # a decay to nothing leaves stage II's floors: only a calibrated drop may take a kind away
    keeps = tuple(keep or ALMOST_NOTHING for keep in decay)
    for keep in keeps:
        left.append(keep_total(keep, left[-1]))
    return KindPlan(retention, entry, keeps, tuple(left))


def _mean(kind: KindTokens, planned: KindPlan, schedule: Schedule, n_layers: int) -> float:
    """A kind's retention as the plan's whole tokens give it; 0 for an absent kind."""
    if not kind.n:
        return 0.0
    drops = effective_drops(schedule.drop_layers, schedule.late_layer)
    lengths = segment_lengths(n_layers, drops, schedule.late_layer)
    return sum(length * left for length, left in zip(lengths, planned.left, strict=True)) / (
        kind.n * n_layers
    )


def _layers_with_media(schedule: Schedule, n_layers: int) -> int:
    return n_layers if schedule.late_layer is None else schedule.late_layer - 1


def _with_room(schedule: Schedule, n_layers: int, ratio: float) -> tuple[Schedule, tuple[str, ...]]:
    """The schedule, its late layer moved up where fewer layers would see media than `ratio` needs."""
    if ratio <= _layers_with_media(schedule, n_layers) / n_layers:
        return schedule, ()
    needed = ceil(ratio * n_layers - TOLERANCE)
    late = needed + 1 if needed < n_layers else None
    moved = f"to {late}" if late else "away: some tokens stay to the last layer"
    note = (
        f"late layer {schedule.late_layer} moved {moved}, since it alone would keep a ratio below {ratio:g}"
    )
    return Schedule(schedule.drop_layers, late, schedule.entry_scale, schedule.tau), (note,)


def uses_calibration(preset: Preset, options: SelectionOptions) -> bool:
    """Whether the plan comes from the preset's calibrated rows."""
    return bool(preset.calibrated) and options.schedule != "paper"


def split_table(preset: Preset, options: SelectionOptions) -> Sequence[RatioPair]:
    """How a total splits between the kinds, for SEATS and for what it is compared with alike."""
    return preset.calibrated if uses_calibration(preset, options) else preset.ratio_table


def split_between_kinds(
    table: Sequence[RatioPair],
    ratio: float,
    counts: ClipCounts,
    bounds: tuple[Bounds, Bounds],
    method: str,
) -> tuple[float, float]:
    """The mean retention of video and of audio on this clip. Raises PlanError below what the bounds allow."""
    n_video, n_audio = counts.n_video, counts.n_audio
    smallest = (bounds[0].least * n_video + bounds[1].least * n_audio) / (n_video + n_audio)
    if ratio < smallest * (1 - TOLERANCE):
        shown = rounded_up(smallest)
        raise PlanError(
            f"ratio {ratio:g} is too small: every window keeps at least one token of each kind, and the "
            f"smallest this clip allows is {shown:g}",
            hint=f"use --ratio {shown:g} or more ({method} on {n_video} video and {n_audio} audio tokens)",
        )
    return split_ratio(table, ratio, (n_video, n_audio), bounds)


def _check_entry_scale(planned: KindPlan, schedule: Schedule, n_layers: int, entry_scale: float) -> None:
    """Raise PlanError where no decay between none and all of it can bring the mean to what was asked."""
    where = (n_layers, schedule.drop_layers, schedule.late_layer)
    most, least = (mean_level(planned.entry, decay, *where) for decay in (0.0, 1.0))
    if most < planned.retention * (1 - TOLERANCE):
        needed = rounded_up(n_layers / _layers_with_media(schedule, n_layers))
        raise PlanError(
            f"entry_scale {entry_scale:g} lets too few tokens in: with late layer {schedule.late_layer} of "
            f"{n_layers} it takes {needed:g} to reach a mean of {planned.retention:.3g}",
            hint=f"--set entry_scale={needed:g} or more, or a later late_layer",
        )
    if least > planned.retention * (1 + TOLERANCE):
        largest = _rounded_down(entry_scale * planned.retention / least)
        raise PlanError(
            f"entry_scale {entry_scale:g} lets too many tokens in: even dropping all of them after layers "
            f"{list(schedule.drop_layers)} leaves a mean of {least:.3g}, above {planned.retention:.3g}",
            hint=f"--set entry_scale={largest:g} or less, or earlier drop layers",
        )


def rounded_up(value: float) -> float:
    """To two significant digits, never below `value`: what an error may tell people to type."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return round(ceil(value / unit - TOLERANCE) * unit, 12)


def _rounded_down(value: float) -> float:
    unit = 10.0 ** (floor(log10(value)) - 1)
    return round(floor(value / unit + TOLERANCE) * unit, 12)
