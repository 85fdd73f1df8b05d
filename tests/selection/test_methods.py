"""Every method of the table against the same promises."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clips import DEFAULT, OMNI_7B, clip
from layouts import clip_layout, make_layout
from seats_cli.errors import UsageError
from seats_cli.selection import contract
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import METHODS, Kept, MediaTokens, Method, find_method
from seats_cli.selection.plan import ClipCounts, Kind, Plan

COUNTS = clip(n_grids=9, n_audio=330, tokens_per_grid=20)  # nine windows' worth of sound, the last ones short
PROMPT = clip_layout(COUNTS, video_window=40, audio_window=50)
WIDTH = 12
AVERAGE = {"visionzip", "visionzip-om", "dycoke"}  # methods whose tokens stand for others by their mean

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
stream_methods = pytest.mark.parametrize(
    "method", [one for one in METHODS.values() if one.scope == "window"], ids=lambda method: method.name
)


def media(kind: Kind, seed: int = 0) -> MediaTokens:
    n_tokens, code = (COUNTS.n_video, VIDEO) if kind == "video" else (COUNTS.n_audio, AUDIO)
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n_tokens, WIDTH, generator=generator)
    saliency = torch.rand(n_tokens, generator=generator)
    rows = PROMPT.subset((PROMPT.kind == code).nonzero().squeeze(1))
    return MediaTokens(kind, embeddings, saliency, layout=rows)


def part(tokens: MediaTokens, start: int, end: int) -> MediaTokens:
    assert tokens.saliency is not None
    return replace(
        tokens,
        embeddings=tokens.embeddings[start:end],
        saliency=tokens.saliency[start:end],
        first_token=start,
    )


def plan_for(method: Method, ratio: float = 0.2, **changes: object) -> Plan:
    return method.plan(OMNI_7B, ratio, COUNTS, replace(DEFAULT, **changes))  # type: ignore[arg-type]


@every_method
@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize("merge", [False, True])
def test_what_enters_is_what_was_planned(method: Method, kind: Kind, merge: bool) -> None:
    plan, tokens = plan_for(method, merge=merge), media(kind)
    kept = method.before_llm(tokens, plan)
    before = (plan.n_video, plan.n_audio)
    planned = (plan.stages[0].n_video, plan.stages[0].n_audio) if plan.stages else before
    assert len(kept.indices) == planned[kind == "audio"]
    assert kept.indices.dtype == torch.int64
    assert (kept.indices.diff() > 0).all()
    assert kept.embeddings.shape == (len(kept.indices), WIDTH)
    if not merge and method.name not in AVERAGE:
        assert torch.equal(kept.embeddings, tokens.embeddings[kept.indices])


@stream_methods
@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize("merge", [False, True])
def test_how_the_stream_is_cut_changes_nothing(method: Method, kind: Kind, merge: bool) -> None:
    plan, tokens = plan_for(method, merge=merge), media(kind)
    whole = method.before_llm(tokens, plan)
    window, n_tokens = plan.window(kind), len(tokens.embeddings)
    bounds = [0, window, 3 * window, n_tokens]
    parts = [method.before_llm(part(tokens, start, end), plan) for start, end in pairwise(bounds)]
    assert torch.equal(torch.cat([one.indices for one in parts]), whole.indices)
    torch.testing.assert_close(torch.cat([one.embeddings for one in parts]), whole.embeddings)


@every_method
def test_the_same_twice(method: Method) -> None:
    plan = plan_for(method)
    first, second = (method.before_llm(media("video"), plan) for _ in range(2))
    assert torch.equal(first.indices, second.indices)


@every_method
def test_ratio_one_keeps_all_untouched(method: Method) -> None:
    plan, tokens = plan_for(method, ratio=1.0, merge=True), media("audio")
    kept = method.before_llm(replace(tokens, saliency=None), plan)
    assert torch.equal(kept.indices, torch.arange(COUNTS.n_audio))
    assert torch.equal(kept.embeddings, tokens.embeddings)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_embeddings_keep_their_dtype(method: Method, dtype: torch.dtype) -> None:
    tokens = media("audio")
    kept = method.before_llm(
        replace(tokens, embeddings=tokens.embeddings.to(dtype)), plan_for(method, merge=True)
    )
    assert kept.embeddings.dtype == dtype


def run_layers(method: Method, plan: Plan, layout: TokenLayout) -> list[TokenLayout]:
    """The layouts after every cut, with scores at random."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for layer in plan.cut_layers:
        scores = torch.rand(len(layout), generator=generator) if layer in plan.score_layers else None
        drop = method.after_layer(layer, scores, layout, plan)
        assert (drop.keep.diff() > 0).all()
        assert drop.counts == layout.subset(drop.keep).counts
        layout = layout.subset(drop.keep, drop.counts)
        seen.append(layout)
    return seen


