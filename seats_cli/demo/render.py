"""Specs to pixels: batches of clips, all frames at once, on any device.

`pack` turns specs into arrays of fixed sizes; `render_frames` and `labels` work on these as tensors, without
a Python loop over clips or frames, without a shape that depends on data and without a synchronisation, so
that a trainer can compile them or capture them in a CUDA graph. `seats demo` runs the same code on the CPU.
Sound is in sounding.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from seats_cli.demo.atlas import EXTENT, glyph_atlas, shape_atlas
from seats_cli.demo.nouns import COLOURS, GLYPHS, MOTIONS, SHAPES, SOUNDS, WORDS
from seats_cli.demo.sounding import render_audio
from seats_cli.demo.world import ClipSpec, Maxima, maxima
from seats_cli.errors import UsageError

__all__ = ["Assets", "assets", "labels", "pack", "render_audio", "render_frames", "to_tensors"]

NEVER = 1e6  # start of a scene, word or sound that is padding, in seconds
TILE = 1024  # side of the tile of grain
OUTLINE = 0.10  # width of the dark line around a shape, in radii

Packed = Mapping[str, torch.Tensor]

_SHAPE = {name: i for i, name in enumerate(SHAPES)}
_COLOUR = {name: i for i, name in enumerate(COLOURS)}
_MOTION = {name: i for i, name in enumerate(MOTIONS)}
_GLYPH: dict[str | None, int] = {None: 0, **{name: i + 1 for i, name in enumerate(GLYPHS)}}
_WORD = {name: i + 1 for i, name in enumerate(WORDS)}
_SOUND = {name: i + 1 for i, name in enumerate(SOUNDS)}

# Columns of "scene_values".
_COLUMNS = (
    *("start", "x", "y", "vx", "vy", "radius", "cos", "sin", "red", "green", "blue"),
    *(
        "glyph_x",
        "glyph_y",
        "glyph_size",
        "glyph_tone",
        "back_red",
        "back_green",
        "back_blue",
        "gradient_x",
        "gradient_y",
    ),
    *(
        "stripe_x",
        "stripe_y",
        "stripe_phase",
        "stripe_depth",
        "blob_x",
        "blob_y",
        "blob_phase",
        "blob_depth",
        "grain",
    ),
)
_COLUMN = {name: i for i, name in enumerate(_COLUMNS)}


@dataclass(frozen=True)
class Assets:
    """Constants of the renderer on one device: the two atlases and a tile of Gaussian grain."""

    shapes: torch.Tensor  # (8, SIDE, SIDE)
    glyphs: torch.Tensor  # (25, SIDE, SIDE)
    grain: torch.Tensor  # (TILE, TILE)


@lru_cache(maxsize=8)
def assets(device: str | torch.device = "cpu") -> Assets:
    """The renderer's constants on `device`, the same on every machine."""
    grain = np.random.default_rng(20605).standard_normal((TILE, TILE), dtype=np.float32)
    parts = (torch.from_numpy(part).to(device) for part in (shape_atlas(), glyph_atlas(), grain))
    return Assets(*parts)


