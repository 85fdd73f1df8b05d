"""The table of methods, and the contract that all of them meet.

A method is one small class: a few words about itself, `plan`, and at most two hooks. A new one is one class
in one file and one line in `METHODS`. The engine does this and nothing else:

    method = find_method("seats")
    plan = method.plan(preset, ratio, counts, options)    # host numbers; PlanError where it cannot be met
    # Before the LLM, for each kind present. Scope "window": any number of whole stage-I windows at a time, in
    # order, as the encoders deliver them; only the clip's last may be short. Scope "clip": once, everything.
    kept = method.before_llm(MediaTokens("video", embeddings, saliency, first_token=0), plan)
    # Inside the LLM, after each 1-based layer in plan.cut_layers; scores where it is in plan.score_layers.
    drop = method.after_layer(layer, scores, layout, plan)
    hidden, layout = hidden[:, drop.keep], layout.subset(drop.keep, drop.counts)

The types and the base class stand in contract.py, SEATS below, what it is compared with in baselines/.
"""

from collections.abc import Mapping

import torch

from seats_cli.errors import UsageError
from seats_cli.presets import Preset
from seats_cli.selection.baselines import (
    DivPrune,
    DivPruneOm,
    DyCoke,
    FastV,
    FastVOm,
    Fixed,
    Full,
    OmniZip,
    Random,
    VisionZip,
    VisionZipOm,
)
from seats_cli.selection.budget import choose_in_layer, counts_are_known
from seats_cli.selection.calibrated import calibrated_plan
from seats_cli.selection.contract import (
    Drop,
    Kept,
    MediaTokens,
    Method,
    by_windows,
    counted_drop,
    drop_to,
    keep_everything,
)
from seats_cli.selection.diversity import choose_diverse
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan, keep_total
from seats_cli.selection.planning import staged_plan, uses_calibration

__all__ = ["METHODS", "Drop", "Kept", "MediaTokens", "Method", "Seats", "find_method"]


class Seats(Method):
    """Stage-adaptive: diversity before the LLM, the question's attention inside it, then text only."""

    name = "seats"
    summary = (
        "stage by stage: diverse and salient tokens in, the question's choice inside, text only at the end"
    )
    source = "arXiv 2605.20035"
    needs_saliency = True
    needs_scores = True

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        planned = calibrated_plan if uses_calibration(preset, options) else staged_plan
        return planned(self.name, preset, ratio, counts, options)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        if plan.entry(tokens.kind) == 1.0:
            return keep_everything(tokens)
        return by_windows(
            tokens,
            plan,
            lambda embeddings, saliency, _, n_keep: choose_diverse(embeddings, saliency, n_keep),
            merge=plan.options.merge,
        )

    def after_layer(self, layer: int, scores: torch.Tensor | None, layout: TokenLayout, plan: Plan) -> Drop:
        step = plan.drop_after(layer)
        if step is None:
            return super().after_layer(layer, scores, layout, plan)
        if scores is None:
            raise ValueError(f"the drop after layer {layer} needs attention scores")
        mask = choose_in_layer(scores, layout, step.keep_video, step.keep_audio, plan.n_windows, plan.options)
        video = keep_total(step.keep_video, layout.n_video)
        audio = keep_total(step.keep_audio, layout.n_audio)
        if counts_are_known(video, audio, plan.n_windows, plan.options):
            return drop_to(mask, (layout.n_text, video, audio))
        return counted_drop(mask, layout)


_TABLE = (
    Seats(),
    Full(),
    Random(),
    Fixed(),
    FastV(),
    FastVOm(),
    VisionZip(),
    VisionZipOm(),
    DivPrune(),
    DivPruneOm(),
    DyCoke(),
    OmniZip(),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _TABLE}


def find_method(name: str) -> Method:
    """The method of that name. Raises UsageError listing those there are."""
    if name not in METHODS:
        raise UsageError(f"no method {name!r}", hint=f"accepted: {', '.join(METHODS)}")
    return METHODS[name]
