"""Audio-guided compression in the manner of OmniZip: where there is something to hear, more is looked at.

Source: arXiv 2511.14582, with budgets that come out exact; docs/method.md, "Baselines".
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from seats_cli.presets import Preset
from seats_cli.selection.baselines.shared import indices_of
from seats_cli.selection.budget import divide_exactly, keep_best
from seats_cli.selection.contract import Kept, MediaTokens, Method, keep_everything
from seats_cli.selection.diversity import MAX_DISTANCES
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan
from seats_cli.selection.planning import flat_plan

LEAST_KEPT, MOST_KEPT = 0.25, 0.65  # published: video discards 0.75 to 0.35 as a window's sound is kept
NEIGHBOURS = 5  # published, for the density of tokens in a grid


class OmniZip(Method):
    """Audio by saliency; the share of it kept in a window sets the window's video budget; inside a window,
    grids are compressed in space and in time by turns.

    Without audio every window counts alike, which the plan's notes say.
    """

    name = "omnizip"
    summary = "OmniZip-style: salient audio, and more video where more of the audio is salient"
    source = "in the manner of OmniZip, arXiv 2511.14582"
    scope: ClassVar[Literal["window", "clip"]] = "clip"
    needs_saliency = True

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        plan = flat_plan(self.name, preset, ratio, counts, options, needs_saliency=True)
        if counts.n_audio or plan.keeps_all:
            return plan
        note = f"{self.name}: no audio to go by, so all windows have the same share of the video budget"
        return replace(plan, notes=(*plan.notes, note))

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        if plan.entry(tokens.kind) == 1.0:
            return keep_everything(tokens)
        if tokens.kind == "audio":
            keep = indices_of(salient_audio(tokens, plan), plan.stages[0].n_audio)
        else:
            keep = indices_of(self._video(tokens, plan), plan.stages[0].n_video)
        return Kept(keep, tokens.embeddings[keep])

    def _video(self, tokens: MediaTokens, plan: Plan) -> torch.Tensor:
        """(N,) bool, the video tokens to keep."""
        window = _windows(tokens)
        size = torch.zeros(plan.n_windows, dtype=torch.int64, device=window.device)
        size = size.scatter_add_(0, window, torch.ones_like(window))
        wish = size * (LEAST_KEPT + (MOST_KEPT - LEAST_KEPT) * heard(tokens.other, plan, size))
        total = size.new_full((), plan.stages[0].n_video)
        quota = divide_exactly(wish / wish.sum(), size, total)
        # the best of each grid first, then the second best of each: a window's grids share it evenly
        rank = rank_in_grids(tokens.embeddings, plan.tokens_per_grid)
        return keep_best(-rank.float(), window, quota)


def salient_audio(tokens: MediaTokens, plan: Plan) -> torch.Tensor:
    """(N,) bool, the audio tokens of the highest saliency in the whole clip; ties: the lowest index."""
    if plan.entry("audio") == 1.0:
        return torch.ones(len(tokens.embeddings), dtype=torch.bool, device=tokens.embeddings.device)
    if tokens.saliency is None:
        raise ValueError(f"{plan.method} needs the encoder's saliency")
    everything = torch.zeros_like(tokens.saliency, dtype=torch.int64)
    return keep_best(tokens.saliency, everything, everything.new_full((1,), plan.stages[0].n_audio))


def heard(audio: MediaTokens | None, plan: Plan, size: torch.Tensor) -> torch.Tensor:
    """(T,) float32, the share of each window's audio tokens that are kept.

    size: (T,) int64, video tokens in each window. Windows without audio have the mean share, and without any
    audio all have the same.
    """
    mean = torch.full_like(size, 0.5 if audio is None else plan.entry("audio"), dtype=torch.float32)
    if audio is None:
        return mean
    window = _windows(audio)
    kept, present = torch.zeros_like(mean), torch.zeros_like(mean)
    kept.scatter_add_(0, window, salient_audio(audio, plan).float())
    present.scatter_add_(0, window, torch.ones_like(window, dtype=torch.float32))
    return torch.where(present > 0, kept / present.clamp(min=1), mean)


def rank_in_grids(embeddings: torch.Tensor, tokens_per_grid: int) -> torch.Tensor:
    """(N,) int64, each token's rank in its grid, 0 the first to be kept; ties: the lowest index.

    embeddings: (N, D) any float dtype, whole grids. In the 1st, 3rd, ... grid of the clip the peaks of
    density come first, in the others what differs most from the same place of the grid before.
    """
    unit = functional.normalize(embeddings.float(), dim=-1).view(-1, tokens_per_grid, embeddings.shape[1])
    score = torch.empty(unit.shape[:2], device=unit.device)
    in_space = unit[::2]
    at_once = max(1, MAX_DISTANCES // tokens_per_grid**2)
    score[::2] = torch.cat([peak_score(grids) for grids in in_space.split(at_once)])
    score[1::2] = 1.0 - (unit[1::2] * in_space[: len(unit) // 2]).sum(dim=2)
    order = score.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).flatten()


def peak_score(unit: torch.Tensor) -> torch.Tensor:
    """(B, P) float32: local density times the distance to the nearest denser token (density peaks).

    unit: (B, P, D) float32, grids of P normalised tokens. Density is exp of minus the mean distance to the
    nearest 5 others; the densest token's distance is that to the farthest.
    """
    n_tokens = unit.shape[1]
    if n_tokens == 1:
        return torch.ones_like(unit[:, :, 0])
    distances = (1.0 - unit @ unit.transpose(1, 2)).clamp(min=0)
    itself = torch.eye(n_tokens, dtype=torch.bool, device=unit.device)
    others = distances.masked_fill(itself, float("inf"))
    nearest = others.topk(min(NEIGHBOURS, n_tokens - 1), dim=2, largest=False).values
    density = torch.exp(-nearest.mean(dim=2))
    denser = density[:, None, :] > density[:, :, None]  # [i, j]: j is denser than i
    to_denser = others.masked_fill(~denser, float("inf")).amin(dim=2)
    farthest = distances.masked_fill(itself, 0.0).amax(dim=2)
    return density * torch.where(to_denser.isinf(), farthest, to_denser)


def _windows(tokens: MediaTokens) -> torch.Tensor:
    """(N,) int64, the window of each token."""
    if tokens.layout is None:
        raise ValueError("omnizip needs the tokens' layout: it compares video and audio by their windows")
    return tokens.layout.window.to(torch.int64)
