"""A plan from a preset's calibrated rows: measured places where tokens leave, and as many let in as fit.

A row gives, at one total ratio, the split between the kinds, what each middle drop keeps, and the late layer;
the number that enters is what meets the ratio. Source: docs/method.md, "The calibrated schedule" (ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

from seats_cli.presets import CalibratedDrop, CalibratedRow, Preset, Schedule
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan, keep_total
from seats_cli.selection.planning import (
    TOLERANCE,
    KindPlan,
    KindTokens,
    assemble,
    check_ratio,
    full_plan,
    kinds_of,
    split_between_kinds,
    split_table,
)
from seats_cli.selection.schedule import segment_lengths
from seats_cli.selection.split import Bounds


@dataclass(frozen=True)
class Shape:
    """Where tokens leave, whatever their number."""

    drops: tuple[CalibratedDrop, ...]
    late_layer: int | None

    def keeps(self, kind: int) -> tuple[float, ...]:
        """What each drop keeps of video (0) or audio (1)."""
        return tuple((drop.video, drop.audio)[kind] for drop in self.drops)

    def lengths(self, n_layers: int) -> tuple[int, ...]:
        """Layers run up to the first drop, between drops, and up to the late layer."""
        return segment_lengths(n_layers, [drop.after_layer for drop in self.drops], self.late_layer)


def nearest_row(rows: Sequence[CalibratedRow], ratio: float) -> CalibratedRow:
    """The row whose ratio is nearest on a logarithmic scale; of two as near, the smaller."""
    return min(rows, key=lambda row: (abs(log(row.ratio / ratio)), row.ratio))


def calibrated_plan(
    method: str, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions
) -> Plan:
    """SEATS on the preset's calibrated rows. Raises PlanError where the clip allows no ratio so small.

    A kind enters with as many tokens as give its mean retention, exact over the whole clip, one a stage-I
    window at least. Where even all of them entering would stay below `ratio`, the drops go first, then the
    late layer moves up.
    """
    check_ratio(ratio)
    n_media = counts.n_video + counts.n_audio
    if ratio == 1.0 or not n_media:
        return full_plan(method, preset, counts, options)
    row = nearest_row(preset.calibrated, ratio)
    n_layers, kinds = preset.n_layers, kinds_of(preset, counts)
    shape = with_room(Shape(row.drops, row.late_layer), kinds, n_layers, ratio)
    bounds = [
        Bounds(*(_mean(kinds[kind], entry, shape, kind, n_layers) for entry in (0.0, 1.0))) for kind in (0, 1)
    ]
    pair = split_between_kinds(split_table(preset, options), ratio, counts, (bounds[0], bounds[1]), method)
    planned = [_plan_kind(kinds[kind], pair[kind], shape, kind, n_layers) for kind in (0, 1)]
    notes = [f"schedule: calibrated at ratio {row.ratio:g}"]
    if shape != Shape(row.drops, row.late_layer):
        notes.append(f"its drops end or its late layer moves: it would keep a ratio below {ratio:g}")
    schedule = Schedule(tuple(drop.after_layer for drop in shape.drops), shape.late_layer, 1.0, options.tau)
    return assemble(
        method, preset, ratio, counts, options, schedule, (planned[0], planned[1]),
        needs_saliency=True, spread_entry=True, notes=tuple(notes),
    )  # fmt: skip


def with_room(shape: Shape, kinds: tuple[KindTokens, KindTokens], n_layers: int, ratio: float) -> Shape:
    """The shape itself if it can reach `ratio`; else without drops, else with a later late layer."""
    n_media = sum(kind.n for kind in kinds)
    for tried in (shape, Shape((), shape.late_layer)):
        most = sum(_mean(kinds[kind], 1.0, tried, kind, n_layers) * kinds[kind].n for kind in (0, 1))
        if ratio * n_media <= most * (1 + TOLERANCE):
            return tried
    needed = ceil(ratio * n_layers - TOLERANCE)
    return Shape((), needed + 1 if needed < n_layers else None)


def _plan_kind(kind: KindTokens, retention: float, shape: Shape, which: int, n_layers: int) -> KindPlan:
    """As many tokens let in as bring the kind's mean to `retention`."""
    keeps = shape.keeps(which)
    if not kind.n:
        return KindPlan(0.0, 0.0, (0.0,) * len(keeps), (0,) * (len(keeps) + 1))
    level, weight = 1.0, 0.0
    for length, keep in zip(shape.lengths(n_layers), (*keeps, 0.0), strict=True):
        weight += length * level / n_layers
        level *= keep
    entry = min(1.0, retention / weight)
    return KindPlan(retention, entry, keeps, _left(kind, entry, keeps))


def _left(kind: KindTokens, entry: float, keeps: tuple[float, ...]) -> tuple[int, ...]:
    left = [kind.entering_spread(entry) if kind.n else 0]
    for keep in keeps:
        left.append(keep_total(keep, left[-1]))
    return tuple(left)


def _mean(kind: KindTokens, entry: float, shape: Shape, which: int, n_layers: int) -> float:
    """A kind's retention in whole tokens when the fraction `entry` of it enters; 0 for an absent kind."""
    if not kind.n:
        return 0.0
    left = _left(kind, entry, shape.keeps(which))
    lengths = shape.lengths(n_layers)
    return sum(length * n for length, n in zip(lengths, left, strict=True)) / (kind.n * n_layers)
