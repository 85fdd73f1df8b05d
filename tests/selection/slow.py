"""The obvious, slow forms of what seats_cli.selection computes at once: the references of the tests here."""

import math
from collections.abc import Sequence

import torch


def greedy_max_min(distances: torch.Tensor, n_keep: int) -> list[int]:
    """Stage I on one window's (N, N) distances, one comparison after the other."""
    n_tokens = len(distances)
    rows = distances.tolist()
    nearest = [sorted(rows[i][j] for i in range(n_tokens))[1] for j in range(n_tokens)]
    kept = [nearest.index(max(nearest))]
    while len(kept) < n_keep:
        best, best_distance = -1, -math.inf
        for j in range(n_tokens):
            if j not in kept:
                distance = min(rows[i][j] for i in kept)
                if distance > best_distance:
                    best, best_distance = j, distance
        kept.append(best)
    return sorted(kept)


def meet_total(values: Sequence[int], least: Sequence[int], most: Sequence[int], total: int) -> list[int]:
    """Take 1 from the largest while too many, give 1 to the smallest while too few; ties: lowest index."""
    values = list(values)
    while sum(values) > total:
        able = [i for i in range(len(values)) if values[i] > least[i]]
        if not able:
            break
        values[max(able, key=lambda i: (values[i], -i))] -= 1
    while sum(values) < total:
        able = [i for i in range(len(values)) if values[i] < most[i]]
        if not able:
            break
        values[min(able, key=lambda i: (values[i], i))] += 1
    return values


def published_budgets(
    p: torch.Tensor,
    q: torch.Tensor,
    n_video: Sequence[int],
    n_audio: Sequence[int],
    k_video: int,
    k_audio: int,
) -> tuple[list[int], list[int]]:
    """Stage II's published budgets, window by window, in float32 and halves to even."""
    total = k_video + k_audio
    sizes = [v + a for v, a in zip(n_video, n_audio, strict=True)]
    budget = []
    for t, size in enumerate(sizes):
        wanted = int(((p[t] + q[t]) / 2 * total).round())
        budget.append(min(max(wanted, 1), size))
    budget = meet_total(budget, [1] * len(sizes), sizes, total)
    video, audio = [], []
    for t, b in enumerate(budget):
        f = p[t] * k_video / (p[t] * k_video + q[t] * k_audio + 1e-12)
        v = min(int((b * f).round()), n_video[t])
        a = min(b - v, n_audio[t])
        more = min(b - v - a, n_video[t] - v)
        v += more
        a += min(b - v - a, n_audio[t] - a)
        if n_video[t] and v == 0:
            v = 1
            if a > 1:
                a = max(min(n_audio[t], b - v), 1)
        if n_audio[t] and a == 0:
            a = 1
            if v > 1:
                v = max(min(n_video[t], b - a), 1)
        video.append(v)
        audio.append(a)
    return video, audio


def keep_best(scores: Sequence[float], group: Sequence[int], quota: Sequence[int]) -> list[bool]:
    """The highest scores of each group, ties to the lowest index."""
    keep = [False] * len(scores)
    for g, n_keep in enumerate(quota):
        members = [i for i in range(len(scores)) if group[i] == g]
        for i in sorted(members, key=lambda i: (-scores[i], i))[:n_keep]:
            keep[i] = True
    return keep
