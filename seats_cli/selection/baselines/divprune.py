"""DivPrune: the tokens of a whole clip that lie farthest from each other.

Source: arXiv 2503.02175; docs/method.md, "Baselines".
"""

from typing import ClassVar, Literal

import torch
from torch.nn import functional

from seats_cli.presets import Preset
from seats_cli.selection.baselines.shared import thin_evenly
from seats_cli.selection.contract import Kept, MediaTokens, Method, keep_everything
from seats_cli.selection.diversity import MAX_DISTANCES, choose_diverse
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan
from seats_cli.selection.planning import flat_plan


class DivPrune(Method):
    """Video by max-min distance over the whole clip, without saliency; audio thinned evenly.

    `kinds` are those that the published rule chooses among.
    """

    name = "divprune"
    summary = "the clip's video tokens that lie farthest from each other; audio evenly in time"
    source = "DivPrune, arXiv 2503.02175"
    scope: ClassVar[Literal["window", "clip"]] = "clip"
    kinds: ClassVar[tuple[Kind, ...]] = ("video",)

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=False)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        if plan.entry(tokens.kind) == 1.0:
            return keep_everything(tokens)
        if tokens.kind not in self.kinds:
            return thin_evenly(tokens, plan)
        entering = plan.stages[0]
        n_keep = entering.n_video if tokens.kind == "video" else entering.n_audio
        keep = choose_spread(tokens.embeddings, n_keep)
        return Kept(keep, tokens.embeddings[keep])


class DivPruneOm(DivPrune):
    """The same rule for video and audio, each with its own budget."""

    name = "divprune-om"
    summary = "the clip's tokens that lie farthest from each other, video and audio alike"
    source = "DivPrune, arXiv 2503.02175, carried over to audio"
    kinds: ClassVar[tuple[Kind, ...]] = ("video", "audio")


def choose_spread(embeddings: torch.Tensor, n_keep: int, max_distances: int = MAX_DISTANCES) -> torch.Tensor:
    """The `n_keep` of N tokens picked greedily, each the farthest by cosine distance from all before it.

    embeddings: (N, D) any float dtype. Returns (n_keep,) int64, ascending. Ties go to the lowest index. No
    more than `max_distances` distances are held at once: where all N² are too many, each pick computes its
    own row.
    """
    n_tokens = len(embeddings)
    if n_keep == n_tokens or n_tokens**2 <= max_distances:
        return choose_diverse(embeddings[None], None, n_keep)[0]
    unit = functional.normalize(embeddings.float(), dim=-1)
    nearest_other = []
    for some in unit.split(max(1, max_distances // n_tokens)):
        # a token is (about) at distance 0 from itself, so its nearest other is the second-smallest
        nearest_other.append((1.0 - some @ unit.T).topk(2, dim=1, largest=False).values[:, 1])
    pick = torch.cat(nearest_other).argmax(dim=0, keepdim=True)
    picks = [pick]
    to_kept = torch.full_like(unit[:, 0], float("inf"))
    for _ in range(n_keep - 1):
        to_kept = torch.minimum(to_kept, 1.0 - unit @ unit.index_select(0, pick)[0])
        to_kept = to_kept.index_fill(0, pick, float("-inf"))
        pick = to_kept.argmax(dim=0, keepdim=True)
        picks.append(pick)
    return torch.cat(picks).sort().values
