"""A clip becomes what the language model reads: window by window through the encoders and stage I.

Frames and samples stream: each batch of whole stage-I windows is resized, encoded and thinned while another
thread reads the frames of the next, so memory holds a batch, the frames read ahead and the embeddings that
were kept, however long the clip is. Sound is encoded first, while the first frames are being decoded.
A method that chooses over the whole clip at once (scope "clip") gets every embedding, and memory follows; so
does `encode_all`, whose result many questions about one clip can share.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import lcm
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from seats_cli.engine.enter import (
    CODES,
    Choice,
    ModelInput,
    assemble,
    check_count,
    choose_by_clip,
    choose_by_window,
    slots_of,
    text_rows,
)
from seats_cli.engine.front import read_ahead
from seats_cli.errors import MediaError
from seats_cli.measure.clock import Stopwatch, idle_until_done
from seats_cli.model.adapter import Adapter, Encoded, MediaShape, Prompt
from seats_cli.model.preprocess import mel_blocks, mel_peak, resize_frames
from seats_cli.selection.methods import Method
from seats_cli.selection.plan import Kind, Plan
from seats_cli.selection.transfer import on_device

Item = TypeVar("Item")
OnStage = Callable[[str, int, int], None]
"""Progress: (stage, done, total) in the stage's own units, frames or seconds or layers."""

FRAMES_AT_ONCE = 64  # resized frames through the vision encoder at once, rounded to whole stage-I windows
FRAMES_ON_LARGE_GPU = 128  # likewise where 2 GB more do not matter: fewer, larger products
LARGE_GPU_BYTES = 40e9
AUDIO_S_AT_ONCE = 256.0  # seconds through the audio encoder at once, likewise
SAMPLES_PER_BLOCK = 16000 * 30
BLOCKS_ON_THE_WAY = 8  # of samples, sent to a GPU without waiting
READ_AHEAD_BYTES = 256 * 2**20  # decoded frames that wait for the encoder at most
PIECE_BYTES = 16 * 2**20  # decoded frames handed over at once, each time at the cost of some launches


class FrameWindow(Protocol):
    """Consecutive sampled frames."""

    @property
    def frames(self) -> np.ndarray | None:
        """(T, H, W, 3) uint8, upright, at native size."""


class MediaSource(Protocol):
    """What encoding asks of an opened file; `media.Clip` is one, and so is a test's array."""

    @property
    def n_samples(self) -> int:
        """16 kHz samples in all."""

    @property
    def frame_bytes(self) -> int:
        """Of one frame at native size; 0 without video."""

    def video_windows(self, frames_per_window: int) -> Iterator[Any]:
        """`FrameWindow`s in time order; the last may be short."""

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]:
        """(n,) float32 mono blocks, the same whenever asked again."""

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""


@dataclass(frozen=True)
class EncodedMedia:
    """All that the encoders made of one clip, before anything is chosen: any number of questions can use it.

    video, audio: every token of the kind with its saliency; None for an absent kind
    image:        every token of the picture, or None
    """

    video: Encoded | None
    audio: Encoded | None
    image: Encoded | None


@dataclass(frozen=True)
class EncoderRun:
    """What the encoders need to know of one clip.

    windows:            tokens in a whole stage-I window of each kind, at whose ends batches are cut
    saliency:           whether it is asked for
    saliency_positions: length of an audio saliency window in encoder positions (the preset's)
    """

    adapter: Adapter
    clip: MediaSource
    shape: MediaShape
    windows: Mapping[Kind, int]
    saliency: bool
    saliency_positions: int
    clock: Stopwatch
    on_stage: OnStage