@every_method
def test_inside_the_llm_text_stays_and_budgets_hold(method: Method) -> None:
    plan = plan_for(method, ratio=0.3)
    video, audio = (plan.stages[0].n_video, plan.stages[0].n_audio) if plan.stages else (0, 0)
    n_windows = plan.n_windows
    layout = make_layout(
        [video // n_windows + (index < video % n_windows) for index in range(n_windows)],
        [audio // n_windows + (index < audio % n_windows) for index in range(n_windows)],
    )
    for stage, after in zip(plan.stages[1:], run_layers(method, plan, layout), strict=True):
        assert after.n_text == layout.n_text
        assert after.n_video + after.n_audio == pytest.approx(stage.n_video + stage.n_audio, abs=2)
    if plan.late_layer is not None:
        assert (run_layers(method, plan, layout)[-1].kind == TEXT).all()


@every_method
def test_a_layer_that_is_not_in_the_plan_is_refused(method: Method) -> None:
    with pytest.raises(ValueError, match="after layer 5"):
        method.after_layer(5, None, make_layout([3], [3]), plan_for(method))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_scores])
def test_a_drop_needs_scores(name: str) -> None:
    plan = plan_for(METHODS[name])
    with pytest.raises(ValueError, match="needs attention scores"):
        METHODS[name].after_layer(plan.score_layers[0], None, make_layout([30], [30]), plan)


class NoHostValues(TorchDispatchMode):
    """Fails where a tensor is made from host values or its values are asked for: both wait on a device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func not in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [([70, 50, 90], [0, 0, 0]), ([0, 0], [80, 30]), ([90], [60])])
def test_one_kind_or_one_window_needs_nothing_from_the_host(sizes: tuple[list[int], list[int]]) -> None:
    layout = make_layout(*sizes)
    counts = ClipCounts(sum(sizes[0]), sum(sizes[1]), 10 if sum(sizes[0]) else 0, len(sizes[0]))
    method = METHODS["seats"]
    plan = method.plan(OMNI_7B, 0.3, counts, DEFAULT)
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(3))
    with NoHostValues():
        drop = method.after_layer(plan.score_layers[0], scores, layout, plan)
    assert drop.counts == layout.subset(drop.keep).counts
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # here tolist raises
        fake = replace(layout, kind=mode.from_tensor(layout.kind))
        found = method.after_layer(plan.score_layers[0], mode.from_tensor(scores), fake, plan)
    assert found.counts == drop.counts


@pytest.mark.parametrize("starts", [[4], [0, 3, 6], [0, 3, 9, 12]])
def test_starts_of_windows(starts: list[int]) -> None:
    assert contract._starts(starts, torch.device("cpu")).tolist() == starts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_wait_on_cuda() -> None:
    device = torch.device("cuda")
    method, layout = METHODS["seats"], make_layout([70, 50, 90], [0, 0, 0]).to(device)
    plan = method.plan(OMNI_7B, 0.3, ClipCounts(210, 0, 10, 3), DEFAULT)
    scores = torch.rand(len(layout), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.after_layer(plan.score_layers[0], scores, layout, plan)
        starts = contract._starts([0, 3, 9, 12], device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert starts.tolist() == [0, 3, 9, 12]


def test_random_follows_its_seed() -> None:
    method = METHODS["random"]
    one, same, other = (method.before_llm(media("video"), plan_for(method, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.indices, same.indices)
    assert not torch.equal(one.indices, other.indices)


def test_random_draws_every_token_alike() -> None:
    method = METHODS["random"]
    times = torch.zeros(COUNTS.n_video)
    for seed in range(300):
        times[method.before_llm(media("video"), plan_for(method, ratio=0.3, seed=seed)).indices] += 1
    share = times / 300
    plan = plan_for(method, ratio=0.3)
    assert float(share.mean()) == pytest.approx(plan.entry_video, rel=0.05)
    assert float(share.std()) < 0.06  # of 300 draws with p about 0.27: 0.026


def test_fixed_keeps_what_stage_one_would() -> None:
    """At equal entry ratios the two differ inside the LLM only."""
    fixed, seats = METHODS["fixed"], METHODS["seats"]
    plan = plan_for(fixed)
    same_entry = replace(plan_for(seats), entry_video=plan.entry_video, entry_audio=plan.entry_audio)
    rounded = replace(plan, spread_entry=False)
    kept: list[Kept] = [
        fixed.before_llm(media("video"), rounded),
        seats.before_llm(media("video"), same_entry),
    ]
    assert torch.equal(kept[0].indices, kept[1].indices)


def test_the_table_describes_itself() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.source
        assert len(method.summary) <= 100
    with pytest.raises(UsageError, match="no method 'seets'") as caught:
        find_method("seets")
    assert "seats, full, random, fixed" in (caught.value.hint or "")


def test_the_command_line_knows_all_methods() -> None:
    from seats_cli.cli.options import METHOD_NAMES

    assert tuple(METHODS) == METHOD_NAMES
