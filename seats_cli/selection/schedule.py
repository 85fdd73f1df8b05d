"""The decay schedule: how fast tokens of one kind leave the middle layers so that their mean is what was
asked.

Plain arithmetic on the host. Layers are 1-based: "after layer d". Source: docs/method.md, "The decay
schedule".
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import exp

BISECTION_STEPS = 50


def effective_drops(drop_layers: Sequence[int], late_layer: int | None) -> tuple[int, ...]:
    """The drop layers that do something: those before the cut after layer `late_layer` - 1."""
    return tuple(layer for layer in drop_layers if late_layer is None or layer < late_layer - 1)


def decay_weights(n_drops: int) -> tuple[float, ...]:
    """The share of the whole decay that each drop takes, growing by e from one to the next; sums to 1."""
    grown = [exp(step) for step in range(n_drops)]
    return tuple(weight / sum(grown) for weight in grown)


def segment_lengths(n_layers: int, drops: Sequence[int], late_layer: int | None) -> tuple[int, ...]:
    """Layers run at each level: up to the first of the effective `drops`, between them, to the late cut."""
    last = n_layers if late_layer is None else late_layer - 1
    bounds = (0, *drops, last)
    return tuple(end - start for start, end in itertools.pairwise(bounds))


def levels(entry: float, decay: float, n_drops: int) -> tuple[float, ...]:
    """Fraction of a kind's tokens left at each segment when `decay` in [0, 1] of `entry` goes in all."""
    left = [entry]
    for weight in decay_weights(n_drops):
        left.append(max(0.0, left[-1] - decay * entry * weight))
    return tuple(left)


def mean_level(
    entry: float, decay: float, n_layers: int, drop_layers: Sequence[int], late_layer: int | None
) -> float:
    """The mean over all layers of the fraction left: a kind's retention ratio."""
    drops = effective_drops(drop_layers, late_layer)
    lengths = segment_lengths(n_layers, drops, late_layer)
    left = levels(entry, decay, len(drops))
    return sum(length * level for length, level in zip(lengths, left, strict=True)) / n_layers


def solve_decay(
    retention: float, entry: float, n_layers: int, drop_layers: Sequence[int], late_layer: int | None
) -> float:
    """The decay in [0, 1] whose mean level is `retention`; 0 or 1 where that is out of reach."""

    def mean(decay: float) -> float:
        return mean_level(entry, decay, n_layers, drop_layers, late_layer)

    if mean(0.0) <= retention:
        return 0.0
    if mean(1.0) >= retention:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        if mean(middle) > retention:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@lru_cache(maxsize=256)  # the clips of a folder are often alike
def keep_ratios(
    retention: float, entry: float, n_layers: int, drop_layers: tuple[int, ...], late_layer: int | None
) -> tuple[float, ...]:
    """What each effective drop keeps of the tokens still there, rounded to 4 places.

    retention: asked mean over layers; entry: fraction that stage I let in; both of one kind, in [0, 1].
    Drop layers at or past `late_layer` - 1 get no ratio: nothing is left for them to drop.
    """
    n_drops = len(effective_drops(drop_layers, late_layer))
    decay = solve_decay(retention, entry, n_layers, drop_layers, late_layer)
    left = levels(entry, decay, n_drops)
    pairs = itertools.pairwise(left)
    return tuple(round(after / before, 4) if before > 0 else 0.0 for before, after in pairs)