def encode(
    adapter: Adapter,
    method: Method,
    plan: Plan,
    clip: MediaSource | EncodedMedia,
    prompt: Prompt,
    shape: MediaShape,
    *,
    clock: Stopwatch | None = None,
    on_stage: OnStage | None = None,
    saliency_positions: int = 100,
) -> ModelInput:
    """Encode what `shape` says of the clip, choose by `method`, and put it into the prompt's places.

    A clip that was encoded already is only chosen from. `saliency_positions`: length of an audio saliency
    window in encoder positions (the preset's). Raises MediaError where the file gives less than it promised,
    PlanError for a plan that the family cannot follow (`Adapter.check_cuts`).
    """
    adapter.check_cuts(plan.cut_layers)
    clock, run = clock or Stopwatch(adapter.device), None
    streams: dict[Kind, Iterable[Encoded]] = {}
    if isinstance(clip, EncodedMedia):
        held: dict[Kind, Encoded | None] = {"video": clip.video, "audio": clip.audio}
        streams = {kind: [all_of_it] for kind, all_of_it in held.items() if all_of_it is not None}
        image = clip.image
    else:
        windows: dict[Kind, int] = {"video": plan.video_window, "audio": plan.audio_window}
        told = on_stage or (lambda *_: None)
        run = EncoderRun(adapter, clip, shape, windows, plan.needs_saliency, saliency_positions, clock, told)
        image = encode_image(run) if shape.n_image else None
    layout = prompt.layout.to(adapter.device)
    text = text_rows(adapter, prompt, image)
    slots = {kind: on_device(slots_of(prompt.layout, code), adapter.device) for kind, code in CODES.items()}
    choose = choose_by_clip if method.scope == "clip" else choose_by_window
    with ExitStack() as reading:
        if run is not None:
            streams = encoder_streams(run, reading)
        entering = choose(Choice(method, plan, clock), streams, layout, slots)
    return assemble(text, layout, slots, entering)


def encode_all(
    adapter: Adapter,
    clip: MediaSource,
    shape: MediaShape,
    *,
    windows: Mapping[Kind, int],
    saliency_positions: int,
    clock: Stopwatch | None = None,
    on_stage: OnStage | None = None,
) -> EncodedMedia:
    """Encode what `shape` says of the clip, saliency included, and choose nothing.

    `windows`: tokens in a whole stage-I window of each kind, as the plans of the questions to come will have
    it. Raises MediaError where the file gives less than it promised.
    """
    clock, told = clock or Stopwatch(adapter.device), on_stage or (lambda *_: None)
    run = EncoderRun(adapter, clip, shape, windows, True, saliency_positions, clock, told)
    with ExitStack() as reading:
        streams = encoder_streams(run, reading)
        joined = {kind: Encoded.join(list(stream)) for kind, stream in streams.items()}
    for kind, expected in (("video", shape.n_video), ("audio", shape.n_audio)):
        if kind in joined:
            check_count(kind, len(joined[kind]), expected)
    image = encode_image(run) if shape.n_image else None
    return EncodedMedia(joined.get("video"), joined.get("audio"), image)


# ---- the encoders -----------------------------------------------------------------------------------------


def encoder_streams(run: EncoderRun, reading: ExitStack) -> dict[Kind, Iterable[Encoded]]:
    """The kinds that the clip has, each as batches yet to be encoded; frames are read from now on, by a
    thread that `reading` ends."""
    streams: dict[Kind, Iterable[Encoded]] = {}
    if run.shape.n_audio:
        streams["audio"] = audio_stream(run)
    if run.shape.n_video:
        pieces = reading.enter_context(
            read_ahead(frame_pieces(run), size=torch.Tensor.numel, budget=READ_AHEAD_BYTES)
        )
        streams["video"] = video_stream(run, pieces)
    return streams


