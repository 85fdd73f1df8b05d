"""Plans: what is promised is what whole tokens give; what cannot be promised is an error that says why."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips import DEFAULT, OMNI_7B, PAPER, clip, scheduled, with_layers
from seats_cli.errors import PlanError
from seats_cli.measure.compute import layer_counts, mean_retention
from seats_cli.presets import preset_by_rule
from seats_cli.selection.methods import METHODS, Seats
from seats_cli.selection.plan import ClipCounts, Plan

SEATS = Seats()


def plan_of(ratio: float, counts: ClipCounts | None = None, **changes: object) -> Plan:
    return SEATS.plan(OMNI_7B, ratio, counts or clip(), replace(DEFAULT, **changes))  # type: ignore[arg-type]


def test_the_published_plan() -> None:
    counts = ClipCounts(n_video=62_500, n_audio=10_000, tokens_per_grid=125, n_windows=250)
    counts = replace(counts, n_audio=10_000)
    plan = SEATS.plan(OMNI_7B, 0.10, counts, PAPER)
    assert plan.retention_video == pytest.approx(0.06, rel=0.01)
    assert plan.entry_video == pytest.approx(1.4 * plan.retention_video)
    assert [drop.after_layer for drop in plan.drops] == [16, 18, 20]
    assert [drop.keep_video for drop in plan.drops] == [0.9298, 0.7949, 0.2986]
    assert plan.late_layer == 24
    assert plan.cut_layers == (16, 18, 20, 23)
    assert plan.score_layers == (16, 18, 20)
    names = [stage.name for stage in plan.stages]
    assert names == ["stage I", "after layer 16", "after layer 18", "after layer 20", "late"]
    assert (plan.stages[-1].n_video, plan.stages[-1].n_audio) == (0, 0)


@settings(max_examples=80)
@given(
    st.floats(0.03, 1),
    st.integers(0, 80),
    st.integers(0, 2000),
    st.sampled_from([64, 144]),
    st.sampled_from(["seats", "fixed", "random"]),
)
def test_the_ratio_is_met_in_whole_tokens(
    ratio: float, n_grids: int, n_audio: int, tokens_per_grid: int, method: str
) -> None:
    counts = clip(n_grids, n_audio, tokens_per_grid)
    before = (counts.n_video, counts.n_audio)
    try:
        plan = METHODS[method].plan(OMNI_7B, ratio, counts, DEFAULT)
    except PlanError as error:
        assert "smallest" in error.message  # noqa: PT017 - only floors may stand in the way
        return
    counted = mean_retention(layer_counts(plan.stages, plan.n_layers, before), before)
    assert plan.expected_retention == pytest.approx(counted)
    # a token or so a window, kind and drop is lost to rounding
    slack = 0.01 + 3 * counts.n_windows / max(1, sum(before))
    if sum(before):
        assert plan.expected_retention == pytest.approx(ratio, abs=slack * 0.5)


@pytest.mark.parametrize("ratio", [0.35, 0.25, 0.15, 0.10, 0.05])
@pytest.mark.parametrize("method", ["seats", "fixed", "random"])
def test_all_methods_spend_the_same(ratio: float, method: str) -> None:
    plan = METHODS[method].plan(OMNI_7B, ratio, clip(), DEFAULT)
    assert plan.expected_retention == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_one_is_every_token_in_every_layer(method: str) -> None:
    plan = METHODS[method].plan(OMNI_7B, 1.0, clip(), DEFAULT)
    assert plan.keeps_all
    assert plan.cut_layers == plan.score_layers == ()
    assert plan.expected_retention == 1.0
    assert not plan.needs_saliency


@pytest.mark.parametrize("options", [DEFAULT, PAPER], ids=["default", "paper"])
def test_retention_grows_smoothly_up_to_everything(options: object) -> None:
    ratios = [0.02 + 0.98 * step / 100 for step in range(101)]
    plans = [SEATS.plan(OMNI_7B, ratio, clip(), options) for ratio in ratios]  # type: ignore[arg-type]
    reached = [plan.expected_retention for plan in plans]
    assert reached[-1] == 1.0
    for ratio, value in zip(ratios, reached, strict=True):
        assert value == pytest.approx(ratio, abs=0.01)
    for before, after in pairwise(plans):
        assert after.retention_video - before.retention_video == pytest.approx(0, abs=0.06)
        assert after.retention_audio - before.retention_audio == pytest.approx(0, abs=0.06)


def test_a_large_ratio_moves_the_late_layer_and_says_so() -> None:
    plan = plan_of(0.9)
    assert plan.late_layer == 27
    assert "late layer 24 moved to 27" in plan.notes[0]
    assert plan_of(0.8).notes == ()
    assert plan_of(0.99).late_layer is None


def test_without_a_late_layer_tokens_stay_to_the_end() -> None:
    preset = with_layers(36, replace(OMNI_7B.schedule, drop_layers=(18, 22), late_layer=None))
    plan = SEATS.plan(preset, 0.3, clip(), DEFAULT)
    assert plan.cut_layers == (18, 22)
    assert plan.stages[-1].n_video > 0
    assert plan.expected_retention == pytest.approx(0.3, rel=0.01)


def test_too_small_a_ratio_names_the_smallest() -> None:
    with pytest.raises(PlanError, match=r"ratio 0\.001 is too small") as caught:
        plan_of(0.001)
    smallest = float(re.findall(r"allows is ([\d.e-]+)", caught.value.message)[0])
    plan_of(smallest)  # what the message says works
    with pytest.raises(PlanError):
        plan_of(0.9 * smallest)


@pytest.mark.parametrize(("entry_scale", "word"), [(1.0, "too few"), (3.0, "too many")])
def test_an_entry_scale_that_cannot_work_names_one_that_does(entry_scale: float, word: str) -> None:
    with pytest.raises(PlanError, match=word) as caught:
        plan_of(0.3, entry_scale=entry_scale)
    plan_of(0.3, entry_scale=float(re.findall(r"entry_scale=([\d.]+)", caught.value.hint or "")[0]))
    published = plan_of(0.3, entry_scale=entry_scale, budgets="published")  # as published: no error
    assert published.entry_video == pytest.approx(entry_scale * published.retention_video)
    # it drops nothing, or all that it may, and misses the ratio
    assert (
        (published.expected_retention < 0.27) if word == "too few" else (published.expected_retention > 0.33)
    )


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    for method in METHODS.values():
        with pytest.raises(PlanError, match="out of range"):
            method.plan(OMNI_7B, ratio, clip(), DEFAULT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_layers": (18, 16)}, "out of order"),
        ({"drop_layers": (16, 16)}, "out of order"),
        ({"drop_layers": (16, 28)}, "do not fit a network of 28"),
        ({"drop_layers": (0, 16)}, "do not fit"),
        ({"late_layer": 29}, "late_layer 29 does not fit"),
        ({"late_layer": 1}, "late_layer 1"),
    ],
)
def test_impossible_schedules(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SEATS.plan(scheduled(**changes), 0.1, clip(), DEFAULT)


@pytest.mark.parametrize("counts", [clip(n_audio=0), clip(n_grids=0), clip(n_grids=1, n_audio=30)])
def test_clips_with_one_kind_or_one_window(counts: ClipCounts) -> None:
    plan = SEATS.plan(OMNI_7B, 0.2, counts, DEFAULT)
    assert plan.expected_retention == pytest.approx(0.2, abs=0.01)
    for kind in ("video", "audio"):
        assert plan.entry(kind) > 0 if plan.count(kind) else plan.entry(kind) == 0


def test_a_clip_without_either_keeps_all() -> None:
    assert plan_of(0.1, ClipCounts(0, 0, 0, 0, n_text=400)).keeps_all


@pytest.mark.parametrize("n_layers", range(1, 20))
def test_schedules_by_rule_work_at_any_depth(n_layers: int) -> None:
    preset = preset_by_rule("qwen2_5_omni", n_layers, 64)
    for ratio in (0.1, 0.3, 0.7, 0.95):
        options = replace(DEFAULT, entry_scale=preset.schedule.entry_scale)
        plan = SEATS.plan(preset, ratio, clip(), options)
        assert plan.expected_retention == pytest.approx(ratio, abs=0.01)


def test_windows_of_a_stream() -> None:
    plan = plan_of(0.1, clip(n_grids=5, n_audio=130))
    first, rest = plan.keeps_in("video", 0, 288), plan.keeps_in("video", 288, 432)
    assert first + rest == plan.keeps_in("video", 0, 720)
    assert [size for size, _ in plan.keeps_in("video", 0, 720)] == [288, 288, 144]
    assert [size for size, _ in plan.keeps_in("audio", 0, 130)] == [50, 50, 30]
    for start, n_tokens in ((100, 288), (0, 100), (576, 288)):
        with pytest.raises(ValueError, match="not whole windows"):
            plan.keeps_in("video", start, n_tokens)


@given(st.floats(0.02, 1), st.integers(1, 60), st.integers(1, 900))
def test_spread_keeps_do_not_depend_on_the_stream(ratio: float, n_grids: int, cut: int) -> None:
    plan = METHODS["fixed"].plan(OMNI_7B, ratio, clip(n_grids, 50), DEFAULT)
    n_video, window = plan.n_video, plan.video_window
    at = cut % -(-n_video // window) * window
    whole = plan.keeps_in("video", 0, n_video)
    assert plan.keeps_in("video", 0, at) + plan.keeps_in("video", at, n_video - at) == whole
    assert all(1 <= keep <= size for size, keep in whole)
    if not plan.keeps_all:
        assert sum(keep for _, keep in whole) == plan.stages[0].n_video


@given(st.floats(0.001, 1), st.integers(0, 120), st.integers(0, 900), st.sampled_from([1, 4, 16, 144]))
def test_spread_keeps_sum_to_the_plan(ratio: float, n_grids: int, n_audio: int, tokens_per_grid: int) -> None:
    try:
        plan = METHODS["fixed"].plan(OMNI_7B, ratio, clip(n_grids, n_audio, tokens_per_grid), DEFAULT)
    except PlanError:  # below one token a window
        return
    for kind in ("video", "audio"):
        keeps = plan.keeps_in(kind, 0, plan.count(kind))
        assert all(1 <= keep <= size for size, keep in keeps)
        if not plan.keeps_all:
            planned = plan.stages[0].n_video if kind == "video" else plan.stages[0].n_audio
            assert sum(keep for _, keep in keeps) == planned


def test_a_short_last_window_costs_no_token_more() -> None:
    plan = METHODS["fixed"].plan(OMNI_7B, 0.05, clip(n_grids=1, n_audio=51, tokens_per_grid=16), DEFAULT)
    kept = sum(keep for kind in ("video", "audio") for _, keep in plan.keeps_in(kind, 0, plan.count(kind)))
    assert kept / (16 + 51) == pytest.approx(plan.expected_retention)
