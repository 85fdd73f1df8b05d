"""From pixels and samples to logits: equal to the stock network, in whatever pieces the clip comes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from masked_reference import scripted_plan
from seats_cli.engine import encode as encode_module
from seats_cli.engine.encode import encode
from seats_cli.engine.enter import ModelInput
from seats_cli.engine.prefill import prefill
from seats_cli.errors import MediaError
from seats_cli.measure.clock import Stopwatch
from seats_cli.model.adapter import Adapter, MediaShape, Prompt
from seats_cli.model.preprocess import PixelCaps, mel_spectrogram, patchify, resize_frames
from seats_cli.selection.methods import Kept, MediaTokens, Method, find_method
from seats_cli.selection.plan import Plan

CAPS = PixelCaps(min_tokens=4, max_tokens=6, total_tokens=24576)
QUESTION = "what is said?"


@dataclass
class Arrays:
    """A clip in memory: frames (T, H, W, 3) uint8, samples (n,) float32, or a picture."""

    frames: np.ndarray | None = None
    samples: np.ndarray | None = None
    picture: np.ndarray | None = None
    fps: float = 2.0
    pulled: int = 0

    @property
    def n_samples(self) -> int:
        return 0 if self.samples is None else len(self.samples)

    @property
    def frame_bytes(self) -> int:
        return 0 if self.frames is None else self.frames[0].nbytes

    def video_windows(self, frames_per_window: int) -> Iterator[Any]:
        assert self.frames is not None
        for start in range(0, len(self.frames), frames_per_window):
            self.pulled += 1
            yield SimpleNamespace(frames=self.frames[start : start + frames_per_window])

    def audio_blocks(self, samples_per_block: int) -> Iterator[np.ndarray]:
        assert self.samples is not None
        for start in range(0, len(self.samples), samples_per_block):
            yield self.samples[start : start + samples_per_block]

    def image(self) -> np.ndarray:
        assert self.picture is not None
        return self.picture


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _sound(seconds: float) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)


CLIPS = {
    "video and audio": Arrays(_pixels(14, 60, 80), _sound(7.3)),
    "audio longer than video": Arrays(_pixels(4, 60, 80), _sound(6.5)),
    "video longer than audio": Arrays(_pixels(14, 60, 80), _sound(2.1)),
    "silent video": Arrays(_pixels(10, 90, 60)),
    "audio only": Arrays(samples=_sound(5.37)),
    "image": Arrays(picture=_pixels(70, 90)),
    "text only": Arrays(),
}


class KeepAll(Method):
    """Nothing leaves."""

    name = "keep all"

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        n = len(tokens.embeddings)
        return Kept(torch.arange(n) + tokens.first_token, tokens.embeddings)


class KeepSome(Method):
    """About a third of the tokens, the same ones however the stream is cut."""

    name = "keep some"

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        index = torch.arange(len(tokens.embeddings)) + tokens.first_token
        chosen = (index * 7919) % 3 == 0
        return Kept(index[chosen], tokens.embeddings[chosen])


@pytest.fixture(scope="module")
def tiny_adapter(family_adapter: Adapter) -> Adapter:
    """What reads and cuts a clip is the same for every family, and so are its tests."""
    return family_adapter


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _prepare(adapter: Adapter, clip: Arrays) -> tuple[MediaShape, Prompt, Plan]:
    if clip.picture is not None:
        shape = adapter.media_shape(image_size=clip.picture.shape[:2])
    else:
        frames = clip.frames if clip.frames is not None else np.zeros((0, 0, 0, 3), np.uint8)
        shape = adapter.media_shape(
            n_frames=len(frames),
            height=frames.shape[1],
            width=frames.shape[2],
            sample_fps=clip.fps,
            n_samples=clip.n_samples,
            caps=CAPS,
        )
    prompt = adapter.prompt(QUESTION, shape)
    plan = scripted_plan(adapter.n_layers, prompt.layout, (), "layerwise")
    window = round(2 * adapter.geometry.audio_tokens_per_s)
    return shape, prompt, replace(plan, video_window=2 * max(1, shape.tokens_per_grid), audio_window=window)


def _two_seconds(adapter: Adapter) -> int:
    """Positions of the audio encoder."""
    block = adapter.audio_block
    return 200 * block.positions // block.frames


def _encode(adapter: Adapter, clip: Arrays, method: Method, **kwargs: Any) -> ModelInput:
    shape, prompt, plan = _prepare(adapter, clip)
    kwargs.setdefault("saliency_positions", _two_seconds(adapter))
    return encode(adapter, method, plan, clip, prompt, shape, **kwargs)


def _stock_logits(adapter: Adapter, clip: Arrays) -> torch.Tensor:
    """The stock model's own forward, from pixels and mel to logits, with its own positions."""
    shape, prompt, _ = _prepare(adapter, clip)
    geometry = adapter.geometry
    inputs: dict[str, Any] = {}

    def pixels(frames: np.ndarray, grid: tuple[int, int, int]) -> torch.Tensor:
        size = (grid[1] * geometry.patch, grid[2] * geometry.patch)
        resized = resize_frames(torch.from_numpy(frames), size)
        return patchify(
            resized, adapter.pixel_stats, patch=geometry.patch, temporal_patch=2, merge=geometry.merge
        )

    if clip.frames is not None and shape.video_grid is not None:
        inputs["pixel_values_videos"] = pixels(clip.frames, shape.video_grid)
        inputs["video_grid_thw"] = torch.tensor([shape.video_grid])
        inputs["video_second_per_grid"] = torch.tensor([shape.seconds_per_grid])
    if clip.picture is not None and shape.image_grid is not None:
        inputs["pixel_values"] = pixels(clip.picture[None], shape.image_grid)
        inputs["image_grid_thw"] = torch.tensor([shape.image_grid])
    if clip.samples is not None:
        mel = mel_spectrogram(clip.samples, adapter.mel_spec)
        inputs["input_features"] = mel[None]
        inputs["feature_attention_mask"] = torch.ones(1, mel.shape[1], dtype=torch.long)
    thinker = adapter._model  # type: ignore[attr-defined]  # the reference needs the stock module itself
    output = thinker(
        input_ids=prompt.input_ids[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        use_audio_in_video=clip.frames is not None and clip.samples is not None,
        use_cache=False,
        **inputs,
    )
    return output.logits[0, -1]


@pytest.mark.parametrize("name", CLIPS)
def test_full_tokens_equal_the_stock_model(tiny_adapter: Adapter, name: str) -> None:
    clip = CLIPS[name]
    given = _encode(tiny_adapter, clip, KeepAll())
    _, prompt, plan = _prepare(tiny_adapter, clip)
    result = prefill(tiny_adapter, KeepAll(), plan, given.embeddings, given.layout, deepstack=given.deepstack)
    expected = _stock_logits(tiny_adapter, clip)
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(given.kept, torch.arange(len(prompt)))


@pytest.mark.parametrize("name", [name for name in CLIPS if name not in ("image", "text only")])
def test_stage_one_equals_the_stock_model_over_the_kept_tokens(tiny_adapter: Adapter, name: str) -> None:
    clip = CLIPS[name]
    whole = _encode(tiny_adapter, clip, KeepAll())
    some = _encode(tiny_adapter, clip, KeepSome())
    _, prompt, plan = _prepare(tiny_adapter, clip)
    kept = some.kept
    assert prompt.layout.n_text < len(kept) < len(prompt)
    torch.testing.assert_close(some.embeddings, whole.embeddings[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(some.layout.position, prompt.layout.position[:, kept])
    assert torch.equal(some.layout.kind, prompt.layout.kind[kept])
    assert some.layout.counts == tuple(torch.bincount(some.layout.kind.long(), minlength=3).tolist())
    assert some.layout.n_text == prompt.layout.n_text  # text is never dropped

    thinker = tiny_adapter._model  # type: ignore[attr-defined]
    features: dict[str, Any] = {}
    if whole.deepstack is not None:
        seen = prompt.layout.kind[kept] == 1
        features = {
            "visual_pos_masks": seen[None],
            "deepstack_visual_embeds": whole.deepstack[:, kept][:, seen],
        }
    out = thinker.model.language_model(
        inputs_embeds=whole.embeddings[kept][None],
        position_ids=prompt.layout.position[:, None, kept],
        use_cache=False,
        **features,
    )
    expected = thinker.lm_head(out.last_hidden_state)[0, -1]
    result = prefill(tiny_adapter, KeepSome(), plan, some.embeddings, some.layout, deepstack=some.deepstack)
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
    full = prefill(tiny_adapter, KeepAll(), plan, whole.embeddings, whole.layout, deepstack=whole.deepstack)
    assert (result.logits - full.logits).abs().max() > 1e-2


@pytest.mark.parametrize("method", [KeepAll(), KeepSome()])
def test_how_the_clip_is_cut_changes_nothing(
    tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    clip = CLIPS["video and audio"]
    at_once = _encode(tiny_adapter, clip, method)
    monkeypatch.setattr(encode_module, "FRAMES_AT_ONCE", 4)
    monkeypatch.setattr(encode_module, "AUDIO_S_AT_ONCE", 2.0)
    monkeypatch.setattr(encode_module, "SAMPLES_PER_BLOCK", 777)
    pieces = _encode(tiny_adapter, clip, method)
    torch.testing.assert_close(pieces.embeddings, at_once.embeddings, atol=1e-5, rtol=1e-5)
    assert torch.equal(pieces.kept, at_once.kept)
    assert (pieces.deepstack is None) == (not tiny_adapter.geometry.deepstack_layers)
    if pieces.deepstack is not None:
        torch.testing.assert_close(pieces.deepstack, at_once.deepstack, atol=1e-5, rtol=1e-5)


def test_batches_are_whole_windows_and_carry_saliency_and_layout(
    tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = CLIPS["video and audio"]
    seen: list[MediaTokens] = []

    class Listening(KeepAll):
        def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
            seen.append(tokens)
            return super().before_llm(tokens, plan)

    monkeypatch.setattr(encode_module, "FRAMES_AT_ONCE", 8)
    monkeypatch.setattr(encode_module, "AUDIO_S_AT_ONCE", 4.0)
    shape, prompt, plan = _prepare(tiny_adapter, clip)
    encode(
        tiny_adapter, Listening(), replace(plan, needs_saliency=True), clip, prompt, shape,
        saliency_positions=_two_seconds(tiny_adapter),
    )  # fmt: skip
    for kind, window, total, code in (
        ("video", plan.video_window, shape.n_video, 1),
        ("audio", plan.audio_window, shape.n_audio, 2),
    ):
        mine = [tokens for tokens in seen if tokens.kind == kind]
        assert len(mine) > 1
        sizes = [len(tokens.embeddings) for tokens in mine]
        assert sum(sizes) == total
        assert all(size % window == 0 for size in sizes[:-1])
        assert [tokens.first_token for tokens in mine] == [sum(sizes[:i]) for i in range(len(sizes))]
        slots = (prompt.layout.kind == code).nonzero().squeeze(1)
        for tokens in mine:
            rows = slots[tokens.first_token : tokens.first_token + len(tokens.embeddings)]
            assert tokens.layout is not None
            assert tokens.saliency is not None
            assert torch.equal(tokens.layout.position, prompt.layout.position[:, rows])
            assert tokens.layout.counts[code] == len(tokens.saliency) == len(rows)
    seen.clear()
    encode(tiny_adapter, Listening(), plan, clip, prompt, shape)
    assert all(tokens.saliency is None for tokens in seen)  # not asked for


def test_frames_are_read_as_they_are_needed(tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Arrays(_pixels(24, 60, 80))
    monkeypatch.setattr(encode_module, "FRAMES_AT_ONCE", 4)
    monkeypatch.setattr(encode_module, "PIECE_BYTES", 4 * clip.frame_bytes)
    monkeypatch.setattr(encode_module, "READ_AHEAD_BYTES", 1)  # one piece waits, and one is being read
    pulled: list[int] = []

    class Watching(KeepAll):
        def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
            pulled.append(clip.pulled)
            return super().before_llm(tokens, plan)

    _encode(tiny_adapter, clip, Watching())
    assert len(pulled) == 6
    assert all(done <= count <= done + 2 for done, count in enumerate(pulled, start=1)), pulled


def test_a_method_over_the_clip_sees_all_of_both_kinds(
    tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = CLIPS["video and audio"]
    monkeypatch.setattr(encode_module, "FRAMES_AT_ONCE", 4)
    seen: dict[str, MediaTokens] = {}

    class Whole(KeepSome):
        scope = "clip"

        def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
            seen[tokens.kind] = tokens
            return super().before_llm(tokens, plan)

    by_clip = _encode(tiny_adapter, clip, Whole())
    by_window = _encode(tiny_adapter, clip, KeepSome())
    torch.testing.assert_close(by_clip.embeddings, by_window.embeddings, atol=1e-5, rtol=1e-5)
    assert torch.equal(by_clip.kept, by_window.kept)
    assert set(seen) == {"video", "audio"}
    assert seen["video"].other is not None
    assert torch.equal(seen["video"].other.embeddings, seen["audio"].embeddings)
    assert seen["video"].first_token == 0


def test_what_a_method_changes_reaches_the_model(tiny_adapter: Adapter) -> None:
    class Merging(KeepSome):
        def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
            kept = super().before_llm(tokens, plan)
            return Kept(kept.indices, kept.embeddings + 1.0)

    clip = CLIPS["video and audio"]
    plain, merged = (_encode(tiny_adapter, clip, method) for method in (KeepSome(), Merging()))
    media = plain.layout.kind != 0
    torch.testing.assert_close(merged.embeddings[media], plain.embeddings[media] + 1.0)
    assert torch.equal(merged.embeddings[~media], plain.embeddings[~media])


def test_a_file_that_gives_less_than_announced_is_a_media_error(tiny_adapter: Adapter) -> None:
    clip = CLIPS["video and audio"]
    shape, prompt, plan = _prepare(tiny_adapter, clip)
    assert clip.frames is not None
    assert clip.samples is not None
    shorter = (Arrays(clip.frames[:6], clip.samples), Arrays(clip.frames, clip.samples[:16000]))
    for less in shorter:
        for method in (KeepAll(), find_method("seats")):
            with pytest.raises(MediaError, match="announced"):
                encode(tiny_adapter, method, plan, less, prompt, shape)


def test_stages_are_timed_and_progress_reaches_its_end(tiny_adapter: Adapter) -> None:
    clock, told = Stopwatch(), []
    _encode(
        tiny_adapter,
        CLIPS["video and audio"],
        KeepAll(),
        clock=clock,
        on_stage=lambda *step: told.append(step),
    )
    assert set(clock.seconds) == {"read", "preprocess", "encode_video", "encode_audio", "select"}
    assert all(seconds > 0 for seconds in clock.seconds.values())
    last = {name: (done, total) for name, done, total in told}
    assert last == {"read": (14, 14), "encode_video": (14, 14), "encode_audio": (7, 7)}


def test_little_sound_is_on_its_way_however_long_the_clip(monkeypatch: Any) -> None:
    """What a GPU has not copied yet stays in pinned memory."""
    done, waited = [], []

    def blocks(size: int) -> Iterator[np.ndarray]:
        for number in range(20):
            done.append(number)
            yield np.zeros(size, np.float32)

    run: Any = SimpleNamespace(
        clip=SimpleNamespace(audio_blocks=blocks),
        clock=Stopwatch(),
        adapter=SimpleNamespace(device=torch.device("cpu")),
    )
    monkeypatch.setattr(encode_module, "idle_until_done", lambda _: waited.append(len(done)))
    assert len(list(encode_module._samples(run))) == 20
    assert waited == [encode_module.BLOCKS_ON_THE_WAY, 2 * encode_module.BLOCKS_ON_THE_WAY]
