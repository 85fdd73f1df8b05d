"""Sizes against the golden values, patches and mel frames against transformers' own code."""

import ast
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from seats_cli.errors import MediaError
from seats_cli.model.preprocess import (
    OFFICIAL_CAPS,
    MelSpec,
    PixelCaps,
    PixelStats,
    audio_token_count,
    frame_size,
    mel_blocks,
    mel_peak,
    mel_spectrogram,
    patchify,
    qwen3_audio_token_count,
    resize_frames,
    smart_resize,
)
from tiny_families import QWEN2_5_PREPROCESSOR as PREPROCESSOR

SPEC = MelSpec(bins=128, sampling_rate=16000, n_fft=400, hop_length=160)
STATS = PixelStats(
    tuple(PREPROCESSOR["image_mean"]), tuple(PREPROCESSOR["image_std"]), 1 / 255, 3136, 12845056
)
STATS_3 = PixelStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255, 4096, 16777216)


# ---- sizes and token counts -------------------------------------------------------------------------------


def test_sizes_are_golden(golden_folder: Path) -> None:
    cases = json.loads((golden_folder / "inputs.json").read_text())["sizes"]
    assert cases
    for case in cases:
        caps = OFFICIAL_CAPS
        if "min_tokens" in case:
            caps = PixelCaps(case["min_tokens"], case["max_tokens"], case["total_tokens"])
        factor = 2 * case["patch"]
        arguments = (case["height"], case["width"], case["frames"], factor, caps)
        if case.get("error"):
            with pytest.raises(MediaError, match="aspect ratio"):
                frame_size(*arguments)
            continue
        size = frame_size(*arguments)
        assert list(size) == case["resized"], case
        assert size[0] * size[1] // factor**2 == case["tokens_per_grid"], case


def test_default_caps_are_the_evaluation_ones() -> None:
    assert frame_size(720, 1280, 120, 28, PixelCaps()) == (252, 448)


def test_audio_token_counts_are_golden(golden_folder: Path) -> None:
    cases = json.loads((golden_folder / "inputs.json").read_text())["audio_tokens"]
    assert cases
    for case in cases:
        assert audio_token_count(case["mel_frames"]) == case["qwen2_5"], case
        assert qwen3_audio_token_count(case["mel_frames"]) == case["qwen3"], case
    assert audio_token_count(0) == 0


def test_sizes_at_the_edges() -> None:
    assert smart_resize(1, 1, 28, 28 * 28, 10**6) == (28, 28)
    assert smart_resize(10, 1990, 28, 28 * 28, 10**6)[0] == 28
    with pytest.raises(MediaError, match="empty"):
        smart_resize(0, 10, 28, 784, 10**6)
    for height, width in ((37, 1000), (1000, 37), (999, 1001)):
        size = smart_resize(height, width, 28, 4 * 784, 20 * 784)
        assert size[0] % 28 == size[1] % 28 == 0
    assert smart_resize(999, 1001, 28, 4 * 784, 20 * 784) == (112, 112)


# ---- resizing ---------------------------------------------------------------------------------------------


def cubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in) float64: the antialiased bicubic kernel (a = -0.5) written out."""
    scale = max(1.0, n_in / n_out)
    centres = (np.arange(n_out) + 0.5) * n_in / n_out
    x = np.abs((np.arange(n_in)[None] + 0.5 - centres[:, None]) / scale)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(28, 56), (84, 140), (56, 28)])
def test_resizing_is_antialiased_bicubic(size: tuple[int, int]) -> None:
    frames = torch.randint(
        0, 256, (3, 50, 77, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    ours = resize_frames(frames, size)
    assert ours.shape == (3, *size, 3)
    assert ours.dtype == torch.uint8
    rows, columns = cubic_matrix(50, size[0]), cubic_matrix(77, size[1])
    exact = np.einsum("yh,thwc,xw->tyxc", rows, frames.numpy().astype(np.float64), columns)
    exact = np.clip(exact, 0, 255)
    assert np.abs(ours.numpy() - exact).max() <= 0.51
    assert (ours.numpy() == np.round(exact)).mean() > 0.99


def test_resizing_in_chunks_equals_resizing_at_once() -> None:
    frames = torch.randint(
        0, 256, (19, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    whole = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), size=(56, 84), mode="bicubic", antialias=True, align_corners=False
    )
    expected = whole.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(resize_frames(frames, (56, 84)), expected)


# ---- patches ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_patchify() -> Callable[..., tuple[Any, ...]]:
    """HF's Qwen2VLVideoProcessor.patchify itself, lifted from its source: the module needs torchvision."""
    spec = find_spec("transformers.models.qwen2_vl")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "video_processing_qwen2_vl.py").read_text()
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "patchify"
    ]
    assert len(found) == 1
    scope: dict[str, Callable[..., tuple[Any, ...]]] = {}
    exec(compile(ast.Module(found, []), "patchify", "exec"), {"torch": torch}, scope)
    return scope["patchify"]


