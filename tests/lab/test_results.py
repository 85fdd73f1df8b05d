"""Rows from records: the statistic, its intervals against a slow reference, and pairs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seats_cli.lab.records import Record
from seats_cli.lab.results import RESAMPLES, as_csv, base_of, draws, summarise
from seats_cli.lab.settings import Setting, expand

FULL, SEATS, FIXED = Setting("full", 1.0), Setting("seats", 0.1), Setting("fixed", 0.1)
FAMILIES = ("text", "sound", "motion")


def record(clip: int, family: str, correct: bool | None, **changes: Any) -> Record:
    """One line, with round numbers."""
    values = {
        "id": f"{clip}-{family}",
        "clip": f"clip {clip}",
        "family": family,
        "correct": correct,
        "wer": None,
        "retention": 0.1,
        "compute_ratio": 0.08,
        "prefill_s": 0.03,
        "generate_s": 0.01,
        "error": None if correct is not None else {"kind": "media", "message": "broken", "hint": None},
    }
    return values | changes


def world(rng: np.random.Generator, n_clips: int, p: float) -> list[Record]:
    """One to three questions a clip, right with a chance that clips share."""
    found = []
    for clip in range(n_clips):
        chance = np.clip(p + rng.normal(0, 0.2), 0, 1)
        for family in FAMILIES[: rng.integers(1, 4)]:
            found.append(record(clip, family, bool(rng.random() < chance)))
    return found


def plainly(records: Sequence[Record]) -> float:
    """The mean over families of their share right."""
    by_family: dict[str, list[bool]] = {}
    for one in records:
        by_family.setdefault(one["family"], []).append(one["correct"])
    return sum(sum(right) / len(right) for right in by_family.values()) / len(by_family)


def test_accuracy_is_the_mean_over_families_not_over_questions() -> None:
    records = [record(clip, "text", True) for clip in range(9)] + [record(0, "sound", False)]
    (row,) = summarise({FULL: records})
    assert row.accuracy == 0.5
    assert row.families == {"text": 1.0, "sound": 0.0}
    assert row.overall == 0.9
    assert (row.n, row.clips) == (10, 9)


def test_intervals_are_those_of_a_slow_bootstrap() -> None:
    """The same draws, each made into a list of records."""
    rng = np.random.default_rng(1)
    full, mine = world(rng, 12, 0.9), world(rng, 12, 0.6)
    mine = [one for one in mine if one["id"] in {other["id"] for other in full}]
    rows = summarise({FULL: full, SEATS: mine}, against="full")
    clips = list(dict.fromkeys(one["clip"] for one in [*full, *mine]))
    shared = [one for one in full if one["id"] in {other["id"] for other in mine}]
    accuracy, share, points = [], [], []
    for block in draws(len(clips)):
        for counts in block.astype(int):
            names = [name for name, count in zip(clips, counts, strict=True) for _ in range(count)]
            drawn = [one for name in names for one in mine if one["clip"] == name]
            beside = [one for name in names for one in shared if one["clip"] == name]
            accuracy.append(plainly(drawn))
            share.append(plainly(drawn) / plainly(beside))
            points.append(100 * (plainly(drawn) - plainly(beside)))
    assert len(accuracy) == RESAMPLES
    row = rows[1]
    assert row.accuracy == pytest.approx(plainly(mine))
    assert (row.low, row.high) == pytest.approx(tuple(np.percentile(accuracy, [2.5, 97.5])))
    assert row.of_full == pytest.approx(plainly(mine) / plainly(shared))
    assert (row.of_full_low, row.of_full_high) == pytest.approx(tuple(np.percentile(share, [2.5, 97.5])))
    assert row.against is not None
    assert row.against.points == pytest.approx(100 * (plainly(mine) - plainly(shared)))
    assert (row.against.low, row.against.high) == pytest.approx(tuple(np.percentile(points, [2.5, 97.5])))


def test_a_draw_is_of_as_many_clips_as_there_are() -> None:
    blocks = np.concatenate(list(draws(7)))
    assert blocks.shape == (RESAMPLES, 7)
    assert (blocks.sum(axis=1) == 7).all()
    assert blocks.mean() == pytest.approx(1.0)
    assert blocks.std(axis=0).min() > 0.8  # of a count with mean 1: about 0.93
    assert np.array_equal(blocks, np.concatenate(list(draws(7))))


def test_intervals_hold_what_they_should_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    truth = plainly(world(rng, 6000, 0.7))
    held = 0
    for _ in range(60):
        (row,) = summarise({FULL: world(rng, 40, 0.7)})
        assert row.low is not None
        assert row.high is not None
        held += row.low <= truth <= row.high
    assert held >= 52  # of 60; 57 are expected


def test_pairs_cancel_what_clips_share() -> None:
    """Two methods that differ on one question of 40 clips, half of which are hopeless."""
    base = [record(clip, "text", clip % 2 == 0) for clip in range(40)]
    mine = [record(clip, "text", clip % 2 == 0 and clip != 6) for clip in range(40)]
    _, row = summarise({FULL: base, SEATS: mine})
    assert row.high - row.low > 0.25
    assert row.of_full_high - row.of_full_low < 0.2
    assert row.against.high - row.against.low < 10
    same = summarise({FULL: base, SEATS: base})[1]
    assert (same.of_full, same.of_full_low, same.of_full_high) == (1.0, 1.0, 1.0)
    assert (same.against.points, same.against.low, same.against.high) == (0.0, 0.0, 0.0)


def test_pairs_are_of_samples_that_both_answered() -> None:
    full = [record(0, "text", True), record(1, "text", False), record(2, "text", True)]
    mine = [record(0, "text", True), record(1, "text", None), record(2, "text", False)]
    row = summarise({FULL: full, SEATS: mine})[1]
    assert row.accuracy == 0.5
    assert row.of_full == 0.5  # full is right on both of the two
    assert row.against.points == -50.0
    assert (row.n, row.failed) == (2, 1)
    full[0] = record(0, "text", None)
    row = summarise({FULL: full, SEATS: mine})[1]
    assert (row.accuracy, row.of_full, row.against.points) == (0.5, 0.0, -100.0)


def test_one_clip_has_no_interval_and_no_answer_no_number() -> None:
    (row,) = summarise({FULL: [record(0, "text", True), record(0, "sound", False)]})
    assert (row.accuracy, row.low, row.high) == (0.5, None, None)
    full, row = summarise({FULL: [record(0, "text", None)], SEATS: []})
    assert (full.accuracy, full.of_full, full.n, full.failed, full.retention) == (None, None, 0, 1, None)
    assert (row.accuracy, row.n, row.failed) == (None, 0, 0)


def test_full_that_is_never_right_has_no_share_left() -> None:
    wrong = [record(clip, "text", False) for clip in range(3)]
    row = summarise({FULL: wrong, SEATS: [record(clip, "text", True) for clip in range(3)]})[1]
    assert (row.accuracy, row.of_full, row.of_full_low) == (1.0, None, None)
    assert row.against.points == 100.0


def test_what_has_no_plan_is_told_and_is_no_failure() -> None:
    none = {"kind": "plan", "message": "ratio 0.05 is too small", "hint": None}
    records = [record(0, "text", None, error=none), record(1, "text", None, error=none)]
    row = summarise({FULL: [record(0, "text", True)], SEATS: records})[1]
    assert (row.error, row.unplanned, row.failed, row.accuracy) == (none["message"], 2, 0, None)
    row = summarise({FULL: [record(0, "text", True)], SEATS: [*records[:1], record(1, "text", True)]})[1]
    assert (row.error, row.unplanned, row.accuracy, row.n) == (none["message"], 1, 1.0, 1)


def test_means_leave_out_what_does_not_apply() -> None:
    records = [record(0, "transcription", True, wer=0.0), record(1, "transcription", False, wer=0.5)]
    records += [record(1, "text", True, retention=0.2, generate_s=0.05)]
    (row,) = summarise({FULL: records})
    assert row.wer == 0.25
    assert row.retention == pytest.approx(0.4 / 3)
    assert row.seconds == pytest.approx((0.04 + 0.04 + 0.08) / 3)


VARIANTS = [Setting("seats", 0.1, None, (("merge", value),)) for value in ("off", "on")]
OTHERS = [Setting("fixed", 0.1, None, (("merge", value),)) for value in ("off", "on")]


@pytest.mark.parametrize(
    ("setting", "against", "base"),
    [
        (SEATS, "full", FULL),
        (FULL, "full", None),
        (SEATS, "fixed", FIXED),
        (FULL, "fixed", None),
        (Setting("seats", 0.35), "fixed", None),  # not run at that ratio
        (VARIANTS[1], "seats", VARIANTS[0]),
        (VARIANTS[0], "seats", None),
        (OTHERS[1], "seats", VARIANTS[1]),
        (Setting("random", 0.1), "seats", None),  # which of the two?
        (Setting("random", 0.1), "fixed", FIXED),  # the one that was told as little
    ],
)
def test_what_a_row_is_compared_with(setting: Setting, against: str, base: Setting | None) -> None:
    settings = [FULL, FIXED, *VARIANTS, *OTHERS, Setting("random", 0.1)]
    assert base_of(setting, settings, against) == base


VARIED: list[tuple[dict[str, list[str]], dict[str, str], dict[str, str] | None]] = [
    ({"merge": ["off", "on"], "tau": ["0.1", "0.3"]}, {"merge": "on", "tau": "0.3"}, {"merge": "on"}),
    ({"schedule": ["auto", "paper"]}, {"schedule": "paper"}, {"schedule": "paper"}),
    ({"decode_cache": ["text", "layerwise"]}, {"decode_cache": "layerwise"}, {}),
    (
        {"entry_scale": ["1.4", "1.8"], "merge": ["off", "on"]},
        {"entry_scale": "1.8", "merge": "on"},
        {"merge": "on", "schedule": "paper"},
    ),
    (
        {"preset": ["default", "paper"], "tau": ["0.3"]},
        {"preset": "paper", "tau": "0.3"},
        {"preset": "paper"},
    ),
]


@pytest.mark.parametrize(("vary", "mine", "base"), VARIED)
def test_variants_meet_though_one_method_reads_fewer_settings(
    vary: dict[str, list[str]], mine: dict[str, str], base: dict[str, str]
) -> None:
    settings = expand(["seats", "fixed"], [0.1, 0.2], vary=vary)
    (setting,) = (
        s
        for s in settings
        if s.ratio == 0.1
        and all(s.value(key) == value for key, value in mine.items())
        and s.method == "seats"
    )
    rows = summarise({s: [record(0, "text", True)] for s in settings}, against="fixed")
    against = next(row.against for row in rows if row.setting == setting)
    assert against is not None
    assert (against.method, against.settings) == ("fixed", base)
    found = base_of(setting, settings, "fixed")
    assert found is not None
    assert found.ratio == 0.1


def test_of_several_variants_that_a_row_says_nothing_of_none_is_its_base(tmp_path: Path) -> None:
    settings = expand(["seats", "fixed"], [0.1], vary={"merge": ["off", "on"], "tau": ["0.1", "0.3"]})
    fixed = [s for s in settings if s.method == "fixed"]
    assert [base_of(s, settings, "seats") for s in fixed] == [None, None]
    gone = Setting("fixed", 0.1, str(tmp_path / "gone.yaml"))
    assert base_of(gone, [*settings, gone], "seats") is None


def test_csv_has_a_line_a_row_and_a_column_a_family() -> None:
    rows = summarise(
        {
            FULL: [record(clip, "text", True) for clip in range(2)],
            VARIANTS[1]: [record(0, "sound", True), record(1, "text", False)],
        }
    )
    full, seats = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (full["method"], full["accuracy"], full["family:text"], full["family:sound"]) == (
        "full",
        "1.0",
        "1.0",
        "",
    )
    assert (seats["settings"], seats["family:text"], seats["against_method"]) == ("merge=on", "0.0", "full")
    assert seats["against_settings"] == ""
    assert None not in full
    assert list(full) == list(seats)
