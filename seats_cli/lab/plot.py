"""A trace as a picture, like figure 2 of arXiv 2605.20035: what is left by layer, what is attended to."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.lab.boundaries import Boundaries, blocks_of
from seats_cli.lab.trace_document import of_full

# Okabe and Ito's colours, which colour-blind readers can tell apart; the line styles differ as well.
STYLES = {
    "video": {"color": "#0072B2", "linestyle": "--", "marker": "o"},
    "audio": {"color": "#D55E00", "linestyle": "-.", "marker": "s"},
    "both": {"color": "#000000", "linestyle": "-", "marker": "^"},
    "text": {"color": "#7F7F7F", "linestyle": ":", "marker": ""},
}
LABELS = {"video": "video removed", "audio": "audio removed", "both": "both removed"}
SHADES = {"shallow": "#E8E8E8", "middle": "#F6F6F6", "late": "#FFFFFF"}
DPI = 150
COLOURS = 64
MOST_TICKS = 16
LYING, UPRIGHT = 112.0, 135.0  # percent up to which there is room for the names of the blocks
NARROW = 0.07  # part of the picture's width below which a block's name stands upright


def check_plot(path: Path) -> None:
    """Raise UsageError where no picture could be written there later: matplotlib, suffix, folder."""
    _matplotlib("matplotlib")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} is no PNG file", hint="name it *.png")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: no such folder, or a folder itself")


def plot_trace(document: Mapping[str, Any], boundaries: Boundaries | None, path: Path) -> None:
    """Draw the removal curves, with the attention below where it was measured; the same data, the same bytes.

    Nothing global is changed: neither styles nor the backend. Raises UsageError without matplotlib, without a
    removal curve, or where nothing is right with all tokens.
    """
    full = document["full"][document["measure"]]
    if not document["removal"]:
        raise UsageError("this trace has no removal curve to draw", hint="trace again with --curves removal")
    if not full:
        raise UsageError(f"nothing to draw: the {document['measure']} with all tokens is 0")
    with plain_style():
        figure = draw(document, boundaries)
        try:
            _save(figure, path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def _save(figure: Any, path: Path) -> None:
    """As a PNG of few colours: a picture of lines and areas needs no more, and is a third of the size."""
    from PIL import Image  # matplotlib brings it along

    figure.set_dpi(DPI)
    figure.canvas.draw()
    size = figure.canvas.get_width_height()
    picture = Image.frombuffer("RGBA", size, figure.canvas.buffer_rgba()).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, "PNG", optimize=True, dpi=(DPI, DPI))


def draw(document: Mapping[str, Any], boundaries: Boundaries | None) -> Any:
    """The picture as a matplotlib Figure on an Agg canvas, known to no window and no pyplot."""
    figure = agg_figure(figsize=(8, 6 if document["attention"] else 4.5))
    if document["attention"]:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        _attention(lower, document["attention"])
        axes = [upper, lower]
    else:
        upper = figure.subplots()
        axes = [upper]
    n_layers = document["n_layers"]
    _removal(upper, document)
    _blocks(axes, boundaries, n_layers)
    step = -(-n_layers // MOST_TICKS)
    ticks = [*range(1, n_layers + 1, step)]
    axes[-1].set_xticks([*ticks, n_layers + 1] if step == 1 else ticks)
    if step == 1:
        axes[-1].set_xticklabels([*map(str, ticks), "none"])
    axes[-1].set_xlim(0.5, n_layers + 1.5)
    upper.set_xlabel("removed from this layer on")
    upper.tick_params(labelbottom=True)
    if len(axes) > 1:
        axes[-1].set_xlabel("layer")
    figure.tight_layout()
    return figure


def _removal(axis: Any, document: Mapping[str, Any]) -> None:
    measure = document["measure"]
    for kind, label in LABELS.items():
        rows = [row for row in document["removal"] if row["kind"] == kind]
        if not rows:
            continue
        layers = [row["layer"] for row in rows]
        values = [100 * of_full(document, row, measure) for row in rows]
        axis.plot(layers, values, label=label, markersize=4, **STYLES[kind])
        if all(row["low"] is not None for row in rows):
            low, high = (
                [100 * of_full(document, row, measure, key) for row in rows] for key in ("low", "high")
            )
            axis.fill_between(layers, low, high, color=STYLES[kind]["color"], alpha=0.15, linewidth=0)
    axis.set_ylabel(f"{measure}, % of full tokens")
    axis.set_ylim(bottom=0)
    axis.set_ylim(top=max(LYING, axis.get_ylim()[1]))
    axis.legend(loc="lower right", framealpha=0.9)
    name = document["model"]["name"]
    axis.set_title(f"{name} (questions: {document['samples']}, clips: {document['clips']})")


def _attention(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    layers = [row["layer"] for row in rows]
    for kind in ("video", "audio", "text"):
        style = {**STYLES[kind], "marker": ""}
        axis.plot(layers, [100 * row[kind] for row in rows], label=kind, **style)
    axis.set_ylabel("attention, %")
    axis.set_ylim(0, 100)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False)  # above the panel


def _blocks(axes: Sequence[Any], boundaries: Boundaries | None, n_layers: int) -> None:
    """Shade the blocks, and write their names into the first of the axes."""
    for name, first, last in blocks_of(boundaries, n_layers) if boundaries is not None else ():
        for axis in axes:
            axis.axvspan(first - 0.5, last + 0.5, facecolor=SHADES[name], edgecolor="none", zorder=0)
            if first > 1:
                axis.axvline(first - 0.5, color="#999999", linewidth=0.8, zorder=1)
        top = axes[0].get_xaxis_transform()  # x in layers, y in the height of the panel
        middle = (first + last) / 2
        narrow = (last - first + 1) / (n_layers + 1) < NARROW
        if narrow:
            axes[0].set_ylim(top=max(UPRIGHT, axes[0].get_ylim()[1]))
        axes[0].text(
            middle, 0.97, name, transform=top, ha="center", va="top", style="italic", rotation=90 * narrow
        )


def agg_figure(*, figsize: tuple[float, float]) -> Any:
    """An empty matplotlib Figure on an Agg canvas. Raises UsageError without matplotlib."""
    figure = _matplotlib("matplotlib.figure").Figure(figsize=figsize)
    _matplotlib("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


@contextmanager
def plain_style() -> Iterator[None]:
    """matplotlib's own defaults inside, the user's again after."""
    matplotlib = _matplotlib("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 10})
        yield


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)  # seats itself does without it
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", hint="pip install 'seats-cli[plot]'"
        ) from None
