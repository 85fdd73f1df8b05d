"""Methods to compare with: everything, a random choice, and one ratio for all layers.

Each meets the same total as SEATS, with the same split between video and audio, so that they differ in what
they choose and when, not in how much.
"""

import torch

from seats_cli.presets import Preset
from seats_cli.selection.contract import Kept, MediaTokens, Method, by_windows
from seats_cli.selection.diversity import choose_diverse
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan
from seats_cli.selection.planning import check_ratio, flat_plan, full_plan


class Full(Method):
    """Every token in every layer, whatever the ratio: the stock model."""

    name = "full"
    summary = "every token in every layer: the stock model"
    source = "the checkpoint itself"

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        check_ratio(ratio)
        return full_plan(self.name, preset, counts, options)


class Random(Method):
    """A seeded draw within each stage-I window, before the LLM; the same tokens in every layer."""

    name = "random"
    summary = "tokens drawn at random within each window before the LLM (--seed)"
    source = "the usual control; drawn window by window, so that no stretch of time goes unseen"

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=False)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        lots = draw_lots(plan.count(tokens.kind), tokens.kind, plan.options.seed).to(tokens.embeddings.device)

        def choose(
            embeddings: torch.Tensor, saliency: torch.Tensor | None, indices: torch.Tensor, n_keep: int
        ) -> torch.Tensor:
            return lots[indices].argsort(dim=1)[:, :n_keep].sort(dim=1).values

        return by_windows(tokens, plan, choose)


class Fixed(Method):
    """Stage I's diversity alone, at the mean ratio: one keep ratio for all layers, none inside the LLM."""

    name = "fixed"
    summary = "stage I's choice alone, at one ratio for all layers"
    source = "the uniform schedule that arXiv 2605.20035 compares with"
    needs_saliency = True

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=True)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        return by_windows(
            tokens,
            plan,
            lambda embeddings, saliency, _, n_keep: choose_diverse(embeddings, saliency, n_keep),
            merge=plan.options.merge,
        )


def draw_lots(n_tokens: int, kind: Kind, seed: int) -> torch.Tensor:
    """A random order of all the clip's tokens of a kind, (n,) int64, no two alike.

    Drawn on the CPU for the whole clip, so that neither the device nor how the stream was cut changes the
    choice.
    """
    generator = torch.Generator().manual_seed((2 * seed + (kind == "audio")) % 2**63)
    return torch.randperm(n_tokens, generator=generator)
