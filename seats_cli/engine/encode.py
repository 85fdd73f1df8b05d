"""A clip becomes what the language model reads: window by window through the encoders and stage I.

Frames and samples stream: each batch of whole stage-I windows is resized, encoded and thinned while another
thread reads the frames of the next, so memory holds a batch, the frames read ahead and the embeddings that
were kept, however long the clip is. Sound is encoded first, while the first frames are being decoded.
A method that chooses over the whole clip at once (scope "clip") gets every embedding, and memory follows; so
does `encode_all`, whose result many questions about one clip can share.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import lcm
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from seats_cli.engine.front import read_ahead
from seats_cli.errors import MediaError
from seats_cli.measure.clock import Stopwatch
from seats_cli.model.adapter import Adapter, Encoded, MediaShape, Prompt
from seats_cli.model.preprocess import mel_blocks, mel_peak, resize_frames
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import Kept, MediaTokens, Method
from seats_cli.selection.plan import Kind, Plan

Item = TypeVar("Item")
OnStage = Callable[[str, int, int], None]
"""Progress: (stage, done, total) in the stage's own units, frames or seconds or layers."""

FRAMES_AT_ONCE = 64  # resized frames through the vision encoder at once, rounded to whole stage-I windows
FRAMES_ON_LARGE_GPU = 128  # likewise where 2 GB more do not matter: fewer, larger products
LARGE_GPU_BYTES = 40e9
AUDIO_S_AT_ONCE = 256.0  # seconds through the audio encoder at once, likewise
SAMPLES_PER_BLOCK = 16000 * 30
READ_AHEAD_BYTES = 256 * 2**20  # decoded frames that wait for the encoder at most


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

    def video_windows(self, frames_per_window: int) -> Iterator[Any]:
        """`FrameWindow`s in time order; the last may be short."""

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]:
        """(n,) float32 mono blocks, the same whenever asked again."""

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""


@dataclass(frozen=True)
class ModelInput:
    """What the first decoder layer is given.

    embeddings: (S, D) in the adapter's dtype on its device, text and kept media in prompt order
    layout:     of these S tokens, on the same device
    kept:       (S,) int64, sorted: where each of them stood in the prompt
    deepstack:  (E, S, D), added to the outputs of the first E layers, zeros where a token has nothing to add;
                None where none has (`Adapter.run_layer`)
    """

    embeddings: torch.Tensor
    layout: TokenLayout
    kept: torch.Tensor
    deepstack: torch.Tensor | None = None


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
    # What lies on the host is sent before the encoders run, or sending it would wait for them.
    text = text_rows(adapter, prompt, image)
    slots = {kind: _slots(prompt.layout, code).to(adapter.device) for kind, code in _CODES.items()}
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


_CODES: dict[Kind, int] = {"video": VIDEO, "audio": AUDIO}


def _slots(layout: TokenLayout, code: int) -> torch.Tensor:
    """Indices of a kind's tokens in the sequence, (n,) int64."""
    return (layout.kind == code).nonzero().squeeze(1)


# ---- the encoders -----------------------------------------------------------------------------------------


def encoder_streams(run: EncoderRun, reading: ExitStack) -> dict[Kind, Iterable[Encoded]]:
    """The kinds that the clip has, each as batches yet to be encoded; frames are read from now on, by a
    thread that `reading` ends."""
    streams: dict[Kind, Iterable[Encoded]] = {}
    if run.shape.n_audio:
        streams["audio"] = audio_stream(run)
    if run.shape.n_video:
        windows = reading.enter_context(
            read_ahead(frame_windows(run), size=torch.Tensor.numel, budget=READ_AHEAD_BYTES)
        )
        streams["video"] = video_stream(run, windows)
    return streams