def pack(specs: Sequence[ClipSpec], sizes: Maxima | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Specs as arrays of fixed sizes, for B clips of at most `sizes` (by default, of their longest duration).

    scene_start (B, S) float32; scene_ids (B, S, 4) int64: shape, colour, motion, glyph (0 none);
    scene_values (B, S, 29) float32; word_ids (B, W, 2) int64: word (0 none, else 1 + its number), voice;
    word_values (B, W, 5) float32: start, end, amplitude, rate, tilt; sound_ids (B, K) int64 (0 none);
    sound_values (B, K, 5) float32: start, end, amplitude, pitch, wobble; clip_values (B, 5) float32: noise
    and hum amplitudes, hum Hz, echo delay in s, echo strength; seed (B,) int64. Padding never starts.
    """
    sizes = sizes or maxima(max(spec.duration_s for spec in specs))
    scene_ids: list[tuple[int, ...]] = []
    scene_values: list[tuple[float, ...]] = []
    word_ids: list[tuple[int, int]] = []
    word_values: list[tuple[float, ...]] = []
    sound_ids: list[int] = []
    sound_values: list[tuple[float, ...]] = []
    no_scene = (NEVER, *(0.0,) * (len(_COLUMNS) - 1))
    no_event = (NEVER, NEVER, 0.0, 1.0, 0.0)
    for spec in specs:
        spare = Maxima(
            sizes.scenes - len(spec.scenes), sizes.words - len(spec.words), sizes.sounds - len(spec.sounds)
        )
        if min(spare.scenes, spare.words, spare.sounds) < 0:
            raise UsageError(f"clip {spec.seed} does not fit {sizes}")
        for s in spec.scenes:
            scene_ids.append((_SHAPE[s.shape], _COLOUR[s.colour], _MOTION[s.motion], _GLYPH[s.glyph]))
            scene_values.append(_scene_row(s))
        scene_ids.extend([(0, 0, 0, 0)] * spare.scenes)
        scene_values.extend([no_scene] * spare.scenes)
        for w in spec.words:
            word_ids.append((_WORD[w.word], w.voice))
            word_values.append((w.start_s, w.end_s, _amplitude(w.gain), w.rate, w.tilt))
        word_ids.extend([(0, 0)] * spare.words)
        word_values.extend([no_event] * spare.words)
        for e in spec.sounds:
            sound_ids.append(_SOUND[e.sound])
            sound_values.append((e.start_s, e.end_s, _amplitude(e.gain), e.pitch, e.wobble))
        sound_ids.extend([0] * spare.sounds)
        sound_values.extend([no_event] * spare.sounds)
    n = len(specs)
    clips = [(_amplitude(s.noise_gain), _amplitude(s.hum_gain), s.hum_hz, *s.echo) for s in specs]
    values = np.array(scene_values, np.float32).reshape(n, sizes.scenes, len(_COLUMNS))
    return {
        "scene_start": np.ascontiguousarray(values[..., 0]),
        "scene_ids": np.array(scene_ids, np.int64).reshape(n, sizes.scenes, 4),
        "scene_values": values,
        "word_ids": np.array(word_ids, np.int64).reshape(n, sizes.words, 2),
        "word_values": np.array(word_values, np.float32).reshape(n, sizes.words, 5),
        "sound_ids": np.array(sound_ids, np.int64).reshape(n, sizes.sounds),
        "sound_values": np.array(sound_values, np.float32).reshape(n, sizes.sounds, 5),
        "clip_values": np.array(clips, np.float32),
        "seed": np.array([spec.noise_seed for spec in specs], np.int64),
    }


def _scene_row(s: Any) -> tuple[float, ...]:
    b = s.backdrop
    return (
        *(s.start_s, s.x, s.y, s.vx, s.vy, s.radius, math.cos(s.angle), math.sin(s.angle), *s.rgb),
        *(s.glyph_x, s.glyph_y, s.glyph_size, s.glyph_tone, *b.rgb, *b.gradient),
        *(*b.stripe, b.stripe_depth, *b.blob, b.blob_depth, b.grain),
    )


def _amplitude(gain: float) -> float:
    return float(10 ** (gain / 20))


def to_tensors(
    packed: Mapping[str, np.ndarray[Any, Any]], device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """The arrays of `pack` as tensors on `device`."""
    return {name: torch.from_numpy(array).to(device) for name, array in packed.items()}


def _scene_of(packed: Packed, times: torch.Tensor) -> torch.Tensor:
    """(B, N) seconds -> (B, N) int64 number of the scene on screen."""
    started = times.unsqueeze(-1) >= packed["scene_start"].unsqueeze(1)
    return started.sum(-1).clamp(min=1) - 1


def _gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, C) rows at (B, N) -> (B, N, C)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def render_frames(
    packed: Packed, times: torch.Tensor, size: int, constants: Assets | None = None
) -> torch.Tensor:
    """Frames of a batch: times (B, T) float seconds -> (B, T, 3, size, size) float32 in [0, 1].

    constants: `assets(device)`, taken from a cache when not given (give it inside torch.compile). A frame
    depends on its clip and its time alone, so that rendering in parts equals rendering at once.
    """
    constants = constants or assets(times.device)
    if size > TILE // 2:
        raise UsageError(f"frames of {size} px are too large", hint=f"choose at most {TILE // 2}")
    scene = _scene_of(packed, times)
    ids = _gather(packed["scene_ids"], scene)
    values = _gather(packed["scene_values"], scene)

    def column(name: str) -> torch.Tensor:
        return values[..., _COLUMN[name], None, None]

    axis = (torch.arange(size, device=times.device, dtype=torch.float32) + 0.5) / size
    x, y = axis.view(1, 1, 1, size), axis.view(1, 1, size, 1)
    brightness = _texture(column, x, y) + column("grain") * _grain(packed, scene, size, constants)
    image = values[..., _COLUMN["back_red"] : _COLUMN["back_blue"] + 1, None, None] + brightness.unsqueeze(2)

    distance = _sample(constants.shapes, ids[..., 0], *_shape_frame(column, x, y, times))
    pixels = column("radius") * size
    rim = ((OUTLINE - distance) * pixels + 0.5).clamp(0, 1).unsqueeze(2)
    fill = (0.5 - distance * pixels).clamp(0, 1).unsqueeze(2)
    rgb = values[..., _COLUMN["red"] : _COLUMN["blue"] + 1, None, None]
    image = torch.lerp(image, image * 0.35, rim)
    image = torch.lerp(image, rgb + 0.35 * brightness.unsqueeze(2), fill)

    half = column("glyph_size").clamp(min=1e-3)
    distance = _sample(
        constants.glyphs, ids[..., 3], (x - column("glyph_x")) / half, (y - column("glyph_y")) / half
    )
    ink = (0.5 - distance * half * size).clamp(0, 1).unsqueeze(2)
    image = torch.lerp(image, column("glyph_tone").unsqueeze(2).expand_as(image), ink)
    return image.clamp(0, 1)


def _texture(column: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient, stripes and blobs of the backdrop: (B, T, H, W) change of brightness."""
    tau = 2 * math.pi
    ramp = column("gradient_x") * (x - 0.5) + column("gradient_y") * (y - 0.5)
    wave = torch.sin(tau * (column("stripe_x") * x + column("stripe_y") * y) + column("stripe_phase"))
    blob_x = torch.sin(tau * column("blob_x") * x + column("blob_phase")) * column("blob_depth")
    blob_y = torch.sin(tau * column("blob_y") * y + 2.3 * column("blob_phase"))
    return ramp + column("stripe_depth") * wave + blob_x * blob_y


def _grain(packed: Packed, scene: torch.Tensor, size: int, constants: Assets) -> torch.Tensor:
    """(B, T, size, size) Gaussian grain: a window of the tile, placed by the clip's seed and the scene's
    number.

    It stands still within a scene, like the texture of a wall: new noise in every frame would cost ten times
    the bits of everything else in an encoded file.
    """
    key = packed["seed"].unsqueeze(1) * 1_000_003 + scene * 7_919
    places = TILE - size
    windows = constants.grain.unfold(0, size, 1).unfold(1, size, 1)
    return windows[(key * 40_503 % 65_521) % places, (key * 30_011 % 64_951) % places]


def _shape_frame(
    column: Any, x: torch.Tensor, y: torch.Tensor, times: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel coordinates in the shape's own frame: centred, rotated, in radii."""
    elapsed = times[..., None, None] - column("start")
    radius = column("radius").clamp(min=1e-3)
    margin = radius * 1.1
    period = 1 + 2 * margin
    cx = torch.remainder(column("x") + column("vx") * elapsed + margin, period) - margin
    cy = torch.remainder(column("y") + column("vy") * elapsed + margin, period) - margin
    dx, dy = (x - cx) / radius, (y - cy) / radius
    cos, sin = column("cos"), column("sin")
    return dx * cos + dy * sin, dy * cos - dx * sin


def _sample(atlas: torch.Tensor, cell: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Distances at (u, v): cell (B, T), u and v broadcastable to (B, T, H, W) -> (B, T, H, W)."""
    u, v = torch.broadcast_tensors(u, v)
    grid = torch.stack((u, v), -1).flatten(0, 1) / EXTENT
    cells = atlas[cell.flatten()].unsqueeze(1)
    found = functional.grid_sample(cells, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.view(*cell.shape, *found.shape[-2:])


def labels(packed: Packed, frame_times: torch.Tensor, audio_times: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is true at each time: frame_times (B, T) and audio_times (B, A) in seconds -> int64 tensors.

    frame_scene, frame_shape, frame_colour, frame_motion, frame_glyph (B, T), glyph 0 being none; the same
    five as audio_* (B, A): what is on screen while something is heard; audio_word and audio_sound (B, A), 0
    for none, else 1 + the number in WORDS or SOUNDS; audio_phase (B, A), 0 outside events, else 1 to 4, the
    quarter of the event.
    """
    found: dict[str, torch.Tensor] = {}
    for kind, times in (("frame", frame_times), ("audio", audio_times)):
        scene = _scene_of(packed, times)
        ids = _gather(packed["scene_ids"], scene)
        found[f"{kind}_scene"] = scene
        for i, name in enumerate(("shape", "colour", "motion", "glyph")):
            found[f"{kind}_{name}"] = ids[..., i]
    word, word_phase = _event_at(packed["word_ids"][..., 0], packed["word_values"], audio_times)
    sound, sound_phase = _event_at(packed["sound_ids"], packed["sound_values"], audio_times)
    return {**found, "audio_word": word, "audio_sound": sound, "audio_phase": word_phase + sound_phase}


def _event_at(
    ids: torch.Tensor, values: torch.Tensor, times: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The event and its quarter at each time; events do not overlap, so sums over them select."""
    start, end = values[:, None, :, 0], values[:, None, :, 1]
    at = times.unsqueeze(-1)
    inside = (at >= start) & (at < end)
    quarter = 1 + (4 * (at - start) / (end - start).clamp(min=1e-3)).long().clamp(0, 3)
    return (inside * ids.unsqueeze(1)).sum(-1), (inside * quarter).sum(-1)
