"""The network, run part by part, against transformers' own forward on the same tiny checkpoint in float32."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from omni_inputs import CLIPS, compare_logits, embed, encoders_at_once, make_inputs
from seats_cli.model import omni
from seats_cli.model.adapter import Adapter, Encoded
from seats_cli.model.load import load_model
from seats_cli.model.preprocess import patchify
from seats_cli.model.saliency import attention_received


@pytest.fixture(scope="module")
def reference(family_path: Path) -> Adapter:
    """transformers' modules, part by part; test_fused.py holds the fast paths to these."""
    return load_model(str(family_path), device="cpu", dtype="float32", fuse=False)


@pytest.mark.parametrize("name", CLIPS)
def test_logits_equal_transformers(name: str, reference: Adapter) -> None:
    """`conformance_matrix.py` prints the errors."""
    ours, stock, hidden = compare_logits(reference, name)
    assert stock.abs().max() > 1.0, "logits too small for this comparison to mean anything"
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)
    last = reference.final_logits(hidden, last_only=True)
    assert last.shape == (1, 1, reference.geometry.vocab)
    torch.testing.assert_close(last, stock[:, -1:], atol=1e-4, rtol=0)


def test_cached_steps_equal_a_full_pass(family_adapter: Adapter) -> None:
    prompt = family_adapter.prompt(
        "You are a helpful system user", family_adapter.media_shape(n_samples=40000)
    )
    embeddings = family_adapter.embed_text(prompt.input_ids)[None]
    position = prompt.layout.position

    def run(part: slice, cache: DynamicCache | None) -> torch.Tensor:
        hidden, rotary = embeddings[:, part], family_adapter.rotary(position[:, part])
        for index in range(family_adapter.n_layers):
            hidden = family_adapter.run_layer(index, hidden, rotary, cache)
        return family_adapter.final_logits(hidden)

    whole = run(slice(None), None)
    cache, split = DynamicCache(), len(prompt) - 5
    parts = [run(slice(0, split), cache)]
    parts += [run(slice(i, i + 1), cache) for i in range(split, len(prompt))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == len(prompt)


@pytest.fixture(scope="module")
def eager(family_adapter: Any) -> Any:
    """The same weights in a network that shows its attention."""
    network = type(family_adapter.network)._from_config(
        copy.deepcopy(family_adapter._model.config), attn_implementation="eager", dtype=torch.float32
    )
    network.load_state_dict(family_adapter._model.state_dict())
    return network.eval()


def test_last_token_attention_equals_eager_attention(family_adapter: Adapter, eager: Any) -> None:
    shape, *media = make_inputs(family_adapter, **CLIPS["video and audio"])
    prompt = family_adapter.prompt("what is the said?", shape)
    given = embed(family_adapter, prompt, shape, *media)
    hidden = given.embeddings[None]
    rotary = family_adapter.rotary(prompt.layout.position)
    n = len(prompt)
    causal = torch.full((n, n), float("-inf")).triu(1)[None, None]
    for index in range(family_adapter.n_layers):
        hidden = family_adapter.run_layer(index, hidden, rotary, None, given.deepstack)
        ours = family_adapter.last_token_attention(index, hidden, rotary)
        layer = eager.model.language_model.layers[index]
        with torch.no_grad():
            _, weights = layer.self_attn(
                layer.input_layernorm(hidden), attention_mask=causal, position_embeddings=rotary
            )
        assert ours.shape == (n,)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, weights[0, :, -1].mean(dim=0), atol=1e-6, rtol=1e-4)
        assert ours.sum().item() == pytest.approx(1.0, abs=1e-4)


# ---- encoders ------------------------------------------------------------------------------------


