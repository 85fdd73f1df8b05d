"""The decay schedule: the mean it promises, and its corners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seats_cli.selection.schedule import (
    decay_weights,
    effective_drops,
    keep_ratios,
    levels,
    mean_level,
    segment_lengths,
    solve_decay,
)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[int], int | None]:
    n_layers = draw(st.integers(2, 60))
    drops = sorted(draw(st.sets(st.integers(1, n_layers - 1), max_size=5)))
    late = draw(st.none() | st.integers(2, n_layers))
    return n_layers, drops, late


@given(schedules(), st.floats(0.001, 1), st.floats(0.001, 1))
def test_the_mean_is_met_or_out_of_reach(
    schedule: tuple[int, list[int], int | None], retention: float, entry: float
) -> None:
    decay = solve_decay(retention, entry, *schedule)
    reached = mean_level(entry, decay, *schedule)
    least, most = mean_level(entry, 1.0, *schedule), mean_level(entry, 0.0, *schedule)
    assert reached == pytest.approx(min(max(retention, least), most), abs=1e-9)


@given(schedules())
def test_segments_cover_the_layers_that_see_media(schedule: tuple[int, list[int], int | None]) -> None:
    n_layers, drops, late = schedule
    lengths = segment_lengths(n_layers, effective_drops(drops, late), late)
    assert sum(lengths) == (n_layers if late is None else late - 1)
    assert min(lengths) >= 0


def test_later_drops_take_more() -> None:
    weights = decay_weights(3)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(2.718281828)
    assert weights[2] / weights[1] == pytest.approx(2.718281828)


def test_levels_never_fall_below_zero() -> None:
    assert levels(0.3, 1.0, 4)[-1] == pytest.approx(0, abs=1e-12)
    assert min(levels(0.3, 1.0, 4)) >= 0


def test_the_published_shape_at_every_published_ratio() -> None:
    for retention in (0.30, 0.20, 0.10, 0.06):
        assert keep_ratios(retention, 1.4 * retention, 28, (16, 18, 20), 24) == (0.9298, 0.7949, 0.2986)


def test_drops_that_come_too_late_do_not_count() -> None:
    some = keep_ratios(0.1, 0.14, 28, (16, 18, 23, 24, 27), 24)  # all is cut after layer 23 anyway
    assert some == keep_ratios(0.1, 0.14, 28, (16, 18), 24)
    assert keep_ratios(0.1, 0.14, 28, (23,), 24) == ()


def test_out_of_reach_keeps_all_or_drops_all() -> None:
    assert keep_ratios(0.1, 0.1, 28, (16, 18, 20), 24) == (1.0, 1.0, 1.0)
    assert keep_ratios(0.05, 0.15, 28, (10, 12, 14, 16), 20)[-1] == 0.0


def test_nothing_entering_is_no_division_by_zero() -> None:
    assert keep_ratios(0.0, 0.0, 28, (16, 18), 24) == (0.0, 0.0)
