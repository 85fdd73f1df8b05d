"""One ratio, two kinds: the table's rows, and a total that is always met."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clips import OMNI_7B
from seats_cli.selection.split import Bounds, split_ratio, table_pair

TABLE = OMNI_7B.ratio_table
FREE = (Bounds(0.0, 1.0), Bounds(0.0, 1.0))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row.ratio))
def test_a_clip_of_the_papers_mix_gets_the_papers_pair(row: object) -> None:
    ratio, video, audio = row.ratio, row.video, row.audio  # type: ignore[attr-defined]
    n_audio = 10_000
    n_video = round(n_audio * (audio - ratio) / (ratio - video))  # the mix for which the row is exact
    assert split_ratio(TABLE, ratio, (n_video, n_audio), FREE) == pytest.approx((video, audio), rel=1e-3)


@given(st.floats(0.001, 1), st.integers(0, 5000), st.integers(0, 5000), st.data())
def test_the_total_is_met_within_bounds(
    ratio: float, n_video: int, n_audio: int, data: st.DataObject
) -> None:
    assume(n_video + n_audio > 0)
    least = [data.draw(st.floats(0, 0.3)) for _ in range(2)]
    most = [data.draw(st.floats(0.5, 1)) for _ in range(2)]
    bounds = (Bounds(least[0], most[0]), Bounds(least[1], most[1]))
    video, audio = split_ratio(TABLE, ratio, (n_video, n_audio), bounds)
    for kind, (value, count) in enumerate(((video, n_video), (audio, n_audio))):
        assert (least[kind] - 1e-12 <= value <= most[kind] + 1e-12) if count else value == 0
    low, high = (sum(end[k] * count for k, count in enumerate((n_video, n_audio))) for end in (least, most))
    wanted = min(max(ratio * (n_video + n_audio), low), high)
    assert video * n_video + audio * n_audio == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(st.floats(0.001, 0.999), st.integers(1, 5000), st.integers(1, 5000))
def test_a_little_more_asked_is_a_little_more_given(ratio: float, n_video: int, n_audio: int) -> None:
    before = split_ratio(TABLE, ratio, (n_video, n_audio), FREE)
    after = split_ratio(TABLE, min(1.0, ratio + 1e-6), (n_video, n_audio), FREE)
    assert after == pytest.approx(before, abs=0.05)


def test_one_kind_gets_it_all() -> None:
    assert split_ratio(TABLE, 0.1, (0, 500), FREE) == (0.0, pytest.approx(0.1))
    assert split_ratio(TABLE, 0.1, (500, 0), FREE) == (pytest.approx(0.1), 0.0)


def test_the_ends_of_the_table() -> None:
    assert table_pair(TABLE, 1.0) == (1.0, 1.0)
    video, audio = table_pair(TABLE, 0.02)
    assert audio / video == pytest.approx(0.35 / 0.06)  # below the table the relation of its first row holds
    ratios = [table_pair(TABLE, ratio) for ratio in (0.35, 0.5, 0.7, 0.9, 1.0)]
    relations = [audio / video for video, audio in ratios]
    assert relations == sorted(relations, reverse=True)  # and above it, it falls to 1
