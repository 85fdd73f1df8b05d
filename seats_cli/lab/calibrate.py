"""From a checkpoint's trace to its best plan at a mean retention: predict, measure the likeliest, then climb.

A plan is a `CalibratedRow`: the split between the kinds, what one middle drop keeps of each, the late layer.
The trace measured each of these alone; their product predicts a plan (`predicted`), which is rough but finds
where to look. The likeliest plans are then measured, and so are the neighbours of the best one, until none is
better. What the climb was told is how well plans do on one split; report the result on another. Source:
docs/method.md, "How a schedule is calibrated" (ours).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from seats_cli.errors import UsageError
from seats_cli.lab.boundaries import never_falling
from seats_cli.lab.trace_document import of_full
from seats_cli.presets import CalibratedDrop, CalibratedRow

KINDS = ("video", "audio")
RELATIONS = tuple(2.0 ** (step / 2) for step in range(-4, 8))  # R_audio / R_video that are looked at first
NEXT_TO_NOTHING = 0.005  # of all tokens
STEP = 1.5  # how far a neighbour's relation is
PLACES = 4  # of fractions in a row
BEST = 1.0  # nothing does better

Measure = Callable[[Sequence[CalibratedRow]], Sequence[float]]
"""How well each plan does, higher is better; all of them on the same questions."""


@dataclass(frozen=True)
class Curves:
    """A trace as fractions of what full tokens reach, smoothed so that more tokens are never worse.

    mix:     audio tokens to one of video on the traced clips
    removal: per kind ("video", "audio", "both"), (n_layers + 1,): removed from layer l (index l - 1) on
    choice:  (after layer, kept fraction) -> value, both kinds cut at once
    entry:   per kind, fractions that enter and their values, ascending
    """

    n_layers: int
    mix: float
    removal: Mapping[str, np.ndarray]
    choice: Mapping[tuple[int, float], float]
    entry: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Trial:
    """A plan with what the curves predict for it and what was measured."""

    row: CalibratedRow
    predicted: float
    measured: float


@dataclass(frozen=True)
class Found:
    """What a search at one ratio came to. questions, clips: that plans were judged on; failed: questions that
    full tokens were to answer and did not."""

    row: CalibratedRow
    trials: tuple[Trial, ...]
    questions: int
    clips: int
    failed: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Found":
        """From what `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        trials = tuple(
            Trial(_row(trial["row"]), float(trial["predicted"]), float(trial["measured"]))
            for trial in values["trials"]
        )
        row = _row(values["row"])
        if row not in {trial.row for trial in trials}:
            raise ValueError("the plan found is none of those tried")
        return cls(row, trials, int(values["questions"]), int(values["clips"]), int(values["failed"]))


def _row(values: Mapping[str, Any]) -> CalibratedRow:
    drops = tuple(
        CalibratedDrop(int(drop["after_layer"]), float(drop["video"]), float(drop["audio"]))
        for drop in values["drops"]
    )
    late = values["late_layer"]
    ratio, video, audio = (float(values[name]) for name in ("ratio", *KINDS))
    return CalibratedRow(ratio, video, audio, None if late is None else int(late), drops)


def curves_of(document: Mapping[str, Any], measure: str = "probability") -> Curves:
    """The curves of a trace document, each point by what full tokens reach on its own questions.

    Raises UsageError where a needed one was not measured.
    """
    full = document["full"][measure]
    missing = [name for name in ("removal", "choice", "entry") if not document.get(name)]
    if missing or not full:
        raise UsageError(
            f"this trace has no {' and no '.join(missing) or measure} to calibrate from",
            hint="trace again with --curves removal,choice,entry",
        )
    n_layers, counts = document["n_layers"], document["counts"]
    if not (counts["video"] and counts["audio"]):
        raise UsageError(
            "a schedule is calibrated on clips with video and audio; the traced ones lack one of them",
            hint="trace clips that have both",
        )
    removal = {}
    for kind in (*KINDS, "both"):
        rows = [row for row in document["removal"] if row["kind"] == kind]
        points = {row["layer"]: of_full(document, row, measure) for row in rows}
        points.setdefault(n_layers + 1, 1.0)
        layers = sorted(points)
        values = rising(np.array([points[layer] for layer in layers]))
        removal[kind] = np.interp(np.arange(1, n_layers + 2), layers, values)
    entry = {}
    for kind in KINDS:
        rows = [row for row in document["entry"] if row["kind"] == kind]
        points = {row["entry"]: of_full(document, row, measure) for row in rows}
        points.setdefault(1.0, 1.0)
        fractions = np.array(sorted(points))
        entry[kind] = (fractions, rising(np.array([points[fraction] for fraction in fractions.tolist()])))
    choice = {
        (row["after_layer"], row["keep"]): min(of_full(document, row, measure), 1.0)
        for row in document["choice"]
        if row["kind"] == "both"
    }
    return Curves(n_layers, counts["audio"] / counts["video"], removal, choice, entry)


def rising(values: np.ndarray) -> np.ndarray:
    """The nearest sequence in least squares that never falls, of values cut off at 1."""
    return np.array(never_falling(np.minimum(values, 1.0).tolist()))


# ---- one plan ---------------------------------------------------------------------------------------------


def make_row(
    ratio: float, relation: float, mix: float, late_layer: int | None, drops: tuple[CalibratedDrop, ...]
) -> CalibratedRow:
    """The plan at `ratio` with R_audio = relation x R_video on clips with `mix` audio tokens to one of video.

    A kind of which all is kept leaves the rest to the other.
    """
    video = ratio * (1 + mix) / (1 + relation * mix)
    audio = relation * video
    if audio > 1.0:
        audio, video = 1.0, ratio * (1 + mix) - mix
    elif video > 1.0:
        audio, video = (ratio * (1 + mix) - 1) / mix, 1.0
    return CalibratedRow(ratio, round(video, PLACES), round(audio, PLACES), late_layer, drops)


def entries(row: CalibratedRow, n_layers: int) -> tuple[float, float]:
    """The fraction of each kind that enters; above 1 where the row cannot be met."""
    last = n_layers if row.late_layer is None else row.late_layer - 1
    bounds = [0, *(drop.after_layer for drop in row.drops), last]
    found = []
    for kind in KINDS:
        level, weight = 1.0, 0.0
        for start, end, drop in itertools.zip_longest(bounds, bounds[1:], row.drops):
            if end is None:
                break
            weight += (end - start) * level / n_layers
            level *= getattr(drop, kind) if drop is not None else 1.0
        found.append(getattr(row, kind) / weight)
    return found[0], found[1]


def predicted(curves: Curves, row: CalibratedRow) -> float:
    """What the curves make of a plan, as a fraction of full tokens: the product of what each part leaves."""
    value = 1.0
    for kind, entry in zip(KINDS, entries(row, curves.n_layers), strict=True):
        if entry > 1.0 + 1e-9:
            return 0.0
        fractions, values = curves.entry[kind]
        value *= float(np.interp(np.log(entry), np.log(fractions), values))
    late = curves.n_layers + 1 if row.late_layer is None else row.late_layer
    value *= float(curves.removal["both"][late - 1])
    left = dict(zip(KINDS, entries(row, curves.n_layers), strict=True))
    for drop in row.drops:
        gone = [kind for kind in KINDS if getattr(drop, kind) == 0.0]
        value *= min((float(curves.removal[kind][drop.after_layer]) for kind in gone), default=1.0)
        left = {kind: left[kind] * getattr(drop, kind) for kind in KINDS}
        if not gone:
            value *= _chosen(curves, drop.after_layer, left)
    return value


def _chosen(curves: Curves, after_layer: int, left: Mapping[str, float]) -> float:
    """What the question's choice after a layer leaves when these fractions of all tokens are left there.

    The trace chose from all tokens, so its curve is read at the fraction of all that is left: keeping half of
    a tenth is keeping a twentieth. Next to nothing left is worth what removal is.
    """
    measured = sorted((keep, value) for (after, keep), value in curves.choice.items() if after == after_layer)
    removed = float(curves.removal["both"][after_layer])
    points = [(NEXT_TO_NOTHING, removed), *measured, (1.0, 1.0)]
    fraction = (left["video"] + curves.mix * left["audio"]) / (1 + curves.mix)
    values = rising(np.array([value for _, value in points]))
    return float(np.interp(np.log(fraction), np.log([keep for keep, _ in points]), values))


# ---- many plans -------------------------------------------------------------------------------------------


def propose(curves: Curves, ratio: float, n: int) -> list[CalibratedRow]:
    """The `n` plans that the curves like best, each with its own late layer and drops."""
    found = []
    for late, drops in _shapes(curves):
        rows = [make_row(ratio, relation, curves.mix, late, drops) for relation in RELATIONS]
        usable = [row for row in rows if min(row.video, row.audio) > 0]
        if usable:
            best = max(usable, key=lambda row: predicted(curves, row))
            found.append((predicted(curves, best), best))
    found.sort(key=lambda item: -item[0])
    return [row for value, row in found[:n] if value > 0]


def _shapes(curves: Curves) -> Iterator[tuple[int | None, tuple[CalibratedDrop, ...]]]:
    for late in [*range(2, curves.n_layers + 1), None]:
        last = curves.n_layers if late is None else late - 1
        yield late, ()
        for after, keep in curves.choice:
            if after < last:
                yield late, (CalibratedDrop(after, keep, keep),)
        for after in range(1, last):
            yield late, (CalibratedDrop(after, 0.0, 1.0),)
            yield late, (CalibratedDrop(after, 1.0, 0.0),)


def neighbours(curves: Curves, row: CalibratedRow) -> list[CalibratedRow]:
    """Plans one step away: another split, the late layer or a drop moved by one, one drop less, one more."""
    relation, mix = row.audio / row.video, curves.mix
    last = curves.n_layers if row.late_layer is None else row.late_layer - 1

    def with_(late: int | None, drops: tuple[CalibratedDrop, ...], scale: float = 1.0) -> CalibratedRow:
        return make_row(row.ratio, relation * scale, mix, late, drops)

    found = [with_(row.late_layer, row.drops, scale) for scale in (STEP, 1 / STEP)]
    for moved in (last, last + 2):  # the late layer is the one after the last with tokens
        late = None if moved > curves.n_layers else moved
        if moved >= 2 and all(drop.after_layer < moved - 1 for drop in row.drops):
            found.append(with_(late, row.drops))
    for index, drop in enumerate(row.drops):
        others = (*row.drops[:index], *row.drops[index + 1 :])
        found.append(with_(row.late_layer, others))
        for after in (drop.after_layer - 1, drop.after_layer + 1):
            if 1 <= after < last and all(other.after_layer != after for other in others):
                drops = sorted((*others, replace(drop, after_layer=after)), key=lambda d: d.after_layer)
                found.append(with_(row.late_layer, tuple(drops)))
    if not row.drops:
        likely = [item for item in curves.choice.items() if item[0][0] < last]
        likely.sort(key=lambda item: -predicted(curves, with_(row.late_layer, (_both(item[0]),))))
        found += [with_(row.late_layer, (_both(place),)) for place, _ in likely[:2]]
    return [one for one in found if min(one.video, one.audio) > 0 and max(entries(one, curves.n_layers)) <= 1]


def _both(place: tuple[int, float]) -> CalibratedDrop:
    return CalibratedDrop(place[0], place[1], place[1])


def climb(
    curves: Curves,
    ratio: float,
    measure: Measure,
    *,
    first: int = 6,
    rounds: int = 3,
    known: Sequence[CalibratedRow] = (),
    tell: Callable[[Trial], None] = lambda _: None,
) -> tuple[CalibratedRow, list[Trial]]:
    """The best plan found at `ratio`, and every one tried.

    Measures the `first` plans that the curves like best and the `known` ones (those of a neighbouring ratio,
    say), then up to `rounds` times the neighbours of the best so far, until none is better or nothing could
    be. Of equals the one first tried stays.
    Raises UsageError where no plan is possible.
    """
    waiting = [make_row(ratio, row.audio / row.video, curves.mix, row.late_layer, row.drops) for row in known]
    waiting = [row for row in waiting if predicted(curves, row) > 0] + propose(curves, ratio, first)
    trials: list[Trial] = []
    best: Trial | None = None
    for _ in range(rounds + 1):
        tried = {trial.row for trial in trials}
        waiting = [row for row in dict.fromkeys(waiting) if row not in tried]
        if not waiting:
            break
        new = [
            Trial(row, predicted(curves, row), value)
            for row, value in zip(waiting, measure(waiting), strict=True)
        ]
        for trial in new:
            tell(trial)
        trials += new
        top = max(trials, key=lambda trial: trial.measured)
        if top is best:
            break
        best = top
        if best.measured >= BEST:
            break
        waiting = neighbours(curves, best.row)
    if best is None:
        raise UsageError(f"no plan at ratio {ratio:g} fits the traced clips", hint="try a larger ratio")
    return best.row, trials
