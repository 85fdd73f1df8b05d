"""Signed distances of the eight shapes and the drawn glyphs, as two small atlases that the renderer samples.

A distance field scales to any frame size: the renderer reads it bilinearly and turns it into coverage with an
edge one pixel wide. Units: a shape's radius or half a glyph's height is 1; x grows right, y grows down;
negative inside.
"""

import itertools

import numpy as np

from seats_cli.demo.nouns import GLYPHS, SHAPES

SIDE = 128  # samples along an atlas cell
EXTENT = 1.4  # a cell covers [-EXTENT, EXTENT] on both axes
STROKE = 0.19  # half the width of a glyph's stroke

Array = np.ndarray
Polyline = list[tuple[float, float]]


def _grid() -> tuple[Array, Array]:
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 * EXTENT - EXTENT
    x, y = np.meshgrid(axis, axis)
    return x, y


def _segment(x: Array, y: Array, a: tuple[float, float], b: tuple[float, float]) -> Array:
    """Distance to the segment from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = dx * dx + dy * dy
    t = np.zeros_like(x) if length == 0 else np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / length, 0, 1)
    return np.hypot(x - a[0] - t * dx, y - a[1] - t * dy)


def _polygon(x: Array, y: Array, corners: Polyline) -> Array:
    """Signed distance to a simple polygon (even-odd rule)."""
    distance = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
        distance = np.minimum(distance, _segment(x, y, a, b))
        if a[1] != b[1]:
            crosses = (a[1] > y) != (b[1] > y)
            inside ^= crosses & (x < (b[0] - a[0]) * (y - a[1]) / (b[1] - a[1]) + a[0])
    return np.where(inside, -distance, distance)


def _star() -> Polyline:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.46, 1.12)
    return [(float(r * np.cos(a)), float(r * np.sin(a) + 0.06)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> Polyline:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return [(float(a), float(b) - 0.1) for a, b in zip(x, y, strict=True)]


def shape_atlas() -> Array:
    """(8, SIDE, SIDE) float32 signed distances, in the order of SHAPES."""
    x, y = _grid()
    radius = np.hypot(x, y)
    bar = 0.33
    cells = {
        "circle": radius - 0.92,
        "square": np.maximum(np.abs(x), np.abs(y)) - 0.80,
        "triangle": _polygon(x, y, [(0.0, -1.0), (1.02, 0.82), (-1.02, 0.82)]),
        "star": _polygon(x, y, _star()),
        "cross": np.minimum(
            np.maximum(np.abs(x) - 1.0, np.abs(y) - bar), np.maximum(np.abs(x) - bar, np.abs(y) - 1.0)
        ),
        "heart": _polygon(x, y, _heart()),
        "ring": np.abs(radius - 0.74) - 0.22,
        "moon": np.maximum(radius - 1.0, 0.78 - np.hypot(x - 0.52, y)),
    }
    return np.stack([cells[shape] for shape in SHAPES]).astype(np.float32)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> Polyline:
    """An elliptic arc; degrees, clockwise from the right because y grows down."""
    angles = np.radians(np.linspace(start, stop, 14))
    return [(float(cx + rx * np.cos(a)), float(cy + ry * np.sin(a))) for a in angles]


L, R, T, B = -0.55, 0.55, -0.8, 0.8

STROKES: dict[str, list[Polyline]] = {
    "e": [[(R, T), (L, T), (L, B), (R, B)], [(L, 0), (0.4, 0)]],
    "f": [[(R, T), (L, T), (L, B)], [(L, 0), (0.4, 0)]],
    "h": [[(L, T), (L, B)], [(R, T), (R, B)], [(L, 0), (R, 0)]],
    "j": [[(R, T), (R, 0.3), *_arc(0, 0.3, R, 0.5, 0, 180)], [(-0.05, T), (R, T)]],
    "k": [[(L, T), (L, B)], [(R, T), (L, 0.1)], [(-0.2, -0.1), (R, B)]],
    "l": [[(L, T), (L, B), (R, B)]],
    "m": [[(-0.7, B), (-0.7, T), (0, 0.25), (0.7, T), (0.7, B)]],
    "n": [[(L, B), (L, T), (R, B), (R, T)]],
    "p": [[(L, B), (L, T), (0.1, T), *_arc(0.1, -0.35, 0.45, 0.45, -90, 90), (L, 0.1)]],
    "r": [
        [(L, B), (L, T), (0.1, T), *_arc(0.1, -0.38, 0.42, 0.42, -90, 90), (L, 0.04)],
        [(-0.05, 0.04), (R, B)],
    ],
    "s": [[*_arc(0, -0.4, 0.52, 0.4, -20, -270), *_arc(0, 0.4, 0.52, 0.4, -90, 160)]],
    "t": [[(-0.65, T), (0.65, T)], [(0, T), (0, B)]],
    "u": [[(L, T), (L, 0.25), *_arc(0, 0.25, R, 0.55, 180, 0), (R, T)]],
    "v": [[(-0.65, T), (0, B), (0.65, T)]],
    "w": [[(-0.75, T), (-0.4, B), (0, -0.2), (0.4, B), (0.75, T)]],
    "x": [[(-0.6, T), (0.6, B)], [(0.6, T), (-0.6, B)]],
    "y": [[(-0.6, T), (0, 0)], [(0.6, T), (0, 0), (0, B)]],
    "z": [[(L, T), (R, T), (L, B), (R, B)]],
    "3": [[*_arc(0, -0.4, 0.5, 0.4, -150, 90)], [*_arc(0, 0.4, 0.55, 0.4, -90, 150)]],
    "4": [[(0.3, B), (0.3, T), (-0.6, 0.3), (0.65, 0.3)]],
    "6": [[(0.35, T), *_arc(0.05, 0.3, 0.6, 1.0, -105, -180)], [*_arc(0, 0.32, 0.55, 0.48, 0, 360)]],
    "7": [[(L, T), (R, T), (-0.2, B)], [(-0.2, 0.0), (0.5, 0.0)]],
    "8": [[*_arc(0, -0.42, 0.42, 0.38, 0, 360)], [*_arc(0, 0.38, 0.55, 0.42, 0, 360)]],
    "9": [[(-0.35, B), *_arc(-0.05, -0.3, 0.6, 1.0, 75, 0)], [*_arc(0, -0.32, 0.55, 0.48, 0, 360)]],
}


def glyph_atlas() -> Array:
    """(1 + 24, SIDE, SIDE) float32 signed distances; cell 0 is no glyph, cell 1 + i is GLYPHS[i]."""
    x, y = _grid()
    cells = [np.full_like(x, 10.0)]
    for glyph in GLYPHS:
        distance = np.full_like(x, np.inf)
        for line in STROKES[glyph]:
            for a, b in itertools.pairwise(line):
                distance = np.minimum(distance, _segment(x, y, a, b))
        cells.append(distance - STROKE)
    return np.stack(cells).astype(np.float32)
