"""Parsers of single values."""

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from seats_cli.cli.options import merged_settings, number, parse_device, parse_time


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        ("12.5", 12.5),
        ("90", 90.0),
        ("1:30", 90.0),
        ("1:02:03.25", 3723.25),
        ("00:00", 0.0),
        (".5", 0.5),
    ],
)
def test_times(text: str, expected: float) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "text", ["", "-1", "1:60", "1:60:00", "1:-2", "a", "1:2:3:4", "1.5:00", "1e3", "nan", "٣", "."]
)
def test_not_times(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a time"):
        parse_time(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_times_add_up(hours: int, minutes: int, secs: int) -> None:
    assert parse_time(f"{hours}:{minutes:02}:{secs:02}") == hours * 3600 + minutes * 60 + secs


@given(st.floats() | st.integers().map(float))
def test_a_number_is_accepted_exactly_inside_its_range(value: float) -> None:
    parse = number(above=0, most=1)
    if 0 < value <= 1:
        assert parse(repr(value)) == value
    else:
        with pytest.raises(typer.BadParameter):
            parse(repr(value))


@pytest.mark.parametrize("text", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:11"])
def test_devices(text: str) -> None:
    assert parse_device(text) == text


@pytest.mark.parametrize("text", ["", "cuda:", "cuda:x", "cpu:0", "CUDA", "tpu"])
def test_not_devices(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_device(text)


def test_settings() -> None:
    assert merged_settings({"a": "1", "b": "2"}, ["b = 3", "c=x=y"]) == {"a": "1", "b": "3", "c": "x=y"}
    assert merged_settings({}, None) == {}
