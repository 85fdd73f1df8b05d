"""Calibrated rows: the ratio asked is met on every mix of kinds, and tokens leave where the row says."""

from dataclasses import replace

import pytest

from runs import media_of, run
from seats_cli.errors import PlanError
from seats_cli.presets import CalibratedDrop, CalibratedRow, Preset, load_preset
from seats_cli.selection.calibrated import nearest_row
from seats_cli.selection.methods import METHODS
from seats_cli.selection.options import SelectionOptions, configure
from seats_cli.selection.plan import ClipCounts, Plan

ROWS = (
    CalibratedRow(0.05, 0.04, 0.08, 13, ()),
    CalibratedRow(0.10, 0.09, 0.13, 15, (CalibratedDrop(9, 0.5, 1.0),)),
    CalibratedRow(0.40, 0.35, 0.60, None, (CalibratedDrop(14, 0.5, 0.0),)),
)
CLIP = ClipCounts(n_video=9216, n_audio=1600, tokens_per_grid=144, n_windows=32)


def preset() -> Preset:
    return replace(load_preset("qwen2.5-omni-7b"), calibrated=ROWS)


def plan(ratio: float, counts: ClipCounts = CLIP, method: str = "seats", **options: object) -> Plan:
    return METHODS[method].plan(preset(), ratio, counts, SelectionOptions(**options))


def mean_per_layer(plan: Plan) -> float:
    """The definition: tokens that each layer processes, layer by layer, over all of them."""
    total = 0
    for layer in range(1, plan.n_layers + 1):
        passed = [stage for stage in plan.stages if stage.after_layer < layer]
        total += passed[-1].n_video + passed[-1].n_audio
    return total / (plan.n_layers * (plan.n_video + plan.n_audio))


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.08, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize(
    ("n_video", "n_audio"), [(9216, 1600), (2048, 2000), (9216, 0), (0, 1600), (1440, 77), (288, 3000)]
)
def test_the_ratio_is_met(ratio: float, n_video: int, n_audio: int) -> None:
    counts = ClipCounts(n_video, n_audio, 144 if n_video else 0, 16)
    found = plan(ratio, counts)
    assert found.expected_retention == pytest.approx(mean_per_layer(found), abs=1e-12)
    assert found.expected_retention == pytest.approx(ratio, rel=0.01, abs=1.5 / (n_video + n_audio))


def test_tokens_leave_where_the_nearest_row_says() -> None:
    tenth = plan(0.11)
    assert (tenth.late_layer, [drop.after_layer for drop in tenth.drops]) == (15, [9])
    entering, after = tenth.stages[:2]
    assert after.n_video == pytest.approx(entering.n_video / 2, abs=1)
    assert after.n_audio == entering.n_audio
    assert (plan(0.06).late_layer, plan(0.06).drops) == (13, ())
    assert plan(0.35).late_layer is None
    assert plan(0.35).stages[1].n_audio == 0


@pytest.mark.parametrize("budgets", ["exact", "published"])
@pytest.mark.parametrize("gone", ["video", "audio"])
def test_a_drop_to_nothing_takes_a_kind_away_as_planned(gone: str, budgets: str) -> None:
    drop = CalibratedDrop(9, 0.0, 0.7) if gone == "video" else CalibratedDrop(9, 0.7, 0.0)
    rows = (CalibratedRow(0.10, 0.10, 0.10, 15, (drop, CalibratedDrop(11, 0.5, 0.5))),)
    method, options = METHODS["seats"], SelectionOptions(budgets=budgets)  # type: ignore[arg-type]
    made = method.plan(replace(preset(), calibrated=rows), 0.10, CLIP, options)
    done = run(method, made, CLIP, media_of(CLIP, made))
    expected = [stage for stage in made.stages if stage.after_layer in (9, 11)]
    assert [done.layers[9][1:], done.layers[11][1:]] == [(one.n_video, one.n_audio) for one in expected]
    assert all(getattr(stage, f"n_{gone}") == 0 for stage in expected)
    assert all(stage.n_video + stage.n_audio > 0 for stage in expected)
    assert done.retention(CLIP) == pytest.approx(made.expected_retention, rel=1e-12)


def test_a_row_s_own_split_is_kept_on_the_mix_it_was_made_for() -> None:
    row = ROWS[1]
    mix = (row.ratio - row.video) / (row.audio - row.ratio)  # audio tokens to one of video
    found = plan(row.ratio, ClipCounts(9216, round(9216 * mix), 144, 32))
    assert found.retention_video == pytest.approx(row.video, rel=1e-3)
    assert found.retention_audio == pytest.approx(row.audio, rel=1e-3)


def test_where_the_row_cannot_reach_its_drops_go_first_then_the_late_layer() -> None:
    without_drops = plan(
        0.199
    )  # nearest is the row at 0.10; with its drop 0.33 video is the most, all audio .5
    assert without_drops.drops
    rows = (replace(ROWS[1], drops=(CalibratedDrop(2, 0.1, 0.1),)),)
    narrow = METHODS["seats"].plan(replace(preset(), calibrated=rows), 0.45, CLIP, SelectionOptions())
    assert (narrow.drops, narrow.late_layer) == ((), 15)
    assert any("its drops end" in note for note in narrow.notes)
    moved = METHODS["seats"].plan(replace(preset(), calibrated=rows), 0.75, CLIP, SelectionOptions())
    assert (moved.drops, moved.late_layer) == ((), 22)


def test_too_small_a_ratio_names_the_smallest() -> None:
    with pytest.raises(PlanError, match="the smallest this clip allows is") as caught:
        plan(0.0001)
    smallest = float(caught.value.hint.split("--ratio ")[1].split(" ")[0])
    assert plan(smallest).expected_retention <= smallest * 1.01
    with pytest.raises(PlanError):
        plan(smallest * 0.8)


def test_baselines_share_the_split() -> None:
    seats, fixed = plan(0.1), plan(0.1, method="fixed")
    assert fixed.retention_audio / fixed.retention_video == pytest.approx(
        seats.retention_audio / seats.retention_video
    )
    paper = plan(0.1, method="fixed", schedule="paper")
    assert paper.retention_audio / paper.retention_video == pytest.approx(0.35 / 0.06)


def test_paper_ignores_the_rows() -> None:
    assert [drop.after_layer for drop in plan(0.1, schedule="paper").drops] == [16, 18, 20]


def test_nearest_is_logarithmic() -> None:
    assert nearest_row(ROWS, 0.19).ratio == 0.10  # the mean of .1 and .4 is .2 on that scale
    assert nearest_row(ROWS, 0.21).ratio == 0.40


def test_calibrated_without_rows_says_how_to_get_them() -> None:
    with pytest.raises(PlanError, match="no calibrated schedule") as caught:
        configure(None, {"schedule": "calibrated"}, model_type="qwen2_5_omni", n_layers=36, hidden_size=2048)
    assert "seats calibrate" in (caught.value.hint or "")