def frames_at_once(device: torch.device) -> int:
    """Frames in a batch for the vision encoder, by how much memory the device has."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > LARGE_GPU_BYTES:
        return FRAMES_ON_LARGE_GPU
    return FRAMES_AT_ONCE


def grids_per_window(run: EncoderRun) -> int:
    """Grids of a whole stage-I window of video."""
    return max(1, run.windows["video"] // run.shape.tokens_per_grid)


def windows_at_once(device: torch.device, window_frames: int) -> int:
    """Whole stage-I windows in a batch for the vision encoder."""
    return max(1, frames_at_once(device) // window_frames)


def windows_in_piece(at_once: int, window_bytes: int) -> int:
    """Stage-I windows of native frames that are handed over together: as many as `PIECE_BYTES` holds, at
    least one, such that a batch of `at_once` windows consists of whole pieces."""
    most = max(1, min(at_once, PIECE_BYTES // max(1, window_bytes)))
    return next(n for n in range(most, 0, -1) if at_once % n == 0)


def frame_pieces(run: EncoderRun) -> Iterator[torch.Tensor]:
    """The clip's frames, some stage-I windows at a time: (T, H, W, 3) uint8 in memory that a GPU copies from
    by itself."""
    device = run.adapter.device
    window = grids_per_window(run) * run.adapter.geometry.temporal_patch
    together = windows_in_piece(windows_at_once(device, window), window * run.clip.frame_bytes)
    for piece in run.clip.video_windows(together * window):
        frames = torch.from_numpy(piece.frames)
        yield frames.pin_memory() if device.type == "cuda" else frames


def video_stream(run: EncoderRun, pieces: Iterator[torch.Tensor]) -> Iterator[Encoded]:
    """Embeddings of the clip's frames in batches of whole stage-I windows (the last may be short)."""
    shape, clock = run.shape, run.clock
    assert shape.video_grid is not None  # there is video
    geometry = run.adapter.geometry
    grids = grids_per_window(run)
    window_frames = grids * geometry.temporal_patch
    at_once = window_frames * windows_at_once(run.adapter.device, window_frames)
    size = (shape.video_grid[1] * geometry.patch, shape.video_grid[2] * geometry.patch)
    total = shape.video_grid[0] * geometry.temporal_patch
    batch: list[torch.Tensor] = []
    waiting = done = 0
    for native in timed(pieces, clock, "read"):
        with clock.stage("preprocess"):
            # Native frames go at once: the batch holds resized ones only.
            frames = on_device(native, run.adapter.device)
            batch.append(resize_frames(frames, size))
        waiting += len(frames)
        run.on_stage("read", done + waiting, total)
        if waiting >= at_once or done + waiting >= total:
            with clock.stage("encode_video"):
                encoded = run.adapter.encode_video(
                    torch.cat(batch), shape.video_grid, window=grids, saliency=run.saliency
                )
            done, waiting, batch = done + waiting, 0, []
            run.on_stage("encode_video", done, total)
            yield encoded
    if done != total:
        raise MediaError(f"only {done} of the {total} frames announced could be read")


def audio_stream(run: EncoderRun) -> Iterator[Encoded]:
    """Embeddings of the clip's sound in batches of whole encoder blocks and whole stage-I windows.

    Two passes over the samples: the loudest log-mel value sets the scale of all of them.
    """
    adapter, clock, spec = run.adapter, run.clock, run.adapter.mel_spec
    tokens_per_s = adapter.geometry.audio_tokens_per_s
    # A batch must end where blocks, stage-I windows and saliency windows all end.
    block, positions = adapter.audio_block, run.saliency_positions
    whole_windows = lcm(run.windows["audio"], block.tokens) // block.tokens
    unit = block.frames * lcm(whole_windows, lcm(positions, block.positions) // block.positions)
    at_once = unit * max(1, round(AUDIO_S_AT_ONCE * spec.frames_per_s) // unit)
    with clock.stage("preprocess"):
        peak = mel_peak(_samples(run), spec)
    done = frames = 0
    for mel in timed(mel_blocks(_samples(run), spec, peak, at_once), clock, "preprocess"):
        with clock.stage("encode_audio"):
            encoded = adapter.encode_audio(mel, window=positions, saliency=run.saliency, start=frames)
        done, frames = done + len(encoded), frames + mel.shape[1]
        run.on_stage("encode_audio", round(done / tokens_per_s), round(run.shape.n_audio / tokens_per_s))
        yield encoded


def _samples(run: EncoderRun) -> Iterator[torch.Tensor]:
    """The clip's samples from the start: blocks (n,) float32 on the device."""
    blocks = timed(run.clip.audio_blocks(SAMPLES_PER_BLOCK), run.clock, "read")
    for number, block in enumerate(blocks, 1):
        yield on_device(torch.from_numpy(block), run.adapter.device)
        if number % BLOCKS_ON_THE_WAY == 0:  # bounds what lies in pinned memory, however long the clip
            idle_until_done(run.adapter.device)


def encode_image(run: EncoderRun) -> Encoded:
    """Embeddings of the clip's picture."""
    assert run.shape.image_grid is not None  # there is an image
    with run.clock.stage("read"):
        pixels = torch.from_numpy(run.clip.image())
    with run.clock.stage("encode_video"):
        embeddings = run.adapter.encode_image(pixels, run.shape.image_grid)
    run.on_stage("encode_video", 1, 1)
    return embeddings


def timed(items: Iterable[Item], clock: Stopwatch, stage: str) -> Iterator[Item]:
    """The same items, the time that each takes to come charged to `stage`."""
    iterator = iter(items)
    while True:
        with clock.stage(stage):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
