"""One random clip of every input kind, for transformers' own forward and for ours."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from seats_cli.engine.enter import Entering, ModelInput, assemble, text_rows
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.preprocess import PixelCaps
from seats_cli.model.stock import StockRun
from seats_cli.selection.layout import AUDIO, VIDEO

TINY_CAPS = PixelCaps(min_tokens=4, max_tokens=30, total_tokens=100000)
CLIPS: dict[str, dict[str, Any]] = {
    "video and audio": {"n_frames": 10, "height": 90, "width": 160, "sample_fps": 2.0, "n_samples": 80000},
    "longer audio": {"n_frames": 4, "height": 160, "width": 90, "sample_fps": 2.0, "n_samples": 100001},
    "longer video": {"n_frames": 8, "height": 90, "width": 90, "sample_fps": 1.0, "n_samples": 33333},
    "odd rate": {"n_frames": 10, "height": 90, "width": 160, "sample_fps": 1.967, "n_samples": 90001},
    "silent video": {"n_frames": 6, "height": 120, "width": 100, "sample_fps": 1.9},
    "audio": {"n_samples": 70000},
    "audio of less than a second": {"n_samples": 7000},
    "image": {"image_size": (150, 230)},
    "text": {},
}


def make_inputs(adapter: Adapter, **clip: Any) -> tuple[MediaShape, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shape, frames at the grid's size, mel and image of a random clip; empty for what it lacks."""
    generator = torch.Generator().manual_seed(3)
    shape = adapter.media_shape(caps=TINY_CAPS, **clip)
    patch = adapter.geometry.patch

    def pixels(grid: tuple[int, int, int] | None, frames: int) -> torch.Tensor:
        if not grid:
            return torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
        size = (frames, grid[1] * patch, grid[2] * patch, 3)
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)

    frames = pixels(shape.video_grid, 2 * shape.video_grid[0] if shape.video_grid else 0)
    mel = torch.randn(128, shape.audio_frames, generator=generator)
    return shape, frames, mel, pixels(shape.image_grid, 1)


def embed(
    adapter: Adapter, prompt: Prompt, shape: MediaShape, frames: Any, mel: Any, image: Any
) -> ModelInput:
    """What the first layer is given when everything is kept."""
    kinds: dict[Any, Any] = {}
    if shape.video_grid:
        kinds["video"] = adapter.encode_video(frames, shape.video_grid)
    if shape.n_audio:
        kinds["audio"] = adapter.encode_audio(mel)
    picture = adapter.encode_image(image[0], shape.image_grid) if shape.image_grid else None
    entering = {
        kind: Entering(torch.arange(len(encoded)), encoded.embeddings, encoded.deepstack)
        for kind, encoded in kinds.items()
    }
    slots: dict[Any, Any] = {
        "video": (prompt.layout.kind == VIDEO).nonzero().squeeze(1),
        "audio": (prompt.layout.kind == AUDIO).nonzero().squeeze(1),
    }
    return assemble(text_rows(adapter, prompt, picture), prompt.layout, slots, entering)


def compare_logits(adapter: Adapter, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One clip of `CLIPS`: our logits (1, S, V) with everything kept, those of transformers' own forward, and
    what came out of our last layer."""
    shape, frames, mel, image = make_inputs(adapter, **CLIPS[name])
    prompt = adapter.prompt("what is the said?", shape)
    run = StockRun(
        adapter, prompt, shape,
        frames=frames if shape.n_video else None,
        mel=mel if shape.n_audio else None,
        image=image if shape.n_image else None,
    )  # fmt: skip
    with torch.no_grad():
        stock = adapter.network(**run.inputs).logits
    hidden = through_all_layers(adapter, prompt, embed(adapter, prompt, shape, frames, mel, image))
    return adapter.final_logits(hidden), stock, hidden


def through_all_layers(adapter: Adapter, prompt: Prompt, given: ModelInput) -> torch.Tensor:
    """(1, S, D) out of the last layer, nothing dropped."""
    hidden, rotary = given.embeddings[None], adapter.rotary(prompt.layout.position)
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, rotary, None, given.deepstack)
    return hidden


def encoders_at_once(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most threads, of twelve with pictures to encode, that were in the vision encoder at one time."""
    inside, most, lock, real = [0], [0], threading.Lock(), adapter._encode_patches

    def counted(*args: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        try:
            return real(*args)
        finally:
            with lock:
                inside[0] -= 1

    side = 2 * adapter.geometry.merge
    frames = torch.zeros(
        2, side * adapter.geometry.patch, side * adapter.geometry.patch, 3, dtype=torch.uint8
    )
    monkeypatch.setattr(adapter, "_encode_patches", counted)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: adapter.encode_video(frames, (1, side, side)), range(24)))
    return most[0]