def frames_at_once(device: torch.device) -> int:
    """Frames in a batch for the vision encoder, by how much memory the device has."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > LARGE_GPU_BYTES:
        return FRAMES_ON_LARGE_GPU
    return FRAMES_AT_ONCE


def grids_per_window(run: EncoderRun) -> int:
    """Grids of a whole stage-I window of video."""
    return max(1, run.windows["video"] // run.shape.tokens_per_grid)


def frame_windows(run: EncoderRun) -> Iterator[torch.Tensor]:
    """The clip's frames, a stage-I window at a time: (T, H, W, 3) uint8 in memory that a GPU copies from by
    itself."""
    on_gpu = run.adapter.device.type == "cuda"
    for window in run.clip.video_windows(grids_per_window(run) * run.adapter.geometry.temporal_patch):
        frames = torch.from_numpy(window.frames)
        yield frames.pin_memory() if on_gpu else frames


def video_stream(run: EncoderRun, windows: Iterator[torch.Tensor]) -> Iterator[Encoded]:
    """Embeddings of the clip's frames in batches of whole stage-I windows (the last may be short)."""
    shape, clock = run.shape, run.clock
    assert shape.video_grid is not None  # there is video
    geometry = run.adapter.geometry
    grids = grids_per_window(run)
    window_frames = grids * geometry.temporal_patch
    at_once = window_frames * max(1, frames_at_once(run.adapter.device) // window_frames)
    size = (shape.video_grid[1] * geometry.patch, shape.video_grid[2] * geometry.patch)
    total = shape.video_grid[0] * geometry.temporal_patch
    batch: list[torch.Tensor] = []
    waiting = done = 0
    for native in timed(windows, clock, "read"):
        with clock.stage("preprocess"):
            # Native frames go at once: the batch holds resized ones only.
            frames = native.to(run.adapter.device, non_blocking=True)
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
    for block in timed(run.clip.audio_blocks(SAMPLES_PER_BLOCK), run.clock, "read"):
        yield torch.from_numpy(block).to(run.adapter.device)


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


# ---- stage I ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What decides which tokens go on to the LLM."""

    method: Method
    plan: Plan
    clock: Stopwatch


@dataclass(frozen=True)
class Entering:
    """What of a kind goes on to the LLM.

    indices:    (K,) int64, sorted, into the clip's tokens of the kind
    embeddings: (K, D)
    deepstack:  (E, K, D), the same tokens' features for the first layers, or None. What a method merges into
                a kept token's embedding leaves its features as they are.
    """

    indices: torch.Tensor
    embeddings: torch.Tensor
    deepstack: torch.Tensor | None

    @classmethod
    def of(cls, kept: Kept, encoded: Encoded, first: int = 0) -> "Entering":
        """What was kept of tokens that `first` others of the clip come before."""
        features = encoded.deepstack
        if features is not None:
            features = features.index_select(1, kept.indices - first)
        return cls(kept.indices, kept.embeddings, features)

    @classmethod
    def join(cls, parts: Sequence["Entering"]) -> "Entering":
        """One after the other; at least one part."""
        features = [part.deepstack for part in parts if part.deepstack is not None]
        return cls(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.embeddings for part in parts]),
            torch.cat(features, dim=1) if features else None,
        )


def choose_by_window(
    choice: Choice,
    streams: dict[Kind, Iterable[Encoded]],
    layout: TokenLayout,
    slots: dict[Kind, torch.Tensor],
) -> dict[Kind, Entering]:
    """Stage I on each batch as it comes; only what is kept stays in memory."""
    entering: dict[Kind, Entering] = {}
    for kind, stream in streams.items():
        parts: list[Entering] = []
        first = 0
        for encoded in stream:
            _check_batch(choice.plan, kind, first, len(encoded))
            with choice.clock.stage("select"):
                tokens = _media_tokens(kind, encoded, first, layout, slots[kind])
                kept = choice.method.before_llm(tokens, choice.plan)
                parts.append(Entering.of(kept, encoded, first))
            first += len(encoded)
        check_count(kind, first, choice.plan.count(kind))
        entering[kind] = Entering.join(parts)
    return entering


