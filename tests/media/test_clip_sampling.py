"""Which frames are read: the published rule, ranges, and variable rate."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seats_cli.errors import MediaRange, SeatsError, UsageError
from seats_cli.media.sampling import (
    Sampling,
    frame_indices,
    frame_indices_by_time,
    frame_range,
    is_variable_rate,
    parse_time,
)

GOLDEN = Path(os.environ.get("SEATS_GOLDEN") or Path(__file__).parents[1] / "golden") / "inputs.json"
CASES = json.loads(GOLDEN.read_text())["sampling"] if GOLDEN.exists() else []


def test_golden_cases_are_there():
    assert CASES, f"no sampling cases in {GOLDEN}"


def sampled(case):
    options = {name: case[name] for name in ("fps", "min_frames", "max_frames") if name in case}
    sampling = Sampling(start_s=case.get("video_start"), end_s=case.get("video_end"), **options)
    first, count = frame_range(case["total_frames"], case["native_fps"], sampling)
    return frame_indices(count, case["native_fps"], sampling, first)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['total_frames']}@{case['native_fps']}")
def test_golden_indices(case):
    if case.get("error"):
        with pytest.raises(SeatsError):
            sampled(case)
        return
    indices, sample_fps = sampled(case)
    assert indices.tolist() == case["indices"]
    assert sample_fps == pytest.approx(case["sample_fps"], rel=1e-12)


@given(total=st.integers(4, 400_000), first=st.integers(0, 200_000), pairs=st.integers(1, 384))
def test_indices_are_torchs_linspace_to_the_bit(total, first, pairs):
    """The official pipeline rounds a float32 torch.linspace; long clips show any other arithmetic."""
    count = 2 * min(pairs, total // 2)
    sampling = Sampling(fps=1.0, min_frames=count, max_frames=count)
    indices, _ = frame_indices(total, 30.0, sampling, first)
    assert indices.tolist() == torch.linspace(first, first + total - 1, count).round().long().tolist()


@given(
    total=st.integers(2, 500_000),
    native_fps=st.floats(1, 240),
    fps=st.floats(0.01, 60),
    bounds=st.tuples(st.integers(2, 900), st.integers(2, 900)),
)
def test_counts_are_even_within_bounds_and_reach_both_ends(total, native_fps, fps, bounds):
    sampling = Sampling(fps=fps, min_frames=min(bounds), max_frames=max(bounds))
    indices, sample_fps = frame_indices(total, native_fps, sampling)
    assert len(indices) % 2 == 0
    assert 2 <= len(indices) <= min(total, max(bounds))
    assert len(indices) >= min(min(bounds), max(bounds) // 2 * 2, total // 2 * 2)
    assert indices[0] == 0
    assert indices[-1] == total - 1
    assert (np.diff(indices) > 0).all()
    assert sample_fps == pytest.approx(len(indices) * native_fps / total)


@given(st.lists(st.floats(0.001, 5), min_size=3, max_size=60))
def test_by_time_never_shows_a_frame_before_its_time(gaps):
    times = np.cumsum([0.0, *gaps])
    duration = times[-1] + np.mean(gaps)
    indices, sample_fps = frame_indices_by_time(times, duration, Sampling())
    assert (np.diff(indices) >= 0).all()
    assert len(indices) == pytest.approx(sample_fps * duration)
    # half a usual interval early at most, and never while a later frame is already on screen
    last = max(times[-1], duration * (1 - 1 / len(times)))
    targets = np.linspace(0, last, len(indices))
    slack = np.median(gaps) / 2 + 1e-9
    assert (times[indices] <= targets + slack).all()
    following = np.append(times, np.inf)[indices + 1]
    assert (following >= targets + slack - 2e-9).all()


def test_by_time_equals_by_number_at_a_constant_rate():
    times = np.arange(299) / 29.97
    by_time, fps_by_time = frame_indices_by_time(times, 299 / 29.97, Sampling())
    by_number, fps = frame_indices(299, 29.97, Sampling())
    assert np.abs(by_time - by_number).max() <= 1  # float64 against the reference's float32 at exact halves
    assert (by_time == by_number).mean() > 0.8
    assert fps_by_time == pytest.approx(fps)


def test_a_held_frame_is_what_is_on_screen():
    times = np.array([0.0, 0.1, 0.2, 10.0, 10.1, 10.2])
    indices, _ = frame_indices_by_time(times, 10.3, Sampling(min_frames=6))
    assert indices.tolist() == [0, 2, 2, 2, 2, 5]


def test_variable_rate_is_told_from_rounded_timestamps():
    constant = np.arange(300) * 1001 / 30000
    assert not is_variable_rate(np.round(constant, 3), 0.001)
    assert not is_variable_rate(constant[:2], 0.001)
    held = constant.copy()
    held[150:] += 0.5
    assert is_variable_rate(held, 0.001)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90.5", 90.5),
        ("1:30.5", 90.5),
        ("01:02:03", 3723),
        (" .5 ", 0.5),
        ("0:00", 0),
        ("90:00", 5400),
    ],
)
def test_parse_time(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "abc", "1:", ":30", "-5", "1:75", "1:60:00", "1:2:3:4", "nan", "1e3", "1m"]
)
def test_parse_time_refuses(text):
    with pytest.raises(UsageError) as error:
        parse_time(text)
    assert repr(text) in error.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"min_frames": 1},
        {"max_frames": 0},
        {"start_s": -1.0},
        {"start_s": float("inf")},
        {"start_s": 5.0, "end_s": 5.0},
        {"end_s": 0.0},
    ],
)
def test_impossible_options_are_usage_errors(options):
    with pytest.raises(UsageError) as error:
        Sampling(**options)
    assert error.value.hint


def test_a_single_frame_is_an_error_with_a_next_step():
    with pytest.raises(MediaRange) as error:
        frame_indices(1, 30, Sampling())
    assert "1 video frame " in error.value.message
    assert "image" in (error.value.hint or "")
