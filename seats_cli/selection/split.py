"""How a total ratio splits between video and audio on one clip.

A preset's table says which mean retention of each kind the paper used at four totals. Between its rows the
pair is interpolated, below the first it shrinks to nothing in proportion, above the last it grows to all of
both; then the pair is scaled until this clip's own total is what was asked. Source: docs/method.md, "One
ratio, two kinds".
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from seats_cli.presets import RatioPair


@dataclass(frozen=True)
class Bounds:
    """What a kind's retention may be on this clip: at least `least` (a token per window), at most `most`."""

    least: float
    most: float


def table_pair(table: Sequence[RatioPair], ratio: float) -> tuple[float, float]:
    """(video, audio) of an ascending table at `ratio`, piecewise linear through (0, 0, 0) and (1, 1, 1)."""
    rows = [RatioPair(0.0, 0.0, 0.0), *table]
    if rows[-1].ratio < 1.0:
        rows.append(RatioPair(1.0, 1.0, 1.0))
    for low, high in itertools.pairwise(rows):
        if ratio <= high.ratio:
            part = (ratio - low.ratio) / (high.ratio - low.ratio)
            return low.video + part * (high.video - low.video), low.audio + part * (high.audio - low.audio)
    return rows[-1].video, rows[-1].audio


def split_ratio(
    table: Sequence[RatioPair],
    ratio: float,
    counts: tuple[int, int],
    bounds: tuple[Bounds, Bounds],
) -> tuple[float, float]:
    """(R_video, R_audio) in the table's relation, with the clip's total at `ratio`; 0 for an absent kind.

    counts: (video, audio) tokens of the clip. bounds: of each kind; where one is met the other kind makes up
    for it. A total outside what the bounds allow gives the nearest that they do.
    """
    relation = table_pair(table, ratio)
    present = [kind for kind in (0, 1) if counts[kind]]
    total = ratio * sum(counts)

    def clipped(kind: int, scale: float) -> float:
        return min(max(scale * relation[kind], bounds[kind].least), bounds[kind].most)

    def reached(scale: float) -> float:
        return sum(counts[kind] * clipped(kind, scale) for kind in present)

    # the total is piecewise linear in the scale, with a corner wherever a kind meets a bound
    ends = (end for kind in present for end in (bounds[kind].least, bounds[kind].most))
    kinds = (kind for kind in present for _ in range(2))
    corners = sorted(end / relation[kind] for end, kind in zip(ends, kinds, strict=True))
    scale = corners[-1] if corners else 0.0
    for low, high in itertools.pairwise(corners):
        below, above = reached(low), reached(high)
        if total <= above:
            part = (total - below) / (above - below) if above > below else 0.0
            scale = low + max(0.0, part) * (high - low)
            break
    video, audio = (clipped(kind, scale) if kind in present else 0.0 for kind in (0, 1))
    return video, audio
