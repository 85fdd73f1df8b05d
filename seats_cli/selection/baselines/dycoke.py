"""Temporal merging in the manner of DyCoke: what does not change from one grid to the next becomes one token.

Source: the first stage of arXiv 2411.15024, with budgets that come out exact; docs/method.md, "Baselines".
"""

from typing import ClassVar, Literal

import torch
from torch.nn import functional

from seats_cli.presets import Preset
from seats_cli.selection.contract import Kept, MediaTokens, Method, keep_everything
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan
from seats_cli.selection.planning import flat_plan

ROWS_AT_ONCE = 4096  # rows widened to float64 at once


class DyCoke(Method):
    """Runs of like tokens, averaged: video along each place of the picture, audio along time."""

    name = "dycoke"
    summary = "DyCoke-style: tokens that hardly change from one grid to the next are merged in time"
    source = "in the manner of DyCoke's temporal merging, arXiv 2411.15024"
    scope: ClassVar[Literal["window", "clip"]] = "clip"

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        return flat_plan(self.name, preset, ratio, counts, options, needs_saliency=False)

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        if plan.entry(tokens.kind) == 1.0:
            return keep_everything(tokens)
        if tokens.kind == "video":
            return merge_runs(tokens.embeddings, plan.stages[0].n_video, plan.tokens_per_grid)
        return merge_runs(tokens.embeddings, plan.stages[0].n_audio, 1)


def merge_runs(embeddings: torch.Tensor, n_keep: int, stride: int) -> Kept:
    """`n_keep` runs of like tokens, each averaged into its first.

    embeddings: (N, D) any float dtype, N >= 1, 1 <= n_keep <= N. A token follows the one `stride` places
    before it, and within the first `stride` tokens its left neighbour. The n_keep tokens least similar to the
    one that they follow (cosine; ties: the lowest index) begin a run; every other joins the run of the token
    that it follows.
    """
    n_tokens, device = len(embeddings), embeddings.device
    place = torch.arange(n_tokens, device=device)
    followed = torch.where(place >= stride, place - stride, (place - 1).clamp(min=0))
    unit = functional.normalize(embeddings.float(), dim=-1)
    likeness = (unit * unit[followed]).sum(dim=1)
    likeness[:1] = float("-inf")  # the first token follows none
    keep = likeness.argsort(stable=True)[:n_keep].sort().values
    begins = torch.zeros_like(place, dtype=torch.bool).index_fill_(0, keep, True)
    head = torch.where(begins, place, followed)
    for _ in range(n_tokens.bit_length()):  # each step doubles how far back a token has looked
        head = head[head]
    return Kept(keep, _means(embeddings, torch.searchsorted(keep, head), n_keep))


def _means(embeddings: torch.Tensor, group: torch.Tensor, n_groups: int) -> torch.Tensor:
    """(n_groups, D), the mean embedding of each group; group: (N,) int64."""
    # sums in float64, where the device has it, so that the order of atomic additions cannot show in float32
    wide = torch.float32 if embeddings.device.type == "mps" else torch.float64
    sums = torch.zeros(n_groups, embeddings.shape[1], dtype=wide, device=embeddings.device)
    for rows, groups in zip(embeddings.split(ROWS_AT_ONCE), group.split(ROWS_AT_ONCE), strict=True):
        sums.index_add_(0, groups, rows.to(wide))
    sizes = torch.zeros_like(sums[:, 0]).index_add_(0, group, torch.ones_like(group, dtype=wide))
    return (sums / sizes[:, None]).to(embeddings.dtype)
