"""What several baselines do alike: thin a kind evenly in time, turn a mask into indices."""

import torch

from seats_cli.selection.contract import Kept, MediaTokens, by_windows
from seats_cli.selection.plan import Plan


def thin_evenly(tokens: MediaTokens, plan: Plan) -> Kept:
    """The kind's share, evenly spaced in each stage-I window: for a kind that a method says nothing of."""

    def choose(
        embeddings: torch.Tensor, saliency: torch.Tensor | None, indices: torch.Tensor, n_keep: int
    ) -> torch.Tensor:
        n_windows, size = indices.shape
        middles = (2 * torch.arange(n_keep, device=indices.device) + 1) * size // (2 * n_keep)
        return middles.expand(n_windows, -1)

    return by_windows(tokens, plan, choose)


def indices_of(mask: torch.Tensor, n_true: int) -> torch.Tensor:
    """Where `mask` (N,) bool is True, (n_true,) int64 ascending, without asking the device how many."""
    return (~mask).to(torch.uint8).argsort(stable=True)[:n_true]
