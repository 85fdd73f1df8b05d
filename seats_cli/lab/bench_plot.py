"""A benchmark as a picture: where the time of an answer goes, row by row, or how it grows with the clip."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.lab.plot import DPI, agg_figure, plain_style

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PARTS = {
    "encode_video": ("video encoder", "#0072B2"),
    "encode_audio": ("audio encoder", "#56B4E9"),
    "select": ("select", "#009E73"),
    "prefill": ("prefill", "#D55E00"),
    "generate": ("decoding", "#BBBBBB"),
}
LINES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "os^Dv<>P"


def plot_bench(document: Mapping[str, Any], path: Path) -> None:
    """Draw the document's rows into a PNG file. UsageError without matplotlib or without runs."""
    rows = [row for row in document["rows"] if row["samples"]]
    if not rows:
        raise UsageError("nothing to draw: no row has a run")
    with plain_style():
        figure = draw(document, rows)
        try:
            figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def draw(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """The picture as a matplotlib Figure: lines over a sweep of lengths, else a bar a row."""
    sweep = document["input"]["sweep"]
    grows = sweep is not None and sweep["key"] in ("seconds", "frames")
    figure = agg_figure(figsize=(8, 5.5 if grows else 1.6 + 0.45 * len(rows)))
    _lines(figure, document, rows) if grows else _bars(figure, document, rows)
    environment = document["environment"]
    title = f"{environment['model']}, {environment['device_name']}, {environment['dtype']}"
    figure.suptitle(title + (", random weights" if environment["random_weights"] else ""), fontsize=11)
    figure.tight_layout()
    return figure


def row_name(row: Mapping[str, Any]) -> str:
    """ "seats 0.1", "full", "transformers"."""
    if row["engine"] == "transformers":
        return "transformers"
    extras = [f"{key}={value}" for key, value in row["settings"].items()]
    name = row["method"] if row["method"] == "full" else f"{row['method']} {row['ratio']:g}"
    return " ".join([name, *extras])


def _bars(figure: Any, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    axis = figure.subplots()
    several = len(document["input"]["items"]) > 1
    names = [
        f"{document['input']['items'][row['item']]['name']}\n{row_name(row)}" if several else row_name(row)
        for row in rows
    ]
    left = [0.0] * len(rows)
    for part, (label, colour) in PARTS.items():
        widths = [1000 * (row["seconds"][part] or {"median": 0.0})["median"] for row in rows]
        axis.barh(range(len(rows)), widths, left=left, label=label, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlabel("ms, medians")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=len(PARTS), frameon=False, fontsize=9)


def _lines(figure: Any, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    sweep = document["input"]["sweep"]
    panels = figure.subplots(1, 2, sharex=True)
    shown = (("select_prefill", "select + prefill, ms"), ("whole", "whole answer, ms"))
    for axis, (part, label) in zip(panels, shown, strict=True):
        for index, (name, points) in enumerate(_by_name(rows, sweep["values"], part)):
            style = {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}
            axis.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sweep["values"], [f"{value:g}" for value in sweep["values"]])
        axis.minorticks_off()
        axis.set_xlabel(sweep["key"])
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    panels[0].legend(fontsize=9)


def _by_name(
    rows: Sequence[Mapping[str, Any]], values: Sequence[float], part: str
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for name in dict.fromkeys(row_name(row) for row in rows):
        mine = [row for row in rows if row_name(row) == name and row["seconds"][part]]
        points = [(values[row["item"]], 1000 * row["seconds"][part]["median"]) for row in mine]
        if points:
            yield name, points
