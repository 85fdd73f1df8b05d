"""The baselines one token after the other: the references of test_baselines.py."""

import math
from collections.abc import Sequence

import torch


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def best(scores: Sequence[float], n_keep: int) -> list[int]:
    """Indices of the highest scores, ascending; ties to the lowest index."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n_keep])


def visionzip(embeddings: torch.Tensor, saliency: Sequence[float], n_keep: int) -> dict[int, torch.Tensor]:
    """One window: each kept token's index and what it becomes."""
    n_contextual = round(10 / 64 * n_keep)
    dominant = best(saliency, n_keep - n_contextual)
    rest = [i for i in range(len(embeddings)) if i not in dominant]
    targets = [rest[i * len(rest) // n_contextual] for i in range(n_contextual)]
    groups: dict[int, list[int]] = {target: [target] for target in targets}
    for i in rest:
        if i not in targets and targets:
            groups[max(targets, key=lambda t: cosine(embeddings[i], embeddings[t]))].append(i)
    zipped = {i: embeddings[i] for i in dominant}
    zipped.update({target: embeddings[members].mean(dim=0) for target, members in groups.items()})
    return dict(sorted(zipped.items()))


def runs(embeddings: torch.Tensor, n_keep: int, stride: int) -> dict[int, torch.Tensor]:
    """DyCoke-style: where each run begins and its mean."""
    followed = [i - stride if i >= stride else max(i - 1, 0) for i in range(len(embeddings))]
    unlike = [math.inf] + [-cosine(embeddings[i], embeddings[followed[i]]) for i in range(1, len(embeddings))]
    begins = best(unlike, n_keep)
    members: dict[int, list[int]] = {i: [] for i in begins}
    for i in range(len(embeddings)):
        head = i
        while head not in begins:
            head = followed[head]
        members[head].append(i)
    return {head: embeddings[of_run].mean(dim=0) for head, of_run in members.items()}


def peaks(grid: torch.Tensor) -> list[float]:
    """Density peaks: density times the distance to the nearest denser token, of one (P, D) grid."""
    n_tokens = len(grid)
    away = [[max(0.0, 1 - cosine(grid[i], grid[j])) for j in range(n_tokens)] for i in range(n_tokens)]
    density = []
    for i in range(n_tokens):
        nearest = sorted(away[i][j] for j in range(n_tokens) if j != i)[:5]
        density.append(math.exp(-sum(nearest) / len(nearest)))
    scores = []
    for i in range(n_tokens):
        denser = [away[i][j] for j in range(n_tokens) if density[j] > density[i]]
        scores.append(density[i] * (min(denser) if denser else max(away[i])))
    return scores


def compressed_window(grids: torch.Tensor, before: torch.Tensor | None, odd: bool, n_keep: int) -> list[int]:
    """OmniZip-style: the (G, P, D) grids of one window, `before` the grid before them; `odd`: the first of
    them is an odd one of the clip, that is, compressed in space. Indices of what is kept."""
    n_grids, per_grid, _ = grids.shape
    orders = []
    for g in range(n_grids):
        previous = grids[g - 1] if g else before
        if odd == (g % 2 == 0):
            scores = peaks(grids[g])
        else:
            assert previous is not None
            scores = [-cosine(grids[g][p], previous[p]) for p in range(per_grid)]
        orders.append(sorted(range(per_grid), key=lambda p: (-scores[p], p)))
    turns = [g * per_grid + orders[g][turn] for turn in range(per_grid) for g in range(n_grids)]
    return sorted(turns[:n_keep])


def divided(wish: Sequence[float], size: Sequence[int], total: int) -> list[int]:
    """`total` divided by wishes with one factor, at least 1 and at most `size`; found by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        reached = sum(min(max(middle * w, 1), s) for w, s in zip(wish, size, strict=True))
        low, high = (middle, high) if reached < total else (low, middle)
    shares = [round(min(max(low * w, 1), s)) for w, s in zip(wish, size, strict=True)]
    while sum(shares) != total:  # what rounding left over: from the largest, to the smallest
        if sum(shares) > total:
            shares[shares.index(max(shares))] -= 1
        else:
            able = [i for i in range(len(shares)) if shares[i] < size[i]]
            shares[min(able, key=lambda i: shares[i])] += 1
    return shares
