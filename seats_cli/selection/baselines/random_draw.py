"""The control: tokens drawn at random, window by window."""

import torch

from seats_cli.presets import Preset
from seats_cli.selection.contract import Kept, MediaTokens, Method, by_windows
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan
from seats_cli.selection.planning import flat_plan
from seats_cli.selection.transfer import on_device


class Random(Method):
    """A seeded draw within each stage-I window, before the LLM; the same tokens in every layer."""

    name = "random"
    summary = "tokens drawn at random within each window before the LLM (--seed)"
    source = "the usual control; drawn window by window, so that no stretch of time goes unseen"

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=False)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        device = tokens.embeddings.device
        lots = draw_lots(plan.count(tokens.kind), tokens.kind, plan.options.seed, device)

        def choose(
            embeddings: torch.Tensor, saliency: torch.Tensor | None, indices: torch.Tensor, n_keep: int
        ) -> torch.Tensor:
            return lots[indices].argsort(dim=1)[:, :n_keep].sort(dim=1).values

        return by_windows(tokens, plan, choose)


def draw_lots(n_tokens: int, kind: Kind, seed: int, device: torch.device) -> torch.Tensor:
    """A random order of all the clip's tokens of a kind, (n,) int64, no two alike, on `device`.

    Drawn on the CPU for the whole clip, so that neither the device nor how the stream was cut changes the
    choice.
    """
    generator = torch.Generator().manual_seed((2 * seed + (kind == "audio")) % 2**63)
    return on_device(torch.randperm(n_tokens, generator=generator), device)
