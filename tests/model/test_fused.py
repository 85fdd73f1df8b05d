"""The fast paths against transformers' own modules, which the same adapter runs when it is not fused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import decode_step
from seats_cli.model.adapter import Adapter
from seats_cli.model.fused_modules import pack_rows, pad_columns, why_not_packed
from seats_cli.model.load import load_model


def _load(path: Path, *, fuse: bool) -> Any:
    return load_model(str(path), device="cpu", dtype="float32", fuse=fuse)


@pytest.fixture(scope="module")
def reference(family_path: Path) -> Adapter:
    return _load(family_path, fuse=False)


@pytest.fixture(scope="module")
def fused(family_path: Path) -> Adapter:
    return _load(family_path, fuse=True)


def _close(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def _frames(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8)


def test_which_paths_run_is_known(reference: Adapter, fused: Adapter) -> None:
    assert not reference.fused
    assert "reference paths: asked for" in reference.notes
    assert fused.fused
    assert any(note.startswith("fast paths") for note in fused.notes)
    assert fused.parameter_count == reference.parameter_count


# Patches of a grid: windows all equal, of two sizes, of four, and a frame smaller than one window.
@pytest.mark.parametrize("grid", [(3, 16, 16), (2, 18, 32), (3, 10, 12), (1, 2, 4)])
@pytest.mark.parametrize("saliency", [True, False])
def test_video(reference: Adapter, fused: Adapter, grid: tuple[int, int, int], saliency: bool) -> None:
    patch = fused.geometry.patch
    frames = _frames(2 * grid[0], patch * grid[1], patch * grid[2])
    ours = fused.encode_video(frames, grid, saliency=saliency)
    theirs = reference.encode_video(frames, grid, saliency=saliency)
    _close(ours.embeddings, theirs.embeddings)
    assert (ours.deepstack is None) == (not fused.geometry.deepstack_layers)
    if ours.deepstack is not None:
        _close(ours.deepstack, theirs.deepstack)
    if saliency:
        _close(ours.saliency, theirs.saliency)
    else:
        assert ours.saliency is None


def test_image(reference: Adapter, fused: Adapter) -> None:
    image = _frames(1, 140, 196)[0]
    ours, theirs = (adapter.encode_image(image, (1, 10, 14)) for adapter in (fused, reference))
    _close(ours.embeddings, theirs.embeddings)


@pytest.mark.parametrize("n_frames", [600, 623, 200, 199, 37, 3])
def test_audio(reference: Adapter, fused: Adapter, n_frames: int) -> None:
    mel = torch.randn(128, n_frames, generator=torch.Generator().manual_seed(n_frames))
    for start in (0, fused.audio_block.frames):  # a clip's beginning, and its end
        ours, theirs = (adapter.encode_audio(mel, start=start) for adapter in (fused, reference))
        _close(ours.embeddings, theirs.embeddings)
        _close(ours.saliency, theirs.saliency)


def _prompt(adapter: Adapter, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(1, n, adapter.geometry.hidden, generator=generator)
    return hidden, torch.randint(0, 40, (3, n), generator=generator).sort(dim=1).values


def _through(adapter: Adapter, n: int) -> tuple[torch.Tensor, LayerCache]:
    hidden, position = _prompt(adapter, n)
    cache = LayerCache(adapter.n_layers)
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, adapter.rotary(position), cache)
    return hidden, cache


def test_the_prompt_and_its_cache(reference: Adapter, fused: Adapter) -> None:
    (ours, our_cache), (theirs, their_cache) = _through(fused, 37), _through(reference, 37)
    _close(ours, theirs)
    for index in range(fused.n_layers):
        for mine, other in zip(our_cache.keys_values(index), their_cache.keys_values(index), strict=True):
            _close(mine, other)


def test_a_layer_leaves_its_input_as_it_was(fused: Adapter) -> None:
    hidden, position = _prompt(fused, 9)
    before = hidden.clone()
    fused.run_layer(0, hidden, fused.rotary(position), None)
    assert torch.equal(hidden, before)


def test_tokens_decoded_into_fixed_buffers(reference: Adapter, fused: Adapter) -> None:
    """Three sequences at once, of which each layer holds another number of tokens: what a graph records."""
    caches = []
    for n_tokens, stride in ((21, 3), (12, 2), (5, 1)):
        _, cache = _through(reference, n_tokens)
        for index in range(0, reference.n_layers, 2):
            cache.trim(index, torch.arange(0, n_tokens, stride))
        caches.append(cache)
    lengths = torch.tensor([cache.lengths for cache in caches], dtype=torch.int32).T.contiguous()
    geometry, buffers = fused.geometry, []
    for part in (0, 1):
        whole = []
        for index in range(reference.n_layers):
            buffer = torch.full((3, geometry.n_kv_heads, 32, geometry.head_dim), 9.0)
            for row, cache in enumerate(caches):
                buffer[row, :, : cache.lengths[index]] = cache.keys_values(index)[part][0]
            whole.append(buffer)
        buffers.append(whole)
    for step, tokens in enumerate(((5, 7, 9), (7, 7, 7), (5, 9, 11))):
        starts = (40 + step, 30 + step, 20 + step)
        position = torch.tensor(starts).expand(3, 3)
        ours = fused.decode_token(torch.tensor(tokens), position, buffers[0], buffers[1], lengths)
        for row, cache in enumerate(caches):
            _close(ours[row], decode_step(reference, tokens[row], starts[row], cache))
        lengths += 1


def test_rounding_is_no_worse_than_transformers_own(tiny_checkpoint_path: Path) -> None:
    """Both in float32, measured against float64."""
    exact = _load(tiny_checkpoint_path, fuse=False)
    exact._model.double()
    frames = _frames(8, 252, 448)

    def error(adapter: Adapter) -> float:
        found = adapter.encode_video(frames, (4, 18, 32), saliency=False).embeddings.double()
        return float((found - truth).norm() / truth.norm())

    truth = exact.encode_video(frames, (4, 18, 32), saliency=False).embeddings.double()
    exact_enough = 1.5  # sums in another order: neither is always the better one
    assert error(_load(tiny_checkpoint_path, fuse=True)) < exact_enough * error(
        _load(tiny_checkpoint_path, fuse=False)
    )


# ---- packing ----------------------------------------------------------------------------------------------


def test_packed_modules_keep_their_values_and_share_their_memory() -> None:
    linears = [nn.Linear(6, 4), nn.Linear(6, 3, bias=False)]
    before = [linear.weight.clone() for linear in linears]
    weight, bias = pack_rows(linears, pad=2)
    assert weight.shape == (11, 6)
    assert bias is not None
    for linear, old in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, old)
        assert linear.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert torch.equal(weight[4:6], torch.zeros(2, 6))
    assert torch.equal(bias[6:9], torch.zeros(3))


def test_padded_columns_are_zero_and_the_module_still_works() -> None:
    linear = nn.Linear(5, 3)
    x = torch.randn(2, 5)
    before = linear(x)
    weight = pad_columns(linear, 3)
    assert torch.equal(weight[:, 5:], torch.zeros(3, 3))
    torch.testing.assert_close(linear(x), before)


def test_what_is_no_plain_linear_layer_is_not_packed(tiny_checkpoint_path: Path) -> None:
    class Quantised(nn.Linear):
        pass

    adapter = _load(tiny_checkpoint_path, fuse=False)
    old = adapter._text.layers[0].mlp.up_proj
    adapter._text.layers[0].mlp.up_proj = Quantised(old.in_features, old.out_features, bias=False)
    assert why_not_packed(adapter._text) == "the weights are quantised"
    assert adapter.fuse() == (
        "fast paths: packed products and batched windows, on cpu; reference paths (decoder: the weights are "
        "quantised)"
    )
    assert not adapter.fused
    assert adapter._fast_text is None
    assert adapter._fast_vision is not None
    assert adapter._fast_audio is not None
    assert not adapter.decodes_in_graph


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda m: m.register_buffer("qweight", torch.zeros(2, dtype=torch.int32)),
            "the weights are quantised",
        ),
        (lambda m: setattr(m[1], "weight", nn.Parameter(m[1].weight.to("meta"))), "weights are offloaded"),
        (lambda m: m[1].to(torch.float16), "the weights are of several dtypes"),
        (lambda m: None, None),
    ],
)
def test_why_weights_are_not_packed(change: Callable[[nn.Module], Any], why: str | None) -> None:
    modules = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(modules)
    assert why_not_packed(modules) == why
