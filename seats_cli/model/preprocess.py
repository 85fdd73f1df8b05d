"""From pixels and samples to what the encoders read: sizes, resizing, patches, log-mel frames.

All constants that a checkpoint states (means, FFT size, patch size) come in through `PixelStats`, `MelSpec`
and arguments; none is retyped here. The rules of sizes follow qwen-omni-utils 0.0.9, the patches HF's
Qwen2-VL processor, the mel frames HF's WhisperFeatureExtractor; the tests hold each to its source.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from seats_cli.errors import MediaError

MAX_ASPECT = 200  # qwen-omni-utils' limit of long side to short side
TOKENS_PER_FRAME_LIMIT = 768  # qwen-omni-utils' VIDEO_MAX_PIXELS, in units of the squared pixel factor
RESIZE_BYTES = (
    128 * 2**20
)  # of native frames as floats, resized at once: a long 720p clip would take gigabytes
DYNAMIC_RANGE = 8.0  # Whisper: nothing lies further than this below the loudest log10 value of the clip


@dataclass(frozen=True)
class PixelCaps:
    """How many tokens a grid (frame pair) may become; defaults as in the paper's evaluation.

    total_tokens bounds all frames together, each counted as a grid's pixels: n frames share it as
    total_tokens / n * 2 a grid. It gives way to 1.05 * min_tokens on long clips.
    """

    min_tokens: int = 128
    max_tokens: int = 144
    total_tokens: int = 24576


OFFICIAL_CAPS = PixelCaps(128, TOKENS_PER_FRAME_LIMIT, 115200)  # qwen-omni-utils' own: 0.9 * 128000 in all


@dataclass(frozen=True)
class PixelStats:
    """How a checkpoint normalises pixels: (x * rescale - mean) / std per channel; image limits in pixels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    image_min_pixels: int
    image_max_pixels: int