def choose_by_clip(
    choice: Choice,
    streams: dict[Kind, Iterable[Encoded]],
    layout: TokenLayout,
    slots: dict[Kind, torch.Tensor],
) -> dict[Kind, Entering]:
    """Stage I on a kind's whole clip at once, the other kind at hand."""
    held: dict[Kind, Encoded] = {}
    whole: dict[Kind, MediaTokens] = {}
    for kind, stream in streams.items():
        parts = list(stream)
        held[kind] = Encoded.join(parts)
        check_count(kind, len(held[kind]), choice.plan.count(kind))
        whole[kind] = _media_tokens(kind, held[kind], 0, layout, slots[kind])
    entering: dict[Kind, Entering] = {}
    for kind, tokens in whole.items():
        other = next((whole[name] for name in whole if name != kind), None)
        both = MediaTokens(kind, tokens.embeddings, tokens.saliency, 0, tokens.layout, other)
        with choice.clock.stage("select"):
            kept = choice.method.before_llm(both, choice.plan)
            entering[kind] = Entering.of(kept, held[kind])
    return entering


def _media_tokens(
    kind: Kind, encoded: Encoded, first: int, layout: TokenLayout, slots: torch.Tensor
) -> MediaTokens:
    n = len(encoded)
    counts = (0, n, 0) if kind == "video" else (0, 0, n)
    rows = layout.subset(slots[first : first + n], counts)
    return MediaTokens(kind, encoded.embeddings, encoded.saliency, first, rows)


def _check_batch(plan: Plan, kind: Kind, first: int, n: int) -> None:
    """All batches but a kind's last consist of whole stage-I windows; none goes past what was announced."""
    short = n % plan.window(kind) and first + n < plan.count(kind)
    if short or first + n > plan.count(kind):
        check_count(kind, first + n, plan.count(kind))


def check_count(kind: str, found: int, expected: int) -> None:
    """The prompt was laid out for so many tokens; a file that changed since would put words out of place."""
    if found != expected:
        raise MediaError(
            f"the {kind} became {found} tokens, not the {expected} announced",
            hint="the file changes while it is read, or is damaged",
        )


# ---- the sequence -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRows:
    """The tokens that no method drops: text, and what an image became.

    slots: (N,) int64, sorted, in the prompt; rows: (N, D); both on the device
    image: (n_image,) int64, which of these rows are the image's, and their deepstack features; or None
    """

    slots: torch.Tensor
    rows: torch.Tensor
    image: tuple[torch.Tensor, torch.Tensor] | None = None


def text_rows(adapter: Adapter, prompt: Prompt, image: Encoded | None) -> TextRows:
    """Embed the prompt's text, and put an image's embeddings into their places."""
    slots = _slots(prompt.layout, TEXT)
    rows = adapter.embed_text(prompt.input_ids[slots])
    if image is None:
        return TextRows(slots.to(rows.device), rows)
    of_image = torch.searchsorted(slots, prompt.image_slots).to(rows.device)
    rows[of_image] = image.embeddings.to(rows)
    features = None if image.deepstack is None else (of_image, image.deepstack)
    return TextRows(slots.to(rows.device), rows, features)


def assemble(
    written: TextRows,
    layout: TokenLayout,
    slots: dict[Kind, torch.Tensor],
    entering: dict[Kind, Entering],
) -> ModelInput:
    """Text, all of it, and the kept media in prompt order. `layout` is the prompt's, on the device."""
    text = written.rows
    places, rows = [written.slots], [text]
    features = [] if written.image is None else [written.image]  # at which of the rows, what
    n_kept = {"video": 0, "audio": 0}
    for kind, chosen in entering.items():
        if chosen.deepstack is not None:
            start = sum(map(len, rows))
            these = torch.arange(start, start + len(chosen.indices), device=text.device)
            features.append((these, chosen.deepstack))
        places.append(slots[kind][chosen.indices])
        rows.append(chosen.embeddings.to(text))
        n_kept[kind] = len(chosen.indices)
    kept_slots, order = torch.cat(places).sort()
    counts = (len(text), n_kept["video"], n_kept["audio"])
    deepstack = None
    if features:
        deepstack = text.new_zeros(len(features[0][1]), len(order), text.shape[1])
        for at, values in features:
            deepstack[:, at] = values.to(text)
        deepstack = deepstack.index_select(1, order)
    return ModelInput(torch.cat(rows)[order], layout.subset(kept_slots, counts), kept_slots, deepstack)
