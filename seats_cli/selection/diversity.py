"""Stage I: keep the tokens of a window that are far from each other and that the encoder attended to.

Tensors of B windows of one size at once; the only Python loop is the greedy one over the K picks. Source:
docs/method.md, "Stage I" (arXiv 2605.20035).
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

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
    pick = _fused_greedy() if embeddings.is_cuda and has_triton() else greedy_max_min
    parts = [
        pick(
            weighted_distances(
                embeddings[start : start + at_once],
                None if saliency is None else saliency[start : start + at_once],
            ),
            n_keep,
        )
        for start in range(0, n_windows, at_once)
    ]
    return torch.cat(parts).sort(dim=1).values


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, (B, N, D) and (B, D, M) to (B, N, M).

    Half-precision inputs on CUDA are multiplied as they are: their products are exact in float32, which is
    what the matrix units add up in, so nothing is gained by widening them first.
    """
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Cosine similarities (B, N, D), (B, M, D) to (B, N, M) float32."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        lengths = [
            torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12) for x in (left, right)
        ]
        return products(left, right.transpose(1, 2)) / (lengths[0][:, :, None] * lengths[1][:, None])
    unit_left, unit_right = (functional.normalize(x.float(), dim=-1) for x in (left, right))
    return unit_left @ unit_right.transpose(1, 2)


def weighted_distances(embeddings: torch.Tensor, saliency: torch.Tensor | None) -> torch.Tensor:
    """D_ij = (1 - cos(e_i, e_j)) a_j 10^6, (B, N, D) to (B, N, N) float32."""
    distances = 1.0 - cosines(embeddings, embeddings)
    if saliency is not None:
        distances = distances * saliency.float()[:, None, :]
    return distances * DISTANCE_SCALE


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; PyTorch's CUDA builds for Linux bring it."""
    return find_spec("triton") is not None


def _fused_greedy() -> Callable[[torch.Tensor, int], torch.Tensor]:
    from seats_cli.selection import kernels

    return kernels.greedy_max_min


def greedy_max_min(distances: torch.Tensor, n_keep: int) -> torch.Tensor:
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
    kept = embeddings.gather(1, keep[:, :, None].expand(-1, -1, width))
    target = cosines(embeddings, kept).argmax(dim=2)
    own = torch.arange(keep.shape[1], device=keep.device).expand(n_windows, -1)
    target = target.scatter(1, keep, own)  # a kept token stays itself, even beside a duplicate
    # a product with the assignment matrix instead of a scatter of sums: deterministic on every device
    assigned = target[:, :, None] == torch.arange(keep.shape[1], device=keep.device)
    sums = products(assigned.transpose(1, 2).to(embeddings.dtype), embeddings)
    merged = sums / assigned.sum(dim=1)[:, :, None]
    return merged.to(embeddings.dtype)
