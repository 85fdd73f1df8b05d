"""The layer loop equals the stock network: with everything kept, and with what was dropped masked out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masked_reference import Scripted, masked_forward, random_layout, random_script, scripted_plan
from seats_cli.engine.cache import LayerCache
from seats_cli.engine.decode import decode_step
from seats_cli.engine.prefill import Prefilled, prefill
from seats_cli.errors import PlanError
from seats_cli.model.adapter import Adapter
from seats_cli.presets import Schedule, match_preset
from seats_cli.selection.layout import TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import Drop, Seats, find_method
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts
from tiny_checkpoint import TinySpec

CUTS, LATE = (2, 3), 4  # of six layers
SCRIPTS = {
    "drops": (CUTS, None),
    "late only": ((), LATE),
    "drops and late": (CUTS, LATE),
    "first layer": ((1,), 5),
}


@pytest.fixture(scope="module")
def tiny_adapter(family_adapter: Adapter) -> Adapter:
    """The loop is the same for every family, and so are its tests."""
    return family_adapter


@pytest.fixture(scope="module")
def layout() -> TokenLayout:
    return random_layout(4, 40, 6)


@pytest.fixture(scope="module")
def embeddings(tiny_adapter: Adapter, layout: TokenLayout) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(len(layout), tiny_adapter.geometry.hidden, generator=rng)


@pytest.fixture(scope="module")
def stock(tiny_adapter: Adapter) -> tuple[Any, Any]:
    """transformers' own text model and head, from inside the adapter."""
    thinker = tiny_adapter._model  # type: ignore[attr-defined]  # the reference needs the stock modules themselves
    return thinker.model.language_model, thinker.lm_head


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def _cut_early(adapter: Adapter, script: dict[int, torch.Tensor]) -> bool:
    """Whether a cut comes before the layers that deepstack features are added behind."""
    return any(layer < adapter.geometry.deepstack_layers for layer in script)


def _run(
    adapter: Adapter,
    layout: TokenLayout,
    embeddings: torch.Tensor,
    script: dict[int, torch.Tensor],
    cache: str,
) -> tuple[Prefilled, Scripted]:
    method = Scripted(script, layout)
    plan = scripted_plan(adapter.n_layers, layout, sorted(script), cache)
    if _cut_early(adapter, script):
        with pytest.raises(PlanError, match="deepstack"):
            prefill(adapter, method, plan, embeddings, layout)
        pytest.skip("this family cannot cut so early, and says so")
    return prefill(adapter, method, plan, embeddings, layout), method


def test_keeping_everything_is_the_stock_forward(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor, stock: tuple[Any, Any]
) -> None:
    language_model, head = stock
    result, _ = _run(tiny_adapter, layout, embeddings, {}, "layerwise")
    out = language_model(
        inputs_embeds=embeddings[None], position_ids=layout.position[:, None], use_cache=False
    )
    expected = head(out.last_hidden_state)[0, -1]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
    assert result.layer_counts == (layout.counts,) * tiny_adapter.n_layers
    assert result.drops == ()
    assert result.cache.lengths == (len(layout),) * tiny_adapter.n_layers


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("cache", ["text", "layerwise"])
def test_dropping_equals_masking_the_full_sequence(
    tiny_adapter: Adapter,
    layout: TokenLayout,
    embeddings: torch.Tensor,
    stock: tuple[Any, Any],
    name: str,
    cache: str,
) -> None:
    script = random_script(layout, *SCRIPTS[name])
    result, method = _run(tiny_adapter, layout, embeddings, script, cache)
    alive = [method.alive_before(layer) for layer in range(1, tiny_adapter.n_layers + 1)]
    expected = masked_forward(*stock, embeddings, layout.position, alive)[0]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
    full = masked_forward(*stock, embeddings, layout.position, [torch.ones_like(alive[0])] * len(alive))[0]
    assert (full - expected).abs().max() > 1e-2  # else this test could not fail