@pytest.mark.parametrize(("patch", "stats"), [(14, STATS), (16, STATS_3)], ids=["Qwen2.5", "Qwen3"])
@pytest.mark.parametrize("n_frames", [1, 2, 5, 6])
def test_patches_equal_transformers(
    n_frames: int, patch: int, stats: PixelStats, hf_patchify: Callable[..., tuple[Any, ...]]
) -> None:
    generator = torch.Generator().manual_seed(n_frames)
    frames = torch.randint(
        0, 256, (n_frames, 4 * patch, 6 * patch, 3), dtype=torch.uint8, generator=generator
    )
    ours = patchify(frames, stats, patch=patch, temporal_patch=2, merge=2)
    mean, std = torch.tensor(stats.mean), torch.tensor(stats.std)
    pixels = ((frames / 255 - mean) / std).permute(0, 3, 1, 2)[None]
    expected, *grid = hf_patchify(None, pixels, patch, 2, 2)
    assert grid == [-(-n_frames // 2), 4, 6]
    torch.testing.assert_close(ours, expected.view(len(ours), -1), atol=1e-5, rtol=0)


# ---- mel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    fields = ("feature_size", "sampling_rate", "hop_length", "n_fft", "padding_value", "dither")
    # Shorter than the checkpoint's 300 s, which only sets how many zeros HF appends.
    return WhisperFeatureExtractor(chunk_length=12, **{name: PREPROCESSOR[name] for name in fields})


def sound(n_samples: int) -> np.ndarray:
    """Silence, noise, and at the very end a click: the peak, which sets what silence becomes."""
    rng = np.random.default_rng(n_samples)
    wave = 0.001 * rng.standard_normal(n_samples)
    wave += 0.001 * np.sin(np.arange(n_samples) * 0.05) * (rng.random(n_samples) < 0.5)
    wave[: n_samples // 3] = 0.0
    wave[-3:] = 0.9
    return wave.astype(np.float32)


LENGTHS = [1, 150, 160, 161, 201, 3999, 16000, 16001, 50000, 100123]


@pytest.mark.parametrize("n_samples", LENGTHS)
def test_mel_equals_transformers(n_samples: int, extractor: WhisperFeatureExtractor) -> None:
    wave = sound(n_samples)
    theirs = extractor(
        wave, sampling_rate=16000, return_attention_mask=True, padding="max_length", return_tensors="pt"
    )
    length = int(theirs["attention_mask"].sum())
    ours = mel_spectrogram(wave, SPEC)
    assert ours.shape == (128, length) == (128, SPEC.frames(n_samples))
    torch.testing.assert_close(ours, theirs["input_features"][0][:, :length], atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples_per_block", [1, 100, 159, 4000, 7919, 10**6])
@pytest.mark.parametrize("frames_per_block", [200, 7])
def test_mel_in_blocks_equals_mel_at_once(samples_per_block: int, frames_per_block: int) -> None:
    wave = sound(2000 if samples_per_block < 100 else 50123)
    pieces = [wave[i : i + samples_per_block] for i in range(0, len(wave), samples_per_block)]
    peak = mel_peak(pieces, SPEC)
    blocks = list(mel_blocks(pieces, SPEC, peak, frames_per_block))
    assert [b.shape[1] for b in blocks[:-1]] == [frames_per_block] * (len(blocks) - 1)
    torch.testing.assert_close(torch.cat(blocks, dim=1), mel_spectrogram(wave, SPEC), atol=1e-5, rtol=0)


def test_mel_is_bounded_by_its_peak_however_long() -> None:
    """400 s, past Whisper's 300 s limit: nothing is cut off, and only one block is alive at a time."""
    one = sound(16000)
    peak = mel_peak((one for _ in range(400)), SPEC)
    total, largest = 0, 0
    for block in mel_blocks((one for _ in range(400)), SPEC, peak, 200):
        total += block.shape[1]
        largest = max(largest, block.untyped_storage().nbytes())
        assert block.min() >= (peak - 8 + 4) / 4 - 1e-5
    assert total == 40000
    assert largest < 4 * 128 * 200 * 4


def test_silence_and_nothing() -> None:
    assert mel_peak([], SPEC) == -10.0
    assert mel_spectrogram(np.zeros(0, np.float32), SPEC).shape == (128, 0)
    assert list(mel_blocks([], SPEC, torch.tensor(0.0), 200)) == []
    silent = mel_spectrogram(np.zeros(1600, np.float32), SPEC)
    assert torch.equal(silent, torch.full((128, 10), -1.5))
