"""What an answer would take on a device, and which option would make it fit: nothing here runs a network.

Before a run `seats plan` asks, after one that ran out of memory the error does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from seats_cli.engine.encode import (
    AUDIO_S_AT_ONCE,
    FRAMES_AT_ONCE,
    FRAMES_ON_LARGE_GPU,
    LARGE_GPU_BYTES,
    windows_in_piece,
)
from seats_cli.engine.graph import ROUNDING
from seats_cli.errors import PlanError, SeatsError, UsageError
from seats_cli.measure.compute import layer_lengths
from seats_cli.measure.memory import Engine, MemoryEstimate, Workload, estimate
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.preprocess import PixelCaps
from seats_cli.presets import Preset
from seats_cli.selection.methods import Method, find_method
from seats_cli.selection.options import Setup
from seats_cli.selection.plan import ClipCounts, Plan

RATIOS = (0.5, 0.35, 0.25, 0.15, 0.10, 0.05)  # that are tried, the largest that fits is told
FEWEST_FRAMES = 8
SHORTEST_S = 2.0


@dataclass(frozen=True)
class ClipFacts:
    """What of a clip is looked at, known before a pixel is decoded.

    n_frames:   sampled frames, upright, height x width pixels, at the true sample_fps; 0 without video
    n_samples:  of 16 kHz mono sound
    image_size: (height, width) of a picture; None for a clip
    start_s:    where in the file it begins
    """

    n_frames: int = 0
    height: int = 0
    width: int = 0
    sample_fps: float = 0.0
    n_samples: int = 0
    image_size: tuple[int, int] | None = None
    start_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Its length, by whichever of its tracks is longer."""
        seen = self.n_frames / self.sample_fps if self.n_frames else 0.0
        return max(seen, self.n_samples / 16000)

    def fewer_frames(self, n_frames: int) -> "ClipFacts":
        """The same time, sampled more thinly."""
        return replace(self, n_frames=n_frames, sample_fps=self.sample_fps * n_frames / self.n_frames)

    def first(self, seconds: float) -> "ClipFacts":
        """Its beginning, of at most so many seconds."""
        part = min(1.0, seconds / self.seconds)
        frames = max(2, int(self.n_frames * part) // 2 * 2) if self.n_frames else 0
        return replace(self, n_frames=frames, n_samples=int(self.n_samples * part))


@dataclass(frozen=True)
class Asked:
    """One question about a clip, with how it is to be answered."""

    clip: ClipFacts
    question: str
    method: Method
    setup: Setup
    ratio: float
    new_tokens: int
    system: str | None = None


@dataclass(frozen=True)
class Forecast:
    """What an answer would come to.

    counts, plan: of the clip's tokens; lengths: tokens that each layer processes; entering: the first one
    """

    shape: MediaShape
    counts: ClipCounts
    plan: Plan
    lengths: tuple[int, ...]
    entering: int
    memory: MemoryEstimate


@dataclass(frozen=True)
class Remedy:
    """An option, as it would be typed, and what the answer would then take."""

    option: str
    forecast: Forecast


def media_shape(adapter: Adapter, clip: ClipFacts, preset: Preset) -> MediaShape:
    """How many tokens the clip becomes; the preset caps the tokens of a frame. Raises MediaError."""
    if clip.image_size is not None:
        return adapter.media_shape(image_size=clip.image_size)
    caps = preset.caps
    return adapter.media_shape(
        n_frames=clip.n_frames,
        height=clip.height,
        width=clip.width,
        sample_fps=clip.sample_fps,
        n_samples=clip.n_samples,
        caps=PixelCaps(caps.min_per_grid, caps.max_per_grid, caps.total),
    )


def clip_counts(prompt: Prompt, shape: MediaShape) -> ClipCounts:
    """What planning must know of a laid-out prompt."""
    layout = prompt.layout
    return ClipCounts(
        n_video=layout.n_video,
        n_audio=layout.n_audio,
        tokens_per_grid=shape.tokens_per_grid,
        n_windows=int(layout.window.max()) + 1,
        n_text=layout.n_text,
    )


# ---- one forecast -----------------------------------------------------------------------------------------


def forecast(adapter: Adapter, asked: Asked, weights: int, engine: Engine, *, device_bytes: int) -> Forecast:
    """What `asked` comes to on a device of `device_bytes`, 0 for the host. `adapter` may be an outline.

    Raises PlanError where no plan meets the ratio, MediaError and UsageError as asking would.
    """
    shape = media_shape(adapter, asked.clip, asked.setup.preset)
    prompt = adapter.prompt(asked.question, shape, system=asked.system)
    counts = clip_counts(prompt, shape)
    plan = asked.method.plan(asked.setup.preset, asked.ratio, counts, asked.setup.options)
    adapter.check_cuts(plan.cut_layers)
    lengths, grid = layer_lengths(plan, counts.n_text), shape.video_grid
    work = Workload(
        patches=_patches(adapter, asked, shape, plan, device_bytes),
        window_patches=_window_grids(shape, plan) * grid[1] * grid[2] if grid and plan.needs_saliency else 0,
        pixel_bytes=_pixel_bytes(adapter, asked, shape, plan, device_bytes),
        positions=_positions(shape),
        held=(counts.n_video + counts.n_audio)
        if asked.method.scope == "clip"
        else lengths[0] - counts.n_text,
        entering=lengths[0],
        lengths=lengths,
        new_tokens=asked.new_tokens,
    )
    engine = replace(engine, text_cache=plan.options.decode_cache == "text" and not plan.keeps_all)
    return Forecast(
        shape, counts, plan, lengths, lengths[0], estimate(adapter.geometry, weights, work, engine)
    )


def _grids_at_once(shape: MediaShape, plan: Plan, device_bytes: int, temporal_patch: int) -> int:
    """Grids in a batch of the vision encoder, as `engine.encode` cuts them."""
    assert shape.video_grid is not None
    window = _window_grids(shape, plan)
    at_once = max(1, _frames_at_once(device_bytes) // (window * temporal_patch))
    return min(shape.video_grid[0], at_once * window)


def _frames_at_once(device_bytes: int) -> int:
    return FRAMES_ON_LARGE_GPU if device_bytes > LARGE_GPU_BYTES else FRAMES_AT_ONCE


def _window_grids(shape: MediaShape, plan: Plan) -> int:
    """Grids of a whole stage-I window."""
    return max(1, plan.video_window // max(1, shape.tokens_per_grid))


def _patches(adapter: Adapter, asked: Asked, shape: MediaShape, plan: Plan, device_bytes: int) -> int:
    if shape.image_grid is not None:
        return shape.image_grid[1] * shape.image_grid[2]
    if shape.video_grid is None:
        return 0
    grids = _grids_at_once(shape, plan, device_bytes, adapter.geometry.temporal_patch)
    return grids * shape.video_grid[1] * shape.video_grid[2]


def _pixel_bytes(adapter: Adapter, asked: Asked, shape: MediaShape, plan: Plan, device_bytes: int) -> int:
    """Resized frames twice, as they come and in one tensor, and a piece of native ones."""
    geometry, grid = adapter.geometry, shape.video_grid or shape.image_grid
    if grid is None:
        return 0
    of_grid = 3 * geometry.temporal_patch * grid[1] * grid[2] * geometry.patch**2
    if shape.video_grid is None:
        return of_grid
    grids = _grids_at_once(shape, plan, device_bytes, geometry.temporal_patch)
    native = 3 * asked.clip.height * asked.clip.width * geometry.temporal_patch
    window = _window_grids(shape, plan)
    at_once = max(1, _frames_at_once(device_bytes) // (window * geometry.temporal_patch))
    piece = min(grids, window * windows_in_piece(at_once, window * native))
    return 2 * grids * of_grid + piece * native


def _positions(shape: MediaShape) -> int:
    return min(shape.audio_frames, round(AUDIO_S_AT_ONCE * 100)) // 2


def engine_of(adapter: Adapter, *, graphs: bool) -> Engine:
    """How a loaded adapter runs, for `forecast`; `graphs`: decoding in a CUDA graph was not turned off."""
    quantised = adapter.quantization is not None
    widest = adapter.geometry.hidden * adapter.geometry.mlp * adapter.dtype.itemsize
    on_gpu = adapter.device.type == "cuda"
    return Engine(
        itemsize=adapter.dtype.itemsize,
        fused=adapter.fused or quantised,
        fused_text=adapter.fused,
        graph_rounds=ROUNDING if graphs and adapter.decodes_in_graph else 0,
        dequantised=widest if quantised else 0,
        on_gpu=on_gpu,
    )


# ---- what would fit ---------------------------------------------------------------------------------------


def within_context(adapter: Adapter, asked: Asked, found: Forecast) -> bool:
    """Whether what enters the model and the longest answer are within what it was made for."""
    return found.entering + asked.new_tokens <= adapter.context_length


def remedies(
    adapter: Adapter,
    asked: Asked,
    weights: int,
    engine: Engine,
    *,
    device_bytes: int,
    room: float,
    shorter: Callable[[float], ClipFacts] | None = None,
) -> list[Remedy]:
    """Options with which the answer's peak is at most `room` bytes and its tokens are within the context: of
    each kind the mildest that does, the ratio first, then frames, then a part of the clip.

    shorter: of a clip that there is not yet, what it would be with so many seconds
    """
    found: list[Remedy] = []
    for kind in (
        _ratios(asked),
        _frames(asked),
        _parts(asked) if shorter is None else _lengths(asked, shorter),
    ):
        for option, changed in kind:
            try:
                then = forecast(adapter, changed, weights, engine, device_bytes=device_bytes)
            except (PlanError, UsageError):
                continue
            if then.memory.peak <= room and within_context(adapter, changed, then):
                found.append(Remedy(option, then))
                break
    return found


def advice(adapter: Adapter, asked: Asked, engine: Engine, *, device_bytes: int, room: int) -> str | None:
    """In a sentence, what would fit into `room` bytes beside a loaded network that just ran out of memory on
    `asked`; None where nothing that is tried would, or nothing can be said."""
    try:
        needed = forecast(adapter, asked, 0, engine, device_bytes=device_bytes).memory.peak
    except SeatsError:
        return None
    # Where the estimate would have had it fit, what takes clearly less is worth trying.
    found = remedies(
        adapter, asked, 0, engine, device_bytes=device_bytes, room=min(room, round(0.9 * needed))
    )
    if not found:
        return None
    options = " or ".join(f"{remedy.option} ({in_words(remedy.forecast.memory.peak)})" for remedy in found)
    return (
        f"it takes about {in_words(needed)} beside the weights, and {in_words(room)} are free; by estimate "
        f"{options} would do. `seats plan` shows more"
    )


def in_words(n_bytes: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


def _ratios(asked: Asked) -> Iterator[tuple[str, Asked]]:
    name = getattr(asked.method, "name", "")
    method, prefix = (find_method("seats"), "--method seats ") if name == "full" else (asked.method, "")
    for ratio in RATIOS:
        if prefix or ratio < asked.ratio:
            yield f"{prefix}--ratio {ratio:g}", replace(asked, method=method, ratio=ratio)


def _frames(asked: Asked) -> Iterator[tuple[str, Asked]]:
    n_frames = asked.clip.n_frames // 4 * 2
    while n_frames >= FEWEST_FRAMES:
        yield f"--max-frames {n_frames}", replace(asked, clip=asked.clip.fewer_frames(n_frames))
        n_frames = n_frames // 4 * 2


def _parts(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.clip.image_size is not None:
        return
    seconds = asked.clip.seconds / 2
    while seconds >= SHORTEST_S:
        end = int(asked.clip.start_s + seconds)
        yield f"--end {clock_time(end)}", replace(asked, clip=asked.clip.first(end - asked.clip.start_s))
        seconds /= 2


def _lengths(asked: Asked, shorter: Callable[[float], ClipFacts]) -> Iterator[tuple[str, Asked]]:
    seconds = asked.clip.seconds / 2
    while seconds >= SHORTEST_S:
        yield f"--seconds {int(seconds)}", replace(asked, clip=shorter(int(seconds)))
        seconds /= 2


def clock_time(seconds: int) -> str:
    """90 as "1:30", as --start and --end take it."""
    hours, rest = divmod(seconds, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def device_bytes_of(device: torch.device) -> int:
    """All memory of a CUDA device; 0 for others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
