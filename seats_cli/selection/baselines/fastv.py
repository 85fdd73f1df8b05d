"""FastV: every token through the first layers, then the ones that the question attends to.

Source: arXiv 2403.06764; docs/method.md, "Baselines".
"""

from typing import ClassVar

import torch

from seats_cli.errors import PlanError
from seats_cli.presets import Preset, Schedule
from seats_cli.selection.baselines.shared import thin_evenly
from seats_cli.selection.budget import keep_best
from seats_cli.selection.contract import Drop, Kept, MediaTokens, Method, drop_to, keep_everything
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan, keep_total
from seats_cli.selection.planning import (
    TOLERANCE,
    KindPlan,
    assemble,
    check_ratio,
    full_plan,
    kinds_of,
    rounded_up,
    split_table,
)
from seats_cli.selection.split import Bounds, split_ratio

LATEST_DROP = 2  # published: K = 2
KINDS: tuple[Kind, Kind] = ("video", "audio")


class FastV(Method):
    """Video by the last text token's attention after layer 2 (1 where 2 cost too much); audio thinned evenly.

    `kinds` are those that the published rule chooses among.
    """

    name = "fastv"
    summary = "all video through two layers, then what the question attends to; audio evenly in time"
    source = "FastV, arXiv 2403.06764"
    needs_scores = True
    kinds: ClassVar[tuple[Kind, ...]] = ("video",)

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return one_drop_plan(self.name, preset, ratio, counts, options, self.kinds)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        if tokens.kind in self.kinds or plan.keeps_all:
            return keep_everything(tokens)
        return thin_evenly(tokens, plan)

    def after_layer(self, layer: int, scores: torch.Tensor | None, layout: TokenLayout, plan: Plan) -> Drop:
        step = plan.drop_after(layer)
        if step is None:
            return super().after_layer(layer, scores, layout, plan)
        if scores is None:
            raise ValueError(f"the drop after layer {layer} needs attention scores")
        video = keep_total(step.keep_video, layout.n_video)
        audio = keep_total(step.keep_audio, layout.n_audio)
        kind = layout.kind.to(torch.int64)
        # filled on the device: a list would be copied from the host, and waited for
        quota = torch.cat([kind.new_full((1,), n) for n in (len(layout), video, audio)])
        return drop_to(keep_best(scores, kind, quota), (layout.n_text, video, audio))


class FastVOm(FastV):
    """The same rule for video and audio, each with its own budget."""

    name = "fastv-om"
    summary = "all tokens through two layers, then what the question attends to, video and audio alike"
    source = "FastV, arXiv 2403.06764, carried over to audio"
    kinds: ClassVar[tuple[Kind, ...]] = ("video", "audio")


def one_drop_plan(
    method: str,
    preset: Preset,
    ratio: float,
    counts: ClipCounts,
    options: SelectionOptions,
    whole: tuple[Kind, ...],
) -> Plan:
    """All tokens of the kinds in `whole` through the first layers, then one drop; the other kind is thinned
    before the LLM.

    The drop comes after layer 2 where that leaves each kind the share that it has in other methods, else
    after layer 1; where not even that does, one kind makes up for the other. Raises PlanError where layer 1
    alone costs too much.
    """
    check_ratio(ratio)
    if ratio == 1.0 or not counts.n_video + counts.n_audio:
        return full_plan(method, preset, counts, options)
    n_tokens, n_layers = (counts.n_video, counts.n_audio), preset.n_layers
    table = split_table(preset, options)
    wish = split_ratio(table, ratio, n_tokens, _bounds(preset, counts, whole, 0))
    layer, bounds = 1, _bounds(preset, counts, whole, 1)
    for later in range(2, min(LATEST_DROP, n_layers - 1) + 1):
        floors = _bounds(preset, counts, whole, later)
        if all(share >= floor.least for share, floor in zip(wish, floors, strict=True)):
            layer, bounds = later, floors
    smallest = sum(bound.least * n for bound, n in zip(bounds, n_tokens, strict=True)) / sum(n_tokens)
    if ratio < smallest * (1 - TOLERANCE):
        shown = rounded_up(smallest)
        raise PlanError(
            f"ratio {ratio:g} is too small for {method}: every {' and '.join(whole)} token goes through "
            f"layer 1, which alone is 1/{n_layers} of all layers; the smallest ratio that this clip allows "
            f"is {shown:g}",
            hint=f"use --ratio {shown:g} or more, or another method",
        )
    pair = split_ratio(table, ratio, n_tokens, bounds)
    planned = []
    for name, kind, retention in zip(KINDS, kinds_of(preset, counts), pair, strict=True):
        if not kind.n:
            planned.append(KindPlan(0.0, 0.0, (0.0,), (0, 0)))
        elif name in whole:
            left = round((retention * n_layers - layer) * kind.n / (n_layers - layer))
            left = min(max(left, 1), kind.n)
            planned.append(KindPlan(retention, 1.0, (left / kind.n,), (kind.n, left)))
        else:
            entering = kind.entering_spread(retention)
            planned.append(KindPlan(retention, retention, (1.0,), (entering, entering)))
    return assemble(
        method,
        preset,
        ratio,
        counts,
        options,
        Schedule((layer,), None, 1.0, options.tau),
        (planned[0], planned[1]),
        needs_saliency=False,
        spread_entry=True,
        notes=_notes(method, layer, pair, wish),
    )


def _bounds(preset: Preset, counts: ClipCounts, whole: tuple[Kind, ...], layer: int) -> tuple[Bounds, Bounds]:
    """What each kind's retention may be with a drop after `layer`: at least one token stays, or one a window
    of a kind that is thinned."""
    n_layers = preset.n_layers
    bounds = []
    for name, kind in zip(KINDS, kinds_of(preset, counts), strict=True):
        least = (layer * kind.n + n_layers - layer) / n_layers if name in whole else kind.n_windows
        bounds.append(Bounds(least / kind.n if kind.n else 0.0, 1.0))
    return bounds[0], bounds[1]


def _notes(method: str, layer: int, pair: tuple[float, float], wish: tuple[float, float]) -> tuple[str, ...]:
    notes = []
    if layer < LATEST_DROP:
        notes.append(
            f"{method}: the drop comes after layer {layer}, not {LATEST_DROP}, since every token in "
            f"{LATEST_DROP} layers would be more than a kind's share"
        )
    if any(abs(one - other) > TOLERANCE for one, other in zip(pair, wish, strict=True)):
        notes.append(
            f"{method}: layer {layer} alone is more than a kind's share, so video keeps {pair[0]:.3g} and "
            f"audio {pair[1]:.3g} instead of {wish[0]:.3g} and {wish[1]:.3g}"
        )
    return tuple(notes)