@dataclass(frozen=True)
class MelSpec:
    """A checkpoint's log-mel front end. `bins` mel bins of an `n_fft` STFT every `hop_length` samples."""

    bins: int
    sampling_rate: int
    n_fft: int
    hop_length: int

    def frames(self, n_samples: int) -> int:
        """Mel frames that n samples become (100 a second at 16 kHz)."""
        return -(-n_samples // self.hop_length)

    @property
    def frames_per_s(self) -> float:
        """Mel frames in a second."""
        return self.sampling_rate / self.hop_length


# ---- pixels --------------------------------------------------------------------------------------


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, near the aspect ratio, with an area within the limits.

    Raises MediaError for an empty picture or an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise MediaError(f"the picture is empty: {width}x{height} pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise MediaError(
            f"the picture is {width}x{height}: its aspect ratio is above {MAX_ASPECT}",
            hint="crop the picture first",
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def frame_size(height: int, width: int, n_frames: int, factor: int, caps: PixelCaps) -> tuple[int, int]:
    """The size to which all frames of a clip of n_frames upright height x width frames are resized.

    `factor` is one token's side in pixels (2 * patch: 28 for Qwen2.5-Omni, 32 for Qwen3-Omni).
    """
    area = factor * factor
    min_pixels = caps.min_tokens * area
    share = caps.total_tokens * area / n_frames * 2
    max_pixels = max(min(TOKENS_PER_FRAME_LIMIT * area, share), int(1.05 * min_pixels))
    return smart_resize(height, width, factor, min_pixels, min(max_pixels, caps.max_tokens * area))


def resize_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(T, H, W, 3) uint8 to (T, *size, 3) uint8: bicubic with antialias on float, clamp, round."""
    if tuple(frames.shape[1:3]) == tuple(size):
        return frames
    out = torch.empty((frames.shape[0], *size, 3), dtype=torch.uint8, device=frames.device)
    at_once = max(1, RESIZE_BYTES // (4 * frames[0].numel()))
    for start in range(0, frames.shape[0], at_once):
        chunk = frames[start : start + at_once].permute(0, 3, 1, 2).float()
        chunk = functional.interpolate(chunk, size=size, mode="bicubic", antialias=True, align_corners=False)
        out[start : start + at_once] = chunk.clamp_(0, 255).round_().permute(0, 2, 3, 1)
    return out


def patchify(
    frames: torch.Tensor, stats: PixelStats, *, patch: int, temporal_patch: int, merge: int
) -> torch.Tensor:
    """Normalised patches of resized frames (T, H, W, 3) uint8, in the vision tower's order.

    Returns (t * h * w, 3 * temporal_patch * patch * patch) float32. The order is grid, then blocks of
    merge x merge patches row by row (one block is one token), then the patches of a block. The last frame is
    repeated up to a multiple of temporal_patch, so an image is a grid of two equal frames.
    """
    if short := -frames.shape[0] % temporal_patch:
        frames = torch.cat([frames, frames[-1:].expand(short, -1, -1, -1)])
    n_frames, height, width, channels = frames.shape
    mean, std = (_constants(values, stats.rescale, frames.device) for values in (stats.mean, stats.std))
    t, h, w = n_frames // temporal_patch, height // patch, width // patch
    pixels = frames.view(t, temporal_patch, h // merge, merge, patch, w // merge, merge, patch, channels)
    # moved while they are bytes, then made numbers
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, -1)
    return ((pixels.float() - mean) / std).flatten(1)


@lru_cache(maxsize=16)
def _constants(values: tuple[float, ...], rescale: float, device: torch.device) -> torch.Tensor:
    """Constants of channels in units of bytes, (3, 1): copied to the device once, not in every batch. Waits
    until they are there, for other threads' streams use them too."""
    return (torch.tensor(values) / rescale)[:, None].to(device)


# ---- samples -------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def mel_filters(spec: MelSpec) -> torch.Tensor:
    """(bins, n_fft // 2 + 1) float32, Slaney's filters from 0 to 8 kHz, as WhisperFeatureExtractor's."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=1 + spec.n_fft // 2,
        num_mel_filters=spec.bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=spec.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(np.ascontiguousarray(bank.T)).to(torch.float32)


@lru_cache(maxsize=16)
def _filters(spec: MelSpec, device: torch.device) -> torch.Tensor:
    """`mel_filters`, copied to the device once; waits, as `_constants` does."""
    return mel_filters(spec).to(device)


def _log_mel(samples: torch.Tensor, spec: MelSpec) -> torch.Tensor:
    """log10 mel power (bins, K) of the K frames that lie wholly within `samples`."""
    window = torch.hann_window(spec.n_fft, device=samples.device)
    stft = torch.stft(samples, spec.n_fft, spec.hop_length, window=window, center=False, return_complex=True)
    power = stft.abs().square()
    return (_filters(spec, samples.device) @ power).clamp_(min=1e-10).log10_()


def _log_mel_stream(
    blocks: Iterable[np.ndarray | torch.Tensor], spec: MelSpec, tail: int
) -> Iterator[torch.Tensor]:
    """log10 mel power of a stream of samples as pieces (bins, K), plus `tail` frames past its end.

    Frame i is centred on sample i * hop: the start is reflected, as torch.stft does, and the end is followed
    by zeros, as in HF's feature extractor, which pads every clip to its maximum length.
    """
    half = spec.n_fft // 2
    pending = torch.zeros(0)
    total = emitted = 0
    started = False
    for block in blocks:
        piece = torch.as_tensor(block, dtype=torch.float32)
        total += piece.numel()
        pending = torch.cat([pending.to(piece.device), piece])
        if not started:
            if pending.numel() <= half:
                continue
            pending = torch.cat([pending[1 : half + 1].flip(0), pending])
            started = True
        ready = (pending.numel() - spec.n_fft) // spec.hop_length + 1
        if ready > 0:
            yield _log_mel(pending[: (ready - 1) * spec.hop_length + spec.n_fft], spec)
            pending = pending[ready * spec.hop_length :]
            emitted += ready
    if not total:
        return
    if not started:
        pending = functional.pad(pending, (0, half + 1 - pending.numel()))
        pending = torch.cat([pending[1 : half + 1].flip(0), pending])
    remaining = spec.frames(total) + tail - emitted
    if remaining > 0:
        length = (remaining - 1) * spec.hop_length + spec.n_fft
        padded = functional.pad(pending, (0, max(0, length - pending.numel())))
        yield _log_mel(padded[:length], spec)


def mel_peak(blocks: Iterable[np.ndarray | torch.Tensor], spec: MelSpec) -> torch.Tensor:
    """The loudest log10 mel value of a clip, the first of two passes over its samples; -10 for silence.

    A float32 scalar where the samples are, which is not waited for. Frames past the end count as far as they
    still hear the clip, as they do in HF's padded spectrogram.
    """
    tail = -(-(spec.n_fft // 2) // spec.hop_length)
    loudest = [piece.max() for piece in _log_mel_stream(blocks, spec, tail)]
    return torch.stack(loudest).max() if loudest else torch.tensor(-10.0)


def mel_blocks(
    blocks: Iterable[np.ndarray | torch.Tensor], spec: MelSpec, peak: torch.Tensor, frames_per_block: int
) -> Iterator[torch.Tensor]:
    """The clip's mel frames as (bins, frames_per_block) float32 blocks, the last one shorter.

    Second pass: `peak` comes from `mel_peak` over the same samples. Memory is bounded by one block of samples
    and one of frames; joined, the blocks equal `mel_spectrogram` of the whole clip.
    """
    held: list[torch.Tensor] = []
    n_held = 0
    for piece in _log_mel_stream(blocks, spec, 0):
        held.append((piece.clamp(min=peak - DYNAMIC_RANGE) + 4.0) / 4.0)
        n_held += piece.shape[1]
        if n_held < frames_per_block:
            continue
        joined = torch.cat(held, dim=1)
        whole = n_held - n_held % frames_per_block
        yield from joined[:, :whole].split(frames_per_block, dim=1)
        n_held -= whole
        held = [joined[:, whole:].clone()] if n_held else []
    if n_held:
        yield torch.cat(held, dim=1)


def mel_spectrogram(samples: np.ndarray | torch.Tensor, spec: MelSpec) -> torch.Tensor:
    """(bins, L) float32 of a whole clip (N,) float32 at once, L = `spec.frames(N)`; never truncated."""
    pieces = list(mel_blocks([samples], spec, mel_peak([samples], spec), max(1, spec.frames(len(samples)))))
    return pieces[0] if pieces else torch.zeros(spec.bins, 0)


def audio_token_count(mel_frames: int) -> int:
    """Tokens that L mel frames become in Qwen2.5-Omni: a stride-2 convolution, then pooling by pairs."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


def qwen3_audio_token_count(mel_frames: int) -> int:
    """Tokens that L mel frames become in Qwen3-Omni: 13 a second, the rest by three stride-2 convolutions."""
    rest = (mel_frames % 100 - 1) // 2 + 1
    return ((rest - 1) // 2 + 1 - 1) // 2 + 1 + mel_frames // 100 * 13
