"""From a trace's removal curve to where a checkpoint's layers read the clip, and a schedule for it.

The curve says what is left when video and audio are both gone from layer l on. In the paper's words layers
are shallow while answers depend on the tokens, middle while that fades, late once it is over. Here:

late_layer   the first layer from which their removal costs no more than the tolerance
shallow_end  the last layer before the curve has won back half of what removal from layer 1 on loses: with
             nothing left after it, more than half of what the clip gives to the answers would be lost
drop_layers  three, at a quarter, half and three quarters of the layers between the two, rounded down; fewer
             where there is no room. From a shallow end at half the depth this gives both published schedules

The curve is smoothed first: the nearest one that never falls as more layers keep their tokens, so that one
noisy point decides nothing. Source: docs/method.md, "Which layers" (arXiv 2605.20035).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, floor
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.presets import Schedule
from seats_cli.selection.schedule import effective_drops, mean_level

N_DROPS = 3
TOLERANCE = 0.01
ROUNDING = 1e-9  # sums of floats that should be equal


@dataclass(frozen=True)
class Boundaries:
    """What is proposed, layers 1-based; None where the curve does not tell.

    measure, tolerance: what the curve was read by, and the loss of it that counts as none
    smoothed:           (layer, value) of the smoothed curve
    notes:              what to know before believing it
    """

    measure: str
    tolerance: float
    shallow_end: int | None
    late_layer: int | None
    drop_layers: tuple[int, ...]
    smoothed: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Whether there is a schedule at all."""
        return self.shallow_end is not None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def schedule(self, n_layers: int, like: Schedule) -> Schedule:
        """The proposal as a preset's schedule: tau as in `like`, and the entry scale too where layers allow.

        The entry scale (lambda) must let enough in to reach a mean over all layers, and no more than the
        drops can take away again. Raises UsageError where nothing was found.
        """
        if not self.found:
            raise UsageError(f"there is no schedule in this trace: {'; '.join(self.notes)}")
        drops = effective_drops(self.drop_layers, self.late_layer)
        least = ceil(100 / mean_level(1.0, 0.0, n_layers, drops, self.late_layer)) / 100
        most = floor(100 / mean_level(1.0, 1.0, n_layers, drops, self.late_layer)) / 100
        scale = max(least, min(like.entry_scale, most))
        return Schedule(self.drop_layers, self.late_layer, scale, like.tau)


def propose(document: Mapping[str, Any], tolerance: float = TOLERANCE) -> Boundaries:
    """The boundaries that a trace document's removal of both kinds shows.

    tolerance: absolute, of the document's measure (0.01: one point in a hundred). Raises UsageError where
    the removal curve was not measured.
    """
    n_layers, measure = document["n_layers"], document["measure"]
    points = {row["layer"]: row[measure] for row in document["removal"] if row["kind"] == "both"}
    if 1 not in points:
        raise UsageError(
            "this trace has no removal curve, which layers are told apart by",
            hint="trace again with --curves removal",
        )
    full = document["full"][measure]
    layers = sorted({**points, n_layers + 1: full})
    values = never_falling([points.get(layer, full) for layer in layers])
    smoothed = tuple(zip(layers, values, strict=True))
    lost = full - values[0]
    if lost <= tolerance + ROUNDING:
        note = (
            f"removing every token costs {lost:.3g} {measure}, no more than the tolerance of {tolerance:g}: "
            "these answers do not need the clip, so they tell nothing about layers"
        )
        return Boundaries(measure, tolerance, None, None, (), smoothed, (note,))
    late = next((layer for layer, value in smoothed if full - value <= tolerance + ROUNDING), n_layers + 1)
    half = next(layer for layer, value in smoothed if value - values[0] >= lost / 2 - ROUNDING)
    half = min(half, late)  # where the tolerance is more than half of the loss
    notes = []
    if late > n_layers:
        last = max(layer for layer in points if layer <= n_layers)
        rest = "" if last == n_layers else " among those traced"
        notes.append(
            f"removing all tokens costs more than {tolerance:g} {measure} even from layer {last} on: "
            f"no late layer{rest}"
        )
    unseen = [
        (name, layer)
        for name, layer in (("late layer", late), ("shallow end", half))
        if 1 < layer <= n_layers and layer - 1 not in points
    ]
    if unseen:
        notes.append(
            f"the {' and the '.join(name for name, _ in unseen)} may lie earlier: not every layer was traced"
        )
    late_layer = late if late <= n_layers else None
    shallow_end = half - 1
    drops = drop_layers(shallow_end, late_layer, n_layers)
    return Boundaries(measure, tolerance, shallow_end, late_layer, drops, smoothed, tuple(notes))


def drop_layers(shallow_end: int, late_layer: int | None, n_layers: int) -> tuple[int, ...]:
    """Up to three layers between the shallow end and the layer before the late one, evenly spaced."""
    last = n_layers if late_layer is None else late_layer - 1
    room = last - shallow_end
    spaced = {shallow_end + step * room // (N_DROPS + 1) for step in range(1, N_DROPS + 1)}
    return tuple(sorted(layer for layer in spaced if shallow_end < layer < last))


def never_falling(values: Sequence[float]) -> list[float]:
    """The nearest sequence in least squares that never falls (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # mean, length
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, n), (high, m) = blocks[-2:]
            blocks[-2:] = [((low * n + high * m) / (n + m), n + m)]
    return [mean for mean, length in blocks for _ in range(length)]


def blocks_of(boundaries: Boundaries, n_layers: int) -> list[tuple[str, int, int]]:
    """(name, first layer, last layer) of the shallow, middle and late block, where there are such layers."""
    if boundaries.shallow_end is None:
        return []
    late = boundaries.late_layer or n_layers + 1
    spans = [
        ("shallow", 1, boundaries.shallow_end),
        ("middle", boundaries.shallow_end + 1, late - 1),
        ("late", late, n_layers),
    ]
    return [(name, first, last) for name, first, last in spans if first <= last]
