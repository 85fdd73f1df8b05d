"""On a CUDA device: Qwen3-Omni's kernels against their references, its fast paths against transformers', and
that nothing in them waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import decode_step
from seats_cli.engine.graph import GraphDecoder
from seats_cli.model import expert_kernels, kernels
from seats_cli.model.kernels import HeadNorms
from seats_cli.model.load import load_model
from test_gpu_fast import DTYPES, _bound, _error, _halves, _normal, both  # noqa: F401 - `both` is a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norms_before_the_rotation(both: Callable[..., Any], dtype: torch.dtype) -> None:  # noqa: F811
    norms = HeadNorms(_normal(128, dtype=dtype), _normal(128, dtype=dtype), 1e-6)
    qkv, cos, sin = (
        _normal(300, 40 * 128, dtype=dtype),
        _halves(300, 64).to(dtype),
        _halves(300, 64).to(dtype),
    )
    split = both(lambda: kernels.rotate_and_split(qkv.clone(), cos, sin, 32, 4, 128, norms=norms))
    for mine, other in zip(*split, strict=True):
        assert _error(mine, other) < 2 * _bound(dtype)
    held = [_normal(1, 4, 512, 128, dtype=dtype) for _ in range(2)]
    at = torch.tensor([300], dtype=torch.int32, device="cuda")

    def run() -> list[torch.Tensor]:
        keys, values = (part.clone() for part in held)
        seen = kernels.decode_attention(qkv[:1].clone(), cos[:1], sin[:1], keys, values, at, 32, norms=norms)
        return [seen, keys, values]

    for mine, other in zip(*both(run), strict=True):
        assert _error(mine, other) < 2 * _bound(dtype)


@pytest.mark.parametrize("renormalised", [True, False])
def test_routing(both: Callable[..., Any], renormalised: bool) -> None:  # noqa: F811
    logits = _normal(3000, 128)
    ours, theirs = both(lambda: expert_kernels.route(logits, 8, renormalised))
    assert torch.equal(ours[1], theirs[1])
    assert _error(ours[0], theirs[0]) < 2e-6


def test_rows_go_to_their_experts(both: Callable[..., Any]) -> None:  # noqa: F811
    x = _normal(3001, 2048, dtype=torch.bfloat16)
    experts = torch.rand(3001, 128, device="cuda").topk(8).indices
    (rows, places, ends), (_, _, their_ends) = both(lambda: expert_kernels.rows_by_expert(x, experts, 128))
    assert torch.equal(ends, their_ends)
    assert torch.equal(places.flatten().sort().values, torch.arange(8 * 3001, device="cuda"))
    assert torch.equal(rows[places], x[:, None].expand(-1, 8, -1))
    assert torch.equal(torch.searchsorted(ends, places.int(), right=True), experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_experts(both: Callable[..., Any], dtype: torch.dtype, n_tokens: int) -> None:  # noqa: F811
    x, norm = _normal(n_tokens, 2048, dtype=dtype), (_normal(2048, dtype=dtype), 1e-6)
    gate_up, down = _normal(16, 1536, 2048, dtype=dtype) / 45, _normal(16, 2048, 768, dtype=dtype) / 28
    experts = torch.rand(n_tokens, 16, device="cuda").topk(8).indices
    shares = torch.rand(n_tokens, 8, device="cuda").to(dtype)
    bound = 2 * _bound(dtype)
    inner, theirs = both(lambda: expert_kernels.expert_gate_up(x, gate_up, experts, norm))
    assert _error(inner, theirs) < bound
    assert _error(*both(lambda: expert_kernels.expert_down(theirs, down, experts, shares, x))) < bound
    rows, outputs = _normal(500, 2048, dtype=dtype), _normal(4000, 2048, dtype=dtype)
    places = torch.randperm(4000, device="cuda").view(500, 8)
    many = torch.rand(500, 8, device="cuda").to(dtype)
    assert _error(*both(lambda: expert_kernels.combine_experts(rows, outputs, places, many))) < bound


@pytest.fixture(scope="module")
def fused(qwen3_path: Path) -> Any:
    return load_model(str(qwen3_path), device="cuda", dtype="float32")


@pytest.fixture(scope="module")
def reference(qwen3_path: Path) -> Any:
    return load_model(str(qwen3_path), device="cuda", dtype="float32", fuse=False)


def test_encoders_without_waiting(fused: Any, reference: Any) -> None:
    frames = torch.randint(0, 256, (8, 160, 192, 3), dtype=torch.uint8, device="cuda")
    mel = torch.randn(128, 950, device="cuda")
    grid = (4, 10, 12)
    fused.encode_video(frames, grid), fused.encode_audio(mel)  # makes what grids share, compiles the kernels
    with no_waiting(), torch.backends.cudnn.flags(allow_tf32=False):
        video, audio = fused.encode_video(frames, grid), fused.encode_audio(mel)
    with torch.backends.cudnn.flags(allow_tf32=False):  # theirs begin with convolutions
        theirs = reference.encode_video(frames, grid), reference.encode_audio(mel)
    for mine, other in ((video, theirs[0]), (audio, theirs[1])):
        assert _error(mine.embeddings, other.embeddings) < 1e-5
        assert _error(mine.saliency, other.saliency) < 1e-5
    assert _error(video.deepstack, theirs[0].deepstack) < 1e-5


def prompt_of(adapter: Any, n: int) -> tuple[torch.Tensor, LayerCache]:
    """(1, n, D) out of the last layer of a random prompt, and its cache."""
    generator = torch.Generator("cuda").manual_seed(n)
    hidden = torch.randn(1, n, adapter.geometry.hidden, generator=generator, device="cuda")
    position = torch.arange(n, device="cuda").expand(3, -1).float() * 1.5
    cache, rotary = LayerCache(adapter.n_layers), adapter.rotary(position)
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, rotary, cache)
    return hidden, cache


def test_the_prompt(fused: Any, reference: Any) -> None:
    ours, _ = prompt_of(fused, 133)
    theirs, _ = prompt_of(reference, 133)
    assert _error(ours, theirs) < 1e-4


def test_a_prompt_in_bfloat16_waits_for_nothing(qwen3_path: Path) -> None:
    """In float32 PyTorch's grouped products may ask how long the groups are; in bfloat16 they must not."""
    adapter: Any = load_model(str(qwen3_path), device="cuda", dtype="bfloat16")
    hidden = torch.randn(1, 133, adapter.geometry.hidden, device="cuda", dtype=torch.bfloat16)
    rotary = adapter.rotary(torch.arange(133, device="cuda").expand(3, -1).float())
    for run in range(2):
        if run:  # the first compiles
            torch.cuda.set_sync_debug_mode("error")
        try:
            x = hidden
            for index in range(adapter.n_layers):
                x = adapter.run_layer(index, x, rotary, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_the_graph_says_what_single_steps_say(fused: Any, reference: Any) -> None:
    """Fractional positions, layers of different lengths; the graph is recorded once and used again."""
    assert fused.decodes_in_graph
    graph = GraphDecoder(fused)
    for n in (40, 57):
        _, cache = prompt_of(reference, n)
        for index in range(0, reference.n_layers, 2):
            cache.trim(index, torch.arange(0, n, 3, device="cuda"))
        mine = cache.fork()
        graph.begin(mine, 71.5, 8)
        for step, token in enumerate((5, 301, 17)):
            ours = graph.step(torch.tensor([token], device="cuda"))[0].clone()
            theirs = decode_step(reference, token, 71.5 + step, cache)
            assert _error(ours, theirs) < 1e-4