@pytest.mark.parametrize("name", SCRIPTS)
def test_counts_and_layouts_are_recorded(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor, name: str
) -> None:
    script = random_script(layout, *SCRIPTS[name])
    result, method = _run(tiny_adapter, layout, embeddings, script, "layerwise")
    for layer, counts in enumerate(result.layer_counts, start=1):
        kinds = torch.bincount(layout.kind[method.alive_before(layer)].long(), minlength=3)
        assert counts == tuple(kinds.tolist())
        assert counts[TEXT] == layout.n_text  # text is never dropped
    assert [drop.after_layer for drop in result.drops] == sorted(script)
    for drop in result.drops:
        alive = method.alive_before(drop.after_layer + 1)
        assert drop.before == result.layer_counts[drop.after_layer - 1]
        assert drop.after == result.layer_counts[drop.after_layer] == drop.layout.counts
        assert torch.equal(drop.layout.position, layout.position[:, alive])  # kept, not renumbered
        assert torch.equal(drop.layout.window, layout.window[alive])
    assert len(result.layout) == sum(result.layer_counts[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_each_cache_holds(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor, name: str
) -> None:
    script = random_script(layout, *SCRIPTS[name])
    processed = tuple(
        int(Scripted(script, layout).alive_before(layer).sum())
        for layer in range(1, tiny_adapter.n_layers + 1)
    )
    layerwise, _ = _run(tiny_adapter, layout, embeddings, script, "layerwise")
    assert layerwise.cache.lengths == processed
    text, _ = _run(tiny_adapter, layout, embeddings, script, "text")
    assert text.cache.lengths == (processed[-1],) * tiny_adapter.n_layers  # every layer as the last one
    if SCRIPTS[name][1] is not None:
        assert set(text.cache.lengths) == {layout.n_text}
    assert text.cache.bytes() < layerwise.cache.bytes()
    torch.testing.assert_close(
        text.logits, layerwise.logits, atol=0, rtol=0
    )  # the prompt never sees the cache


@pytest.mark.parametrize("name", ["none", *SCRIPTS])
@pytest.mark.parametrize("cache", ["text", "layerwise"])
def test_cached_decoding_equals_recomputing_from_scratch(
    tiny_adapter: Adapter,
    layout: TokenLayout,
    embeddings: torch.Tensor,
    stock: tuple[Any, Any],
    name: str,
    cache: str,
) -> None:
    script = random_script(layout, *SCRIPTS[name]) if name != "none" else {}
    result, method = _run(tiny_adapter, layout, embeddings, script, cache)
    answer = [5, 301, 17, 17, 200]
    next_position = int(layout.position.max()) + 1
    steps = [
        decode_step(tiny_adapter, token, next_position + i, result.cache) for i, token in enumerate(answer)
    ]
    n_layers = tiny_adapter.n_layers
    alive = [method.alive_before(layer) for layer in range(1, n_layers + 1)]
    # layerwise: an answer token attends to what the layer processed; text: to what survived the whole prompt
    sees = alive if cache == "layerwise" else [method.alive_before(n_layers + 1)] * n_layers
    rows = torch.cat([embeddings, tiny_adapter.embed_text(torch.tensor(answer))])
    positions = torch.arange(next_position, next_position + len(answer)).expand(3, -1)
    whole = torch.cat([layout.position, positions], dim=1)
    expected = masked_forward(*stock, rows, whole, alive, sees, len(answer))
    torch.testing.assert_close(torch.stack([result.logits, *steps]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("style", ["ours", "published"])
def test_the_method_itself_equals_masking_what_it_dropped(
    tiny_adapter: Adapter,
    layout: TokenLayout,
    embeddings: torch.Tensor,
    stock: tuple[Any, Any],
    style: str,
) -> None:
    """Stages II and III with real scores: masking what they dropped in the stock network gives the same."""
    options = SelectionOptions()
    if style == "published":
        options = SelectionOptions(window_relevance="raw", decode_cache="text", budgets="published")
    geometry = tiny_adapter.geometry
    preset = match_preset(geometry.family, geometry.n_layers, geometry.hidden)
    preset = replace(preset, schedule=Schedule((2, 3), 5, 1.6, 0.1))
    n_windows = int(layout.window.max()) + 1
    counts = ClipCounts(layout.n_video, layout.n_audio, 3, n_windows, layout.n_text)
    plan = find_method("seats").plan(preset, 0.3, counts, replace(options, entry_scale=1.6))
    alive = torch.arange(len(layout))
    after: dict[int, torch.Tensor] = {}

    class Recording(Seats):
        def after_layer(self, layer: int, *rest: Any) -> Drop:
            nonlocal alive
            drop = super().after_layer(layer, *rest)
            alive = alive[drop.keep]
            after[layer] = torch.zeros(len(layout), dtype=torch.bool).index_fill(0, alive, True)
            return drop

    result = prefill(tiny_adapter, Recording(), plan, embeddings, layout)
    assert tuple(after) == plan.cut_layers == (2, 3, 4)
    assert plan.score_layers == (2, 3)
    seen = [Scripted(after, layout).alive_before(layer) for layer in range(1, tiny_adapter.n_layers + 1)]
    expected = masked_forward(*stock, embeddings, layout.position, seen)[0]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
    assert result.layer_counts[-1] == (layout.n_text, 0, 0)


def test_deepstack_features_go_with_their_tokens(qwen3_adapter: Adapter, layout: TokenLayout) -> None:
    """Some tokens never enter, more go at each cut; masking them in the whole sequence gives the same."""
    rng = torch.Generator().manual_seed(5)
    hidden, depth = qwen3_adapter.geometry.hidden, qwen3_adapter.geometry.deepstack_layers
    embeddings = torch.randn(len(layout), hidden, generator=rng)
    deepstack = torch.randn(depth, len(layout), hidden, generator=rng)
    deepstack[:, layout.kind != VIDEO] = 0.0
    enters = (layout.kind == TEXT) | (torch.rand(len(layout), generator=rng) < 0.7)
    keep = enters.nonzero().squeeze(1)
    inner = layout.subset(keep)
    script = random_script(inner, CUTS, LATE)
    method = Scripted(script, inner)
    plan = scripted_plan(qwen3_adapter.n_layers, inner, sorted(script), "layerwise")
    result = prefill(qwen3_adapter, method, plan, embeddings[keep], inner, deepstack=deepstack[:, keep])
    alive = []
    for layer in range(1, qwen3_adapter.n_layers + 1):
        whole = torch.zeros(len(layout), dtype=torch.bool)
        whole[keep] = method.alive_before(layer)
        alive.append(whole)
    thinker = qwen3_adapter.network
    stock = (thinker.model.language_model, thinker.lm_head)
    expected, without = (
        masked_forward(*stock, embeddings, layout.position, alive, deepstack=features)[0]
        for features in (deepstack, None)
    )
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=0)
    assert (without - expected).abs().max() > 1e-2  # else this test could not fail


def test_the_two_caches_do_differ_in_what_they_answer(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor
) -> None:
    script = random_script(layout, CUTS, LATE)
    next_position = int(layout.position.max()) + 1
    steps = [
        decode_step(
            tiny_adapter, 5, next_position, _run(tiny_adapter, layout, embeddings, script, cache)[0].cache
        )
        for cache in ("text", "layerwise")
    ]
    assert (steps[0] - steps[1]).abs().max() > 1e-2


def test_scores_are_asked_for_only_where_the_plan_wants_them(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor
) -> None:
    got: dict[int, torch.Tensor | None] = {}

    class Listening(Scripted):
        def after_layer(self, layer: int, scores: torch.Tensor | None, *rest: Any) -> Any:
            got[layer] = scores
            return super().after_layer(layer, scores, *rest)

    script = random_script(layout, CUTS, LATE)
    plan = scripted_plan(tiny_adapter.n_layers, layout, sorted(script), "layerwise")
    object.__setattr__(plan, "score_layers", CUTS)
    method = Listening(script, layout)
    prefill(tiny_adapter, method, plan, embeddings, layout)
    assert sorted(got) == [*CUTS, LATE]
    assert got[LATE] is None
    for layer in CUTS:
        scores = got[layer]
        assert scores is not None
        assert scores.shape == (int(method.alive_before(layer).sum()),)
        torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_runs_do_not_touch_each_other(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor
) -> None:
    script = random_script(layout, CUTS, LATE)
    first, _ = _run(tiny_adapter, layout, embeddings, script, "text")
    _run(tiny_adapter, layout, -embeddings, {}, "layerwise")
    again, _ = _run(tiny_adapter, layout, embeddings, script, "text")
    assert torch.equal(first.logits, again.logits)


def test_progress_names_every_layer(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor
) -> None:
    told: list[tuple[int, int]] = []
    plan = scripted_plan(tiny_adapter.n_layers, layout, (), "layerwise")
    cache = LayerCache(tiny_adapter.n_layers)
    result = prefill(
        tiny_adapter,
        Scripted({}, layout),
        plan,
        embeddings,
        layout,
        cache=cache,
        on_layer=lambda done, total: told.append((done, total)),
    )
    assert told == [(i, 6) for i in range(1, 7)]
    assert result.cache is cache


@pytest.mark.parametrize("first_layer", [1, 2, 4, 6, 7])
def test_a_run_can_begin_with_what_another_put_out(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor, first_layer: int
) -> None:
    """Cutting a kept output and going on equals cutting there in a run of its own, and hurts neither."""
    outputs = [embeddings]
    plan = scripted_plan(tiny_adapter.n_layers, layout, (), "layerwise")
    whole = prefill(
        tiny_adapter,
        Scripted({}, layout),
        plan,
        embeddings,
        layout,
        on_output=lambda layer, hidden: outputs.append(hidden[0]),
    )
    assert len(outputs) == tiny_adapter.n_layers + 1
    kept = random_script(layout, (3,), None)[3]
    keep = kept.nonzero().squeeze(1)
    cache = whole.cache.fork(first_layer - 1)
    resumed = prefill(
        tiny_adapter,
        Scripted({}, layout),
        plan,
        outputs[first_layer - 1][keep],
        layout.subset(keep),
        cache=cache,
        first_layer=first_layer,
    )
    assert len(resumed.layer_counts) == tiny_adapter.n_layers + 1 - first_layer
    if first_layer == 1:  # nothing comes before it to cut after
        own = prefill(tiny_adapter, Scripted({}, layout), plan, embeddings[keep], layout.subset(keep))
    else:
        own, _ = _run(tiny_adapter, layout, embeddings, {first_layer - 1: kept}, "layerwise")
    torch.testing.assert_close(resumed.logits, own.logits, atol=1e-5, rtol=0)
    assert resumed.cache.lengths == own.cache.lengths
    next_position = int(layout.position.max()) + 1
    for step, token in enumerate((5, 301)):
        ours, theirs = (
            decode_step(tiny_adapter, token, next_position + step, run.cache) for run in (resumed, own)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert whole.cache.lengths == (len(layout),) * tiny_adapter.n_layers


def test_output_is_told_before_it_is_cut(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor
) -> None:
    script = random_script(layout, CUTS, LATE)
    plan = scripted_plan(tiny_adapter.n_layers, layout, sorted(script), "layerwise")
    told: dict[int, int] = {}
    result = prefill(
        tiny_adapter,
        Scripted(script, layout),
        plan,
        embeddings,
        layout,
        on_output=lambda layer, hidden: told.update({layer: hidden.shape[1]}),
    )
    assert told == {layer: sum(counts) for layer, counts in enumerate(result.layer_counts, start=1)}


def test_a_cache_that_forgets_needs_every_layer(
    tiny_adapter: Adapter, layout: TokenLayout, embeddings: torch.Tensor
) -> None:
    script = random_script(layout, CUTS, LATE)
    method = Scripted(script, layout)
    plan = scripted_plan(tiny_adapter.n_layers, layout, sorted(script), "text")
    with pytest.raises(ValueError, match="decode_cache=text needs all layers"):
        prefill(tiny_adapter, method, plan, embeddings, layout, first_layer=3)
    layerwise = scripted_plan(tiny_adapter.n_layers, layout, sorted(script), "layerwise")
    after = prefill(tiny_adapter, method, layerwise, embeddings, layout, first_layer=LATE + 1)
    assert after.drops == ()  # cuts after layers that are not run are not made


def test_bfloat16_gives_float32_logits(
    make_checkpoint: Callable[[TinySpec], Path], layout: TokenLayout
) -> None:
    from seats_cli.model.load import load_model

    adapter = load_model(str(make_checkpoint(TinySpec())), device="cpu", dtype="bfloat16")
    rows = torch.randn(len(layout), adapter.geometry.hidden).to(torch.bfloat16)
    result, _ = _run(adapter, layout, rows, random_script(layout, CUTS, LATE), "text")
    assert result.logits.dtype == torch.float32
    assert result.logits.isfinite().all()
