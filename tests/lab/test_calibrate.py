"""The optimiser finds the plan that an invented checkpoint likes, and its arithmetic is the plan's."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seats_cli.errors import UsageError
from seats_cli.lab.calibrate import (
    CalibratedRow,
    Curves,
    Trial,
    climb,
    curves_of,
    entries,
    make_row,
    neighbours,
    predicted,
    propose,
    rising,
)
from seats_cli.presets import CalibratedDrop, load_preset
from seats_cli.selection.calibrated import calibrated_plan
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts

N_LAYERS = 14
MIX = 0.4


def document(**changes: Any) -> dict[str, Any]:
    """The trace of a checkpoint that needs both kinds to layer 8, and video much more than audio."""

    def removed(kind: str, layer: int) -> float:
        if layer > 8:
            return 0.9
        return {"video": 0.5, "audio": 0.8, "both": 0.4}[kind] * layer / 8

    trace = {
        "n_layers": N_LAYERS,
        "counts": {"video": 1000.0, "audio": 1000.0 * MIX},
        "full": {"probability": 0.9, "n": 40},
        "removal": [
            {"kind": kind, "layer": layer, "probability": removed(kind, layer), "n": 40}
            for kind in ("video", "audio", "both")
            for layer in range(1, N_LAYERS + 2)
        ],
        "choice": [
            {
                "kind": "both",
                "after_layer": after,
                "keep": keep,
                "probability": 0.9 if after > 5 else 0.3,
                "n": 40,
            }
            for after in range(1, N_LAYERS)
            for keep in (0.1, 0.5)
        ],
        "entry": [
            {"kind": kind, "entry": e, "probability": 0.9 * (1 - 0.5 * np.exp(-e * rate)), "n": 40}
            for kind, rate in (("video", 10.0), ("audio", 40.0))
            for e in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
        ],
    }
    return {**trace, **changes}


def test_rising_is_the_nearest_that_never_falls() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.random(5)
        found = rising(values)
        assert (np.diff(found) >= -1e-12).all()
        for _ in range(200):  # no other rising sequence is nearer
            other = np.sort(rng.random(5))
            assert ((found - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-12
    assert rising(np.array([0.2, 1.5])).tolist() == [0.2, 1.0]


def test_a_row_means_the_ratio_on_the_mix_it_was_made_for() -> None:
    rng = random.Random(1)
    for _ in range(200):
        ratio, relation, mix = rng.uniform(0.02, 0.9), rng.uniform(0.2, 12), rng.uniform(0.1, 3)
        row = make_row(ratio, relation, mix, None, ())
        assert (row.video + mix * row.audio) / (1 + mix) == pytest.approx(ratio, abs=2e-4)
        assert max(row.video, row.audio) <= 1.0
        if max(row.video, row.audio) < 1.0:
            assert row.audio / row.video == pytest.approx(relation, rel=0.02)


def test_entries_are_those_of_the_plan() -> None:
    preset = load_preset("tiny")
    counts = ClipCounts(20000, 8000, 64, 40)
    for late, drops in [
        (9, ()),
        (None, ()),
        (11, (CalibratedDrop(4, 0.5, 0.25),)),
        (12, (CalibratedDrop(3, 0.5, 1.0), CalibratedDrop(7, 0.25, 0.0))),
    ]:
        row = make_row(0.1, 2.0, MIX, late, drops)
        made = replace(preset, calibrated=(row,))
        plan = calibrated_plan("seats", made, 0.1, counts, SelectionOptions())
        assert entries(row, N_LAYERS) == pytest.approx((plan.entry_video, plan.entry_audio), rel=2e-3)


def test_a_prediction_is_the_product_of_what_was_traced() -> None:
    curves = curves_of(document())
    row = make_row(0.1, 1.0, MIX, 5, ())
    entry = 0.1 * N_LAYERS / 4
    fractions = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0]
    expected = 0.4 * 5 / 8 / 0.9
    for rate in (10.0, 40.0):
        kept = [1 - 0.5 * np.exp(-f * rate) for f in fractions[:-1]] + [1.0]
        expected *= float(np.interp(np.log(entry), np.log(fractions), kept))
    assert predicted(curves, row) == pytest.approx(expected, rel=1e-4)
    assert predicted(curves, make_row(0.6, 1.0, MIX, 5, ())) == 0.0  # more than all would have to enter


def test_the_curves_see_where_the_checkpoint_stops_reading() -> None:
    for row in propose(curves_of(document()), 0.1, 5):
        assert row.late_layer in (9, 10, 11)
        assert all(drop.after_layer > 5 for drop in row.drops)
        assert row.video > row.audio


def test_keeping_half_of_few_is_keeping_very_few() -> None:
    curves = curves_of(document())
    drops = (CalibratedDrop(7, 0.5, 0.5),)
    few, many = (predicted(curves, make_row(ratio, 1.0, MIX, 9, drops)) for ratio in (0.02, 0.4))
    without = [predicted(curves, make_row(ratio, 1.0, MIX, 9, ())) for ratio in (0.02, 0.4)]
    assert few < 0.8 * without[0]
    assert many > 0.99 * without[1] * 0.99


def truth(row: CalibratedRow) -> float:
    """What the invented checkpoint really does: best at late 8, one drop after 6, twice as much video."""
    late = row.late_layer or N_LAYERS + 1
    relation = row.audio / row.video
    drop = 0.03 if [d.after_layer for d in row.drops] == [6] else 0.0
    return 0.9 - 0.02 * abs(late - 8) - 0.05 * abs(np.log2(relation / 0.5)) + drop


def test_the_climb_reaches_what_the_curves_do_not_know() -> None:
    seen: list[Trial] = []
    calls: list[int] = []

    def measure(rows: Sequence[CalibratedRow]) -> list[float]:
        calls.append(len(rows))
        return [truth(row) for row in rows]

    best, trials = climb(curves_of(document()), 0.1, measure, first=4, rounds=8, tell=seen.append)
    assert (best.late_layer, [drop.after_layer for drop in best.drops]) == (8, [6])
    assert 0.35 < best.audio / best.video < 0.75
    assert seen == trials
    assert len(trials) == len({trial.row for trial in trials}) == sum(calls)
    assert max(trial.measured for trial in trials) == truth(best)
    for row in (trial.row for trial in trials):
        assert max(entries(row, N_LAYERS)) <= 1 + 1e-9


def test_no_rounds_means_the_best_of_the_first() -> None:
    known = make_row(0.05, 0.5, MIX, 8, ())
    best, trials = climb(
        curves_of(document()),
        0.1,
        lambda rows: [truth(row) for row in rows],
        first=3,
        rounds=0,
        known=[known],
    )
    assert len(trials) <= 4
    carried = make_row(0.1, known.audio / known.video, MIX, 8, ())
    assert carried in [trial.row for trial in trials]
    assert truth(best) == max(trial.measured for trial in trials) >= truth(carried)


def test_neighbours_are_plans_that_can_be_met() -> None:
    curves = curves_of(document())
    for late in (2, 3, 9, 14, None):
        row = make_row(0.05, 1.0, MIX, late, ())
        found = neighbours(curves, row)
        assert row not in found or late is None
        for one in found:
            assert max(entries(one, N_LAYERS)) <= 1
            assert one.ratio == 0.05


@pytest.mark.parametrize("absent", ["removal", "choice", "entry"])
def test_a_trace_without_a_curve_says_which(absent: str) -> None:
    with pytest.raises(UsageError, match=f"no {absent}"):
        curves_of(document(**{absent: []}))


def test_a_trace_of_one_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="video and audio"):
        curves_of(document(counts={"video": 100.0, "audio": 0.0}))


def test_a_noisy_curve_is_smoothed() -> None:
    trace = document()
    for row in trace["removal"]:
        if row["kind"] == "both" and row["layer"] == 3:
            row["probability"] = 0.9  # one lucky point
    assert isinstance(curves_of(trace), Curves)
    assert np.all(np.diff(curves_of(trace).removal["both"]) >= 0)
    assert propose(curves_of(trace), 0.1, 1)[0].late_layer != 3


def test_nothing_is_measured_beside_a_plan_that_is_always_right() -> None:
    best, trials = climb(curves_of(document()), 0.3, lambda rows: [1.0] * len(rows), first=4, rounds=5)
    assert len(trials) == 4
    assert best == trials[0].row


def test_curves_of_other_questions_are_refused() -> None:
    trace = document()
    trace["removal"][0]["n"] = 30
    with pytest.raises(UsageError, match="30 of its 40"):
        curves_of(trace)
