"""The picture of a trace: what it shows, and that drawing it leaves nothing behind."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lab.tracing import document
from seats_cli.errors import UsageError
from seats_cli.lab.boundaries import propose
from seats_cli.lab.plot import check_plot, draw, plot_trace

CURVE = [0.1, 0.1, 0.12, 0.2, 0.4, 0.6, 0.75, 0.85, 0.89, 0.895, 0.9, 0.9, 0.9, 0.9]


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_lines_are_what_is_left_in_percent_of_full_tokens() -> None:
    trace = document(CURVE)
    upper, lower = draw(trace, propose(trace)).axes
    lines = {line.get_label(): line for line in upper.get_lines()}
    both = lines["both removed"]
    assert list(both.get_xdata()) == list(range(1, 16))
    assert list(both.get_ydata()) == pytest.approx([100 * value / 0.9 for value in [*CURVE, 0.9]])
    assert {"video removed", "audio removed"} < lines.keys()
    assert len(upper.collections) == 3  # a band for each
    assert texts(upper) == ["shallow", "middle", "late"]
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in upper.patches]
    assert edges == [(0.5, 5.5), (5.5, 8.5), (8.5, 14.5)]
    seen = {line.get_label(): list(line.get_ydata()) for line in lower.get_lines()}
    assert seen["video"] == [30.0] * 14
    assert {"audio", "text"} < seen.keys()
    assert upper.get_ylabel() == "accuracy, % of full tokens"


def test_without_attention_boundaries_or_intervals() -> None:
    trace = document([0.5, 0.9], attention=[])
    for row in trace["removal"]:
        row["low"] = row["high"] = None
    (axis,) = draw(trace, None).axes
    assert not axis.collections
    assert texts(axis) == []


def test_the_same_data_give_the_same_bytes_and_nothing_else_changes(tmp_path: Path) -> None:
    import matplotlib

    trace = document(CURVE)
    before = dict(matplotlib.rcParams)
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    plot_trace(trace, propose(trace), first)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 10}):
        plot_trace(trace, propose(trace), second)  # a user's style is not ours
        assert matplotlib.rcParams["font.size"] == 30
    data = first.read_bytes()
    assert data == second.read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert data.startswith(b"\x89PNG")
    assert b"Software" not in data
    width = int.from_bytes(data[16:20], "big")
    assert width == 8 * 150


@pytest.mark.parametrize("n_layers", [2, 14, 28, 48])
def test_any_depth_has_readable_ticks(n_layers: int, tmp_path: Path) -> None:
    trace = document([0.9 * min(1, layer / n_layers) for layer in range(n_layers)])
    figure = draw(trace, propose(trace))
    assert len(figure.axes[-1].get_xticks()) <= 17
    plot_trace(trace, propose(trace), tmp_path / "p.png")


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no removal curve"):
        plot_trace(document([0.5], removal=[]), None, tmp_path / "p.png")
    with pytest.raises(UsageError, match="the accuracy with all tokens is 0"):
        plot_trace(document([0.0], full=0.0), None, tmp_path / "p.png")
    for path, words in ((tmp_path / "p.jpg", "is no PNG"), (tmp_path / "none" / "p.png", "no such folder")):
        with pytest.raises(UsageError, match=words):
            check_plot(path)
    (tmp_path / "p.png").mkdir()
    with pytest.raises(UsageError, match="a folder itself"):
        check_plot(tmp_path / "p.png")


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="needs matplotlib") as caught:
        check_plot(tmp_path / "p.png")
    assert caught.value.hint == "pip install 'seats-cli[plot]'"
