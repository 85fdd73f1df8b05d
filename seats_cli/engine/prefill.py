"""The language model reads the prompt, and loses tokens on the way: stages II and III.

This loop is the slow, obvious reference that faster ones must equal (docs/method.md, "Stage II" and
"Stage III").
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.model.adapter import Adapter, Rotary
from seats_cli.model.kernels import quick_attention
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.methods import Drop, Method
from seats_cli.selection.plan import Plan

Counts = tuple[int, int, int]  # tokens of kind text, video, audio


@dataclass(frozen=True)
class DropRecord:
    """One cut inside the LLM.

    after_layer: 1-based; layers after it no longer see what was dropped
    before, after: tokens of each kind on either side of the cut
    layout: of what is left, on the device, to show which stretches of the clip were kept
    """

    after_layer: int
    before: Counts
    after: Counts
    layout: TokenLayout


@dataclass(frozen=True)
class Prefilled:
    """The prompt, read.

    logits:       (V,) float32 for the token that follows the prompt
    cache:        keys and values for the answer's tokens to attend to
    layer_counts: tokens of each kind that each layer processed, the first that was run first
    drops:        the cuts that were made, in order
    layout:       of the tokens that came out of the last layer
    """

    logits: torch.Tensor
    cache: LayerCache
    layer_counts: tuple[Counts, ...]
    drops: tuple[DropRecord, ...]
    layout: TokenLayout


def prefill(
    adapter: Adapter,
    method: Method,
    plan: Plan,
    embeddings: torch.Tensor,
    layout: TokenLayout,
    *,
    cache: LayerCache | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    first_layer: int = 1,
    on_output: Callable[[int, torch.Tensor], None] | None = None,
    deepstack: torch.Tensor | None = None,
) -> Prefilled:
    """Run embeddings (S, D), laid out as `layout`, through all layers, cutting where `plan` says.

    No attention mask is ever built, and the device is waited for only where a middle drop makes a new length.
    `cache` must be empty (default: a new one); `on_layer(done, total)` reports progress. `deepstack`
    (E, S, D) is `ModelInput.deepstack`, of the same tokens.

    Runs that begin alike can share their beginning: `on_output(layer, hidden)` gets each layer's output
    (1, S, D) before anything is cut from it, and with `first_layer` above 1 the `embeddings` are rows of the
    output of the layer before it, while `cache` has the layers before it filled already (`LayerCache.fork`).
    These are not run, and what is cut later stays in their caches: ValueError where `plan` wants it out.
    """
    cache = LayerCache(adapter.n_layers) if cache is None else cache
    cuts = [layer for layer in plan.cut_layers if layer >= first_layer]
    adapter.check_cuts(cuts)
    if first_layer > 1 and cuts and plan.options.decode_cache == "text":
        raise ValueError(f"decode_cache=text needs all layers, not those from {first_layer} on")
    layout = layout.to(adapter.device)
    hidden = embeddings[None]
    rotary = adapter.rotary(layout.position)
    layer_counts: list[Counts] = []
    drops: list[DropRecord] = []

    with nullcontext() if adapter.fused else quick_attention(hidden.device, len(layout)):
        for layer in range(first_layer, adapter.n_layers + 1):
            hidden = adapter.run_layer(layer - 1, hidden, rotary, cache, deepstack)
            layer_counts.append(layout.counts)
            if on_output is not None:
                on_output(layer, hidden)
            if layer in cuts:
                scores = None
                if layer in plan.score_layers:
                    scores = adapter.last_token_attention(layer - 1, hidden, rotary).to(layout.kind.device)
                drop = method.after_layer(layer, scores, layout, plan)
                if plan.options.decode_cache == "text":  # as published: the layers already passed forget too
                    for passed in range(layer):
                        cache.trim(passed, drop.keep)
                before = layout.counts
                hidden, layout, rotary = _keep_only(drop, hidden, layout, rotary)
                deepstack = None  # no cut comes before the layers that it is for (`Adapter.check_cuts`)
                drops.append(DropRecord(layer, before, layout.counts, layout))
            if on_layer is not None:
                on_layer(layer, adapter.n_layers)

    logits = adapter.final_logits(hidden, last_only=True)[0, -1].float()
    return Prefilled(logits, cache, tuple(layer_counts), tuple(drops), layout)


def _keep_only(
    drop: Drop, hidden: torch.Tensor, layout: TokenLayout, rotary: Rotary
) -> tuple[torch.Tensor, TokenLayout, Rotary]:
    """What goes on to the next layer: hidden states, layout and rotary embedding of the kept tokens.

    Layers may sit on several devices, so each tensor is cut where it lies. Positions stay as they were.
    """
    cos, sin = rotary
    kept_hidden = hidden.index_select(1, drop.keep.to(hidden.device))
    at_rotary = drop.keep.to(cos.device)
    kept_rotary = (cos.index_select(1, at_rotary), sin.index_select(1, at_rotary))
    return kept_hidden, layout.subset(drop.keep, drop.counts), kept_rotary
