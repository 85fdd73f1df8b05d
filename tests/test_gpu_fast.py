"""On a CUDA device: each kernel against its reference, graphs against the steps that they record."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seats_cli.demo.write import write_clip
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import DecodeOptions
from seats_cli.engine.graph import GraphDecoder
from seats_cli.engine.prefill import Prefilled
from seats_cli.engine.together import DecodeTogether
from seats_cli.model import kernels
from seats_cli.model.load import load_model
from seats_cli.model.saliency import attention_received
from seats_cli.presets import resolve_model
from seats_cli.selection import budget, diversity
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.relevance import WindowShares, WindowTokens
from seats_cli.selection.transfer import on_device
from seats_cli.session import AskOptions, ModelOptions, Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Else PyTorch seeds a GPU's generator by chance."""
    torch.manual_seed(0)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _bound(dtype: torch.dtype) -> float:
    return 2e-6 if dtype == torch.float32 else 8e-3  # one or two roundings to bfloat16


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _halves(rows: int, half: int) -> torch.Tensor:
    table = _normal(rows, half)
    return torch.cat((table, table), dim=1)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """What a call gives with the kernels, and with the references."""

    def call(work: Callable[[], Any]) -> tuple[Any, Any]:
        ours = work()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "is_fused", lambda _: False)
            return ours, work()

    return call


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(both: Callable[..., Any], dtype: torch.dtype) -> None:
    x, weight, offset = _normal(300, 1280, dtype=dtype), _normal(1280, dtype=dtype), _normal(1280)
    assert _error(*both(lambda: kernels.rms_norm(x, weight, 1e-6, offset))) < _bound(dtype)
    assert _error(*both(lambda: kernels.rms_norm(x, weight, 1e-6))) < _bound(dtype)
    bias = _normal(1280, dtype=dtype)
    assert _error(*both(lambda: kernels.layer_norm(x, weight, bias, 1e-5, offset))) < _bound(dtype)
    gates = _normal(40, 2 * 3456, dtype=dtype)
    assert _error(*both(lambda: kernels.silu_mul(gates))) < _bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations(both: Callable[..., Any], dtype: torch.dtype) -> None:
    qkv, cos, sin = _normal(1152, 3 * 16 * 80, dtype=dtype), _halves(576, 40), _halves(576, 40)
    assert _error(*both(lambda: kernels.rotate_pairs(qkv.clone(), cos, sin, 16, 80))) < _bound(dtype)
    prompt, cos, sin = _normal(300, 36 * 128, dtype=dtype), _halves(300, 64), _halves(300, 64)
    cos, sin = cos.to(dtype), sin.to(dtype)
    for mine, other in zip(
        *both(lambda: kernels.rotate_and_split(prompt.clone(), cos, sin, 28, 4, 128)), strict=True
    ):
        assert _error(mine, other) < _bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [2304, 2880, 100])
def test_saliency(dtype: torch.dtype, n_rows: int) -> None:
    qkv = _normal(n_rows, 3 * 16 * 80, dtype=dtype)
    query, key, _ = qkv.view(n_rows, 3, 16, 80).unbind(1)
    theirs = attention_received(query, key, 1152, 80**-0.5)
    assert _error(kernels.attention_received(qkv, 16, 80, 1152), theirs) < 2e-6  # bfloat16 products are exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4])
def test_one_token_products(both: Callable[..., Any], dtype: torch.dtype, n: int) -> None:
    x, weight, bias = _normal(n, 3584, dtype=dtype), _normal(1000, 3584, dtype=dtype), _normal(1000).to(dtype)
    norm, residual = (_normal(3584, dtype=dtype), 1e-6), _normal(n, 1000, dtype=dtype)
    weight /= 60
    bound = 2 * _bound(dtype)
    assert _error(*both(lambda: kernels.matvec(x, weight, norm=norm, bias=bias))) < bound
    assert _error(*both(lambda: kernels.matvec(x, weight, residual=residual))) < bound
    assert _error(*both(lambda: kernels.matvec(x, weight, norm=norm, gated=True))) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[0], [1], [63], [64], [1000], [2047], [5, 0, 2047], [700] * 8])
def test_one_token_attention(both: Callable[..., Any], dtype: torch.dtype, lengths: list[int]) -> None:
    n = len(lengths)
    held = [_normal(n, 4, 2048, 128, dtype=dtype) for _ in range(2)]
    qkv, cos, sin = _normal(n, 36 * 128, dtype=dtype), _halves(n, 64).to(dtype), _halves(n, 64).to(dtype)
    at = torch.tensor(lengths, dtype=torch.int32, device="cuda")

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        keys, values = (part.to(dtype, copy=True) for part in held)
        given = [part.to(dtype, copy=True) for part in (qkv, cos, sin)]
        return [kernels.decode_attention(*given, keys, values, at, 28), keys, values]

    mine = run(dtype)
    _, exact = both(lambda: run(torch.float32))  # in bfloat16 the reference is as far from it as the kernel
    for found, expected in zip(mine, exact, strict=True):
        assert _error(found, expected) < _bound(dtype)


def test_the_greedy_choice_ties_included() -> None:
    from seats_cli.selection.kernels import greedy_max_min

    for n_windows, n_tokens, n_keep in ((32, 288, 24), (5, 50, 24), (1, 2, 1), (3, 1000, 70)):
        distances = torch.rand(n_windows, n_tokens, n_tokens, device="cuda") * 1e6
        coarse = torch.rand_like(distances) < 0.3
        distances = torch.where(coarse, distances.round(decimals=-6), distances)
        assert torch.equal(
            greedy_max_min(distances, n_keep), diversity.greedy_max_min(distances.cpu(), n_keep).cuda()
        )