def test_encoding_by_windows_equals_encoding_at_once(family_adapter: Adapter) -> None:
    shape, frames, mel, _ = make_inputs(family_adapter, **CLIPS["video and audio"])
    grid = shape.video_grid
    assert grid is not None
    assert grid[0] == 5, "an odd number of grids, so that the last window is short"
    whole = family_adapter.encode_video(frames, grid)
    parts = [family_adapter.encode_video(frames[i : i + 4], grid) for i in range(0, len(frames), 4)]
    torch.testing.assert_close(
        torch.cat([p.embeddings for p in parts]), whole.embeddings, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(torch.cat([p.saliency for p in parts]), whole.saliency, atol=1e-5, rtol=1e-4)
    if shape.video_grid and family_adapter.geometry.deepstack_layers:
        assert whole.deepstack is not None
        assert whole.deepstack.shape == (2, shape.n_video, 64)
        features = [part.deepstack for part in parts if part.deepstack is not None]
        torch.testing.assert_close(torch.cat(features, dim=1), whole.deepstack, atol=1e-5, rtol=1e-4)
    # the sound's last piece is a part of one chunk of the convolutions
    _, _, mel, _ = make_inputs(family_adapter, **CLIPS["odd rate"])
    mel, block = mel[:, :437], family_adapter.audio_block
    assert mel.shape[1] % block.frames == 37
    whole = family_adapter.encode_audio(mel, window=block.positions)
    parts = [
        family_adapter.encode_audio(mel[:, i : i + block.frames], window=block.positions, start=i)
        for i in range(0, mel.shape[1], block.frames)
    ]
    torch.testing.assert_close(
        torch.cat([p.embeddings for p in parts]), whole.embeddings, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(torch.cat([p.saliency for p in parts]), whole.saliency, atol=1e-5, rtol=1e-4)


def test_internal_batching_changes_nothing(family_adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, frames, _, _ = make_inputs(family_adapter, **CLIPS["video and audio"])
    mel = torch.randn(128, 6003, generator=torch.Generator().manual_seed(1))
    assert shape.video_grid is not None
    video, audio = family_adapter.encode_video(frames, shape.video_grid), family_adapter.encode_audio(mel)
    odd = family_adapter.encode_audio(mel, window=52)  # Qwen3's published windows do not divide a chunk
    assert not torch.equal(odd.saliency, audio.saliency)
    for constant in ("omni.VISION_BATCH_PATCHES", "omni.AUDIO_BATCH_FRAMES", "saliency.SALIENCY_SCORES"):
        monkeypatch.setattr(f"seats_cli.model.{constant}", 1)
    for once, batched in (
        (video, family_adapter.encode_video(frames, shape.video_grid)),
        (audio, family_adapter.encode_audio(mel)),
        (odd, family_adapter.encode_audio(mel, window=52)),
    ):
        torch.testing.assert_close(batched.embeddings, once.embeddings, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(batched.saliency, once.saliency, atol=1e-5, rtol=1e-4)


def eager_scores(query: torch.Tensor, key: torch.Tensor, members: list[list[int]]) -> torch.Tensor:
    """Attention received per position, one window, head, query and key at a time."""
    received = torch.zeros(query.shape[0])
    n_heads, dim = query.shape[1:]
    for window in members:
        for head in range(n_heads):
            for i in window:
                scores = torch.stack([query[i, head] @ key[j, head] for j in window]) * dim**-0.5
                received[window] += scores.softmax(0) / n_heads
    return received


def test_attention_received_equals_the_obvious() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(11, 3, 8, generator=generator) for _ in range(2))
    members = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    ours = attention_received(query, key, 4, 8**-0.5)
    torch.testing.assert_close(ours, eager_scores(query, key, members))
    assert ours.sum().item() == pytest.approx(11)


def test_video_saliency_equals_the_obvious(tiny_adapter: Any) -> None:
    """The last block rebuilt by hand: patches in raster order, each with its own angles."""
    shape, frames, _, _ = make_inputs(tiny_adapter, n_frames=6, height=28 * 5, width=28 * 6, sample_fps=2.0)
    grid = shape.video_grid
    assert grid == (3, 10, 12), "several attention windows per grid, none of them full"
    encoded = tiny_adapter.encode_video(frames, grid)
    visual = tiny_adapter._visual
    patches = patchify(frames, tiny_adapter.pixel_stats, patch=14, temporal_patch=2, merge=2)
    states: list[torch.Tensor] = []
    handle = visual.blocks[-2].register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        output = visual(patches, grid_thw=torch.tensor([grid]))
    handle.remove()
    torch.testing.assert_close(encoded.embeddings, output.pooler_output)
    where = reading_order(*grid)
    block = visual.blocks[-1]
    with torch.no_grad():
        normed = block.norm1(states[0])
        query = torch.empty(len(where), 2, 16)
        key = torch.empty(len(where), 2, 16)
        row_of = {patch: row for row, patch in enumerate(where)}
        for patch, row in row_of.items():
            angles = patch_angles(patch, 16)
            raster = (patch[0] * grid[1] + patch[1]) * grid[2] + patch[2]
            query[raster] = rotate(block.attn.q(normed[row]).view(2, 16), angles)
            key[raster] = rotate(block.attn.k(normed[row]).view(2, 16), angles)
    per_window = 2 * grid[1] * grid[2]
    total = len(where)
    members = [list(range(s, min(s + per_window, total))) for s in range(0, total, per_window)]
    received = torch.zeros(total)
    for window in members:
        for head in range(2):
            weights = (query[window, head] @ key[window, head].T * 16**-0.5).softmax(-1)
            received[window] += weights.sum(0) / 2
    received = received.view(grid)
    for token in range(len(encoded.saliency)):
        t, rest = divmod(token, grid[1] * grid[2] // 4)
        h, w = divmod(rest, grid[2] // 2)
        mean = received[t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].mean()
        assert encoded.saliency[token].item() == pytest.approx(mean.item(), rel=1e-4)


def reading_order(t: int, h: int, w: int) -> list[tuple[int, int, int]]:
    """(grid, row, column) of each patch in the tower's order: 8x8-patch windows of 2x2 blocks."""
    order = []
    for grid in range(t):
        for top in range(0, h, 8):
            for left in range(0, w, 8):
                for row in range(top, min(top + 8, h), 2):
                    for column in range(left, min(left + 8, w), 2):
                        order += [(grid, row + dy, column + dx) for dy in (0, 1) for dx in (0, 1)]
    return order


def patch_angles(patch: tuple[int, int, int], dim: int) -> torch.Tensor:
    """Rotary angles of a patch: a quarter of the head turns with its row, the next with its column."""
    frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2).float() / (dim // 2))
    half = torch.cat([patch[1] * frequency, patch[2] * frequency])
    return torch.cat([half, half])


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


@pytest.mark.parametrize("n_frames", [3, 199, 200, 201, 203, 397, 463])
def test_audio_saliency_equals_the_obvious(n_frames: int, tiny_adapter: Any) -> None:
    mel = torch.randn(128, n_frames, generator=torch.Generator().manual_seed(n_frames))
    encoded = tiny_adapter.encode_audio(mel)
    tower = tiny_adapter._audio
    states: list[torch.Tensor] = []
    handle = tower.layers[-2].register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    with torch.no_grad():
        output = tower(mel, feature_lens=torch.tensor([n_frames])).last_hidden_state
        handle.remove()
        layer = tower.layers[-1]
        normed = layer.self_attn_layer_norm(states[0])
        query = layer.self_attn.q_proj(normed).view(-1, 2, 16)
        key = layer.self_attn.k_proj(normed).view(-1, 2, 16)
    torch.testing.assert_close(encoded.embeddings, output, atol=1e-5, rtol=1e-4)
    total = len(query)
    received = torch.zeros(total)
    for start in range(0, total, 100):
        window = slice(start, min(start + 100, total))
        for head in range(2):
            received[window] += (query[window, head] @ key[window, head].T / 4).softmax(-1).sum(0) / 2
    n_tokens = len(encoded.saliency)
    assert n_tokens == tiny_adapter.media_shape(n_samples=160 * n_frames).n_audio
    torch.testing.assert_close(
        encoded.saliency, received[: 2 * n_tokens].view(-1, 2).mean(1), atol=1e-6, rtol=1e-4
    )


def test_qwen3s_video_saliency_equals_the_obvious(qwen3_adapter: Any) -> None:
    """The last block rebuilt by hand: each grid's patches block by block, each with its own angles."""
    shape, frames, _, _ = make_inputs(qwen3_adapter, n_frames=6, height=32 * 5, width=32 * 6, sample_fps=2.0)
    grid = shape.video_grid
    assert grid == (3, 10, 12)
    encoded = qwen3_adapter.encode_video(frames, grid)
    visual = qwen3_adapter._visual
    patches = patchify(frames, qwen3_adapter.pixel_stats, patch=16, temporal_patch=2, merge=2)
    states: list[torch.Tensor] = []
    handle = visual.blocks[-2].register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        output = visual(patches, grid_thw=torch.tensor([grid]))
        handle.remove()
        block = visual.blocks[-1]
        qkv = block.attn.qkv(block.norm1(states[0])).view(-1, 3, 2, 16)
    torch.testing.assert_close(encoded.embeddings, output.pooler_output, atol=1e-5, rtol=1e-4)
    for mine, other in zip(encoded.deepstack, output.deepstack_features, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    places = [
        (t, row + dy, column + dx)
        for t in range(3)
        for row in range(0, 10, 2)
        for column in range(0, 12, 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    query, key = (
        torch.stack([rotate(qkv[i, part], patch_angles(place, 16)) for i, place in enumerate(places)])
        for part in (0, 1)
    )
    received = torch.zeros(len(places))
    for start in range(0, len(places), 240):
        window = slice(start, min(start + 240, len(places)))
        for head in range(2):
            weights = (query[window, head] @ key[window, head].T / 4).softmax(-1)
            received[window] += weights.sum(0) / 2
    torch.testing.assert_close(encoded.saliency, received.view(-1, 4).mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_frames", [3, 99, 100, 250, 433, 863])
@pytest.mark.parametrize("window", [26, 52])
def test_qwen3s_audio_saliency_equals_the_obvious(window: int, n_frames: int, qwen3_adapter: Any) -> None:
    """No pooling: a position is a token. Windows of 2 s, and the published ones."""
    mel = torch.randn(128, n_frames, generator=torch.Generator().manual_seed(n_frames))
    encoded = qwen3_adapter.encode_audio(mel, window=window)
    tower = qwen3_adapter._audio
    states: list[torch.Tensor] = []
    handle = tower.layers[-2].register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    with torch.no_grad():
        output = tower(mel, feature_lens=torch.tensor([n_frames])).last_hidden_state
        handle.remove()
        layer = tower.layers[-1]
        normed = layer.self_attn_layer_norm(states[0])
        query, key = (
            project(normed).view(-1, 2, 16) for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
    torch.testing.assert_close(encoded.embeddings, output, atol=1e-5, rtol=1e-4)
    received = torch.zeros(len(query))
    for start in range(0, len(query), window):
        part = slice(start, min(start + window, len(query)))
        for head in range(2):
            received[part] += (query[part, head] @ key[part, head].T / 4).softmax(-1).sum(0) / 2
    assert len(encoded.saliency) == qwen3_adapter.media_shape(n_samples=160 * n_frames).n_audio
    torch.testing.assert_close(encoded.saliency, received, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("n_frames", [0, 1, 2])
def test_too_little_sound_is_no_sound(n_frames: int, tiny_adapter: Adapter) -> None:
    encoded = tiny_adapter.encode_audio(torch.randn(128, n_frames))
    assert encoded.embeddings.shape == (0, 64)
    assert encoded.saliency.shape == (0,)
    shape = tiny_adapter.media_shape(n_samples=160 * n_frames)
    assert (shape.audio_frames, shape.n_audio) == (0, 0)
    ids = tiny_adapter.prompt("x", shape).input_ids
    assert tiny_adapter.tokenizer.convert_tokens_to_ids("<|audio_bos|>") not in ids.tolist()


def test_no_hook_stays_behind(family_adapter: Any) -> None:
    shape, frames, mel, _ = make_inputs(family_adapter, **CLIPS["video and audio"])
    family_adapter.encode_video(frames, shape.video_grid)
    family_adapter.encode_audio(mel)
    attention: nn.Module
    for attention in (family_adapter._visual.blocks[-1].attn, family_adapter._audio.layers[-1].self_attn):
        assert not attention._forward_pre_hooks
    with pytest.raises(RuntimeError):
        family_adapter.encode_audio(torch.randn(7, 400))
    assert not family_adapter._audio.layers[-1].self_attn._forward_pre_hooks


def test_threads_encode_each_their_own_clip(reference: Adapter) -> None:
    """Saliency is taken from what one module was given, and other threads give it theirs."""
    clips = [torch.randint(0, 256, (4, 56, 84, 3), dtype=torch.uint8) for _ in range(6)]
    sounds = [torch.randn(reference.mel_spec.bins, 400) for _ in clips]
    grid, work = (2, 4, 6), range(6)

    def encode(i: int) -> tuple[torch.Tensor, ...]:
        video, audio = reference.encode_video(clips[i], grid), reference.encode_audio(sounds[i])
        assert video.saliency is not None
        assert audio.saliency is not None
        return video.embeddings, video.saliency, audio.embeddings, audio.saliency

    expected = [encode(i) for i in work]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            for one, other in zip(expected, pool.map(encode, work), strict=True):
                assert all(map(torch.equal, one, other))


def test_no_more_encode_at_once_than_memory_is_planned_for(
    tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1 < encoders_at_once(tiny_adapter, monkeypatch) <= omni.ENCODERS_AT_ONCE


@pytest.mark.parametrize("kind", ["video", "audio", "image"])
def test_encoders_keep_to_the_order_batch_by_batch(
    tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    turns: list[list[str]] = []  # what was run in each
    inside = [False]

    @contextmanager
    def in_turn() -> Iterator[None]:
        turns.append([])
        inside[0] = True
        yield
        inside[0] = False

    def noted(name: str) -> Any:
        real = getattr(tiny_adapter, name)

        def run(*args: Any) -> Any:
            assert inside[0]
            turns[-1].append(name)
            return real(*args)

        return run

    monkeypatch.setattr(omni, "VISION_BATCH_PATCHES", 4 * 6)
    monkeypatch.setattr(omni, "AUDIO_BATCH_FRAMES", 1)
    monkeypatch.setattr(tiny_adapter.launch_order, "in_turn", in_turn)
    for name in ("_patches", "_encode_patches", "_encode_mel"):
        monkeypatch.setattr(tiny_adapter, name, noted(name))
    if kind == "audio":
        n = tiny_adapter.audio_block.frames
        tiny_adapter.encode_audio(torch.zeros(tiny_adapter.mel_spec.bins, 4 * n), window=n // 2)
        assert turns == [["_encode_mel"]] * 4
    elif kind == "video":
        frames = torch.zeros(8, 56, 84, 3, dtype=torch.uint8)
        tiny_adapter.encode_video(frames, (4, 4, 6), window=1)
        assert turns == [["_patches", "_encode_patches"]] * 4
    else:
        tiny_adapter.encode_image(torch.zeros(56, 84, 3, dtype=torch.uint8), (1, 4, 6))
        assert turns == [["_patches", "_encode_patches"]]


def test_frames_are_resized_to_the_grid(family_adapter: Adapter) -> None:
    frames = torch.randint(0, 256, (2, 61, 97, 3), dtype=torch.uint8)
    encoded = family_adapter.encode_video(frames, (1, 4, 6))
    assert encoded.embeddings.shape == (6, 64)


def test_shape_counts(tiny_adapter: Adapter) -> None:
    shape = tiny_adapter.media_shape(n_frames=120, height=720, width=1280, sample_fps=2.0, n_samples=960000)
    assert shape.video_grid == (60, 18, 32)
    assert shape.tokens_per_grid == 144
    assert (shape.n_video, shape.n_audio, shape.seconds_per_grid) == (8640, 1500, 1.0)
    big = tiny_adapter.media_shape(image_size=(6000, 8000))
    assert 15000 < big.n_image <= tiny_adapter.context_length // 2


def test_a_tail_without_tokens_has_saliency_only_where_asked(tiny_adapter: Adapter) -> None:
    """A batch that ends one or two mel frames after a chunk yields no token for them."""
    mel = torch.randn(tiny_adapter.mel_spec.bins, 32 * tiny_adapter.audio_block.frames + 2)
    with_saliency = tiny_adapter.encode_audio(mel)
    assert with_saliency.saliency is not None
    assert len(with_saliency.saliency) == len(with_saliency) == 1600
    without = tiny_adapter.encode_audio(mel, saliency=False)
    assert without.saliency is None
    assert torch.equal(without.embeddings, with_saliency.embeddings)
    with pytest.raises(ValueError, match="some parts"):
        Encoded.join([with_saliency, without])
