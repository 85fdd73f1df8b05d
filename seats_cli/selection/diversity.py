"""Stage I: keep the tokens of a window that are far from each other and that the encoder attended to.

Tensors of B windows of one size at once; the only Python loop is the greedy one over the K picks. Source:
docs/method.md, "Stage I" (arXiv 2605.20035).
"""

import torch
from torch.nn import functional

DISTANCE_SCALE = 1e6  # the published factor; it changes no comparison, but float32 rounding is compared too
MAX_DISTANCES = 2**26  # entries of the distance matrices held at once: 256 MB in float32


def choose_diverse(embeddings: torch.Tensor, saliency: torch.Tensor | None, n_keep: int) -> torch.Tensor:
    """The `n_keep` most spread and salient of each window's N tokens.

    embeddings: (B, N, D) any float dtype; saliency: (B, N) float32 >= 0, or None for distance alone.
    Returns (B, n_keep) int64, each row ascending. Ties go to the lowest index.
    """
    n_windows, n_tokens, _ = embeddings.shape
    if not 1 <= n_keep <= n_tokens:
        raise ValueError(f"cannot keep {n_keep} of {n_tokens} tokens")
    if n_keep == n_tokens:
        return torch.arange(n_tokens, device=embeddings.device).expand(n_windows, -1)
    at_once = max(1, MAX_DISTANCES // n_tokens**2)
    parts = [
        _greedy_max_min(
            weighted_distances(
                embeddings[start : start + at_once],
                None if saliency is None else saliency[start : start + at_once],
            ),
            n_keep,
        )
        for start in range(0, n_windows, at_once)
    ]
    return torch.cat(parts).sort(dim=1).values


def weighted_distances(embeddings: torch.Tensor, saliency: torch.Tensor | None) -> torch.Tensor:
    """D_ij = (1 - cos(e_i, e_j)) a_j 10^6, (B, N, D) to (B, N, N) float32."""
    unit = functional.normalize(embeddings.float(), dim=-1)
    distances = 1.0 - unit @ unit.transpose(1, 2)
    if saliency is not None:
        distances = distances * saliency.float()[:, None, :]
    return distances * DISTANCE_SCALE


def _greedy_max_min(distances: torch.Tensor, n_keep: int) -> torch.Tensor:
    """Start from the token whose nearest other is farthest, then add the one farthest from all kept.

    distances: (B, N, N), from row i to column j, N >= 2. Returns (B, n_keep) int64 in the order of picking.
    """
    windows = torch.arange(distances.shape[0], device=distances.device)
    # a token is (about) at distance 0 from itself, so its nearest other is the second-smallest of its column
    nearest_other = distances.topk(2, dim=1, largest=False).values[:, 1]
    pick = nearest_other.argmax(dim=1)
    picks = [pick]
    to_kept = distances[windows, pick]
    for _ in range(n_keep - 1):
        # minus infinity where the paper has -1: rounding leaves duplicates slightly below 0, times 10^6
        to_kept = to_kept.scatter(1, pick[:, None], float("-inf"))
        pick = to_kept.argmax(dim=1)
        picks.append(pick)
        to_kept = torch.minimum(to_kept, distances[windows, pick])
    return torch.stack(picks, dim=1)


def merge_dropped(embeddings: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept tokens of each window, each averaged with the dropped ones that are most similar to it.

    embeddings: (B, N, D) any float dtype; keep: (B, K) int64. Returns (B, K, D) in the embeddings' dtype:
    the mean over a kept token and the dropped tokens whose most cosine-similar kept token it is, every token
    counting once.
    """
    n_windows, _, width = embeddings.shape
    values = embeddings.float()
    unit = functional.normalize(values, dim=-1)
    kept_unit = unit.gather(1, keep[:, :, None].expand(-1, -1, width))
    target = (unit @ kept_unit.transpose(1, 2)).argmax(dim=2)
    own = torch.arange(keep.shape[1], device=keep.device).expand(n_windows, -1)
    target = target.scatter(1, keep, own)  # a kept token stays itself, even beside a duplicate
    # a product with the assignment matrix instead of a scatter of sums: deterministic on every device
    assigned = functional.one_hot(target, keep.shape[1]).to(torch.float32)
    merged = assigned.transpose(1, 2) @ values / assigned.sum(dim=1)[:, :, None]
    return merged.to(embeddings.dtype)