def test_fused_budgets_are_the_same_numbers() -> None:
    """Random shares, and coarse ones with ties; few totals so small that not every window gets a token."""
    compared = 0
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(2, (40, 150, 700)[seed % 3], (1,), generator=generator))
        counts = [torch.randint(0, (4, 40, 290)[seed % 3], (n,), generator=generator) for _ in range(2)]
        if not all(int(count.sum()) for count in counts):
            continue
        drawn = [torch.rand(n, generator=generator) for _ in range(2)]
        if seed % 4 == 0:
            drawn = [(draw * 3).ceil() for draw in drawn]
        shares = WindowShares(*((4 * draw).softmax(0).cuda() for draw in drawn))
        least = 1 if seed % 2 else n
        totals = [
            int(torch.randint(min(least, int(count.sum())), int(count.sum()) + 1, (1,), generator=generator))
            for count in counts
        ]
        tokens = WindowTokens(counts[0].cuda(), counts[0].cuda(), counts[1].cuda())
        ours = budget.fused_budgets(shares, tokens, *totals)
        theirs = budget.exact_budgets(shares, tokens, *totals)
        for mine, other in ((ours.video, theirs.video), (ours.audio, theirs.audio)):
            assert mine.sum() == other.sum()
            if seed % 4:  # coarse shares fall on half tokens, which round either way
                assert torch.equal(mine, other)
            compared += 1
    assert compared > 200


def test_a_graph_is_recorded_while_other_threads_use_every_stream_they_can_get() -> None:
    """PyTorch hands its streams out in turns: one of them must never be the one that records."""
    decoder = GraphDecoder(load_model(resolve_model("tiny"), device="cuda", dtype="bfloat16", fuse=True), 2)
    failed, ended = [], threading.Event()

    def use_streams() -> None:
        while not ended.is_set():
            stream = torch.cuda.Stream()
            try:
                with torch.cuda.stream(stream):
                    on_device(torch.ones(1000), "cuda").sum()
                stream.synchronize()
            except RuntimeError as error:
                failed.append(error)

    threads = [threading.Thread(target=use_streams) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with torch.inference_mode():
            for _ in range(20):
                decoder._make_room([10] * decoder._adapter.n_layers)
                decoder.step(torch.zeros(2, dtype=torch.int64, device="cuda"))
                decoder.release()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_an_answer_joins_and_leaves_without_waiting_for_the_step_in_the_making() -> None:
    adapter = load_model(resolve_model("tiny"), device="cuda", dtype="bfloat16", fuse=True)
    together = DecodeTogether(adapter, GraphDecoder(adapter, 2))
    layout = TokenLayout(*(torch.zeros(shape) for shape in (9, 9, (3, 9), 9)), (9, 0, 0))
    shape = (1, adapter.geometry.n_kv_heads, 9, adapter.geometry.head_dim)
    seconds = []

    def join_and_leave() -> None:
        cache = LayerCache(adapter.n_layers)
        for index in range(adapter.n_layers):
            made = torch.ones(shape, dtype=adapter.dtype, device="cuda")
            cache.update(made, made.clone(), index)
        logits = torch.ones(adapter.geometry.vocab, device="cuda")
        read = Prefilled(logits, cache, (), (), layout.to("cuda"))
        together.add(read, 9, DecodeOptions(8), other_stream=True)
        together._close(0)

    with torch.inference_mode():
        for _ in range(3):  # what is prepared once is there after the first
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.cuda._sleep(1_000_000_000)  # clock cycles: half a second
            join_and_leave()
            seconds.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            assert time.perf_counter() - start > 0.3
    assert min(seconds) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_graph_says_what_single_steps_say(tmp_path: Path, dtype: str) -> None:
    """Greedy and drawn, two questions in a row, both decode caches: the graph is reused and nothing stays."""
    path = tmp_path / "clip.mp4"
    questions = write_clip(path, seed=5)["questions"]
    graph = Session(ModelOptions(device="cuda", dtype=dtype))
    steps = Session(ModelOptions(device="cuda", dtype=dtype, graphs=False))
    assert graph.graph is not None
    assert steps.graph is None
    for settings in ({}, {"decode_cache": "text"}):
        for temperature in (0.0, 0.7):
            options = AskOptions(max_new_tokens=12, temperature=temperature, seed=3, settings=settings)
            for question in questions[:3]:
                ours = graph.ask(path, question["question"], options)
                theirs = steps.ask(path, question["question"], options)
                assert ours.text == theirs.text


@pytest.mark.parametrize("size", [(252, 448), (224, 224)])
def test_the_encoder_rounds_no_worse_than_transformers(size: tuple[int, int]) -> None:
    """In bfloat16, against float32: windows of several sizes, and of one."""
    grid = (4, size[0] // 14, size[1] // 14)
    frames = torch.randint(0, 256, (8, *size, 3), dtype=torch.uint8, device="cuda")

    def encoded(dtype: str, fast: bool) -> torch.Tensor:
        session = Session(ModelOptions(device="cuda", dtype=dtype, compile=fast))
        with torch.inference_mode():
            return session.adapter.encode_video(frames, grid).embeddings

    exact = encoded("float32", False)
    assert _error(encoded("bfloat16", True), exact) < 1.2 * _error(encoded("bfloat16", False), exact)
