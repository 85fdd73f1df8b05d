"""Stage II, top down: how relevant each window is to the question, from what the last text token attends to.

The attention row itself comes from the model. Source: docs/method.md, "Stage II" (arXiv 2605.20035).
"""

from dataclasses import dataclass

import torch

from seats_cli.selection.layout import TEXT, TokenLayout
from seats_cli.selection.options import SelectionOptions


@dataclass(frozen=True)
class WindowTokens:
    """The tokens of a layout sorted into windows and kinds: group 2 t is video, 2 t + 1 audio of window t.

    group:   (S,) int64; text is the one group after the last window's
    n_video: (T,) int64, video tokens in each window; n_audio likewise
    """

    group: torch.Tensor
    n_video: torch.Tensor
    n_audio: torch.Tensor

    @property
    def size(self) -> torch.Tensor:
        """(T,) int64, video and audio tokens in each window."""
        return self.n_video + self.n_audio


@dataclass(frozen=True)
class WindowShares:
    """How a clip's attention spreads over its windows: (T,) float32 each, summing to 1."""

    video: torch.Tensor
    audio: torch.Tensor


def sort_into_windows(layout: TokenLayout, n_windows: int) -> WindowTokens:
    """Group tokens by window and kind. n_windows: more than any window id of the layout."""
    kind = layout.kind.to(torch.int64)
    group = torch.where(kind == TEXT, 2 * n_windows, 2 * layout.window.to(torch.int64) + kind - 1)
    counts = torch.zeros(2 * n_windows + 1, dtype=torch.int64, device=group.device)
    counts.scatter_add_(0, group, torch.ones_like(group))
    by_window = counts[:-1].view(n_windows, 2)
    return WindowTokens(group, by_window[:, 0], by_window[:, 1])


def window_shares(scores: torch.Tensor, tokens: WindowTokens, options: SelectionOptions) -> WindowShares:
    """p = softmax(v / tau) and q = softmax(a / tau) over the windows, v and a the mean scores of a kind
    there.

    scores: (S,) float32. With `window_relevance="normalised"`, v and a are first divided by their sums.
    Published budgets give windows without a kind the score 0 in that kind's softmax; exact ones leave them
    out.
    """
    # sums in float64, where the device has it, so that the order of atomic additions cannot show in float32
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    n_windows = tokens.n_video.shape[0]
    sums = torch.zeros(2 * n_windows + 1, dtype=wide, device=scores.device)
    sums = sums.index_add_(0, tokens.group, scores.to(wide))[:-1].view(n_windows, 2)
    counts = torch.stack((tokens.n_video, tokens.n_audio), dim=1)
    means = (sums / counts.clamp(min=1)).float()
    if options.window_relevance == "normalised":
        means = means / means.sum(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    counted = counts > 0 if options.budgets == "exact" else (tokens.size > 0)[:, None]
    shares = torch.softmax((means / options.tau).masked_fill(~counted, float("-inf")), dim=0)
    return WindowShares(shares[:, 0], shares[:, 1])
