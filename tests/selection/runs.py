"""A clip through a method from the encoders to the last layer, on random tensors and without a network."""

from dataclasses import dataclass, replace

import torch

from layouts import clip_layout
from seats_cli.selection.contract import Kept, MediaTokens, Method
from seats_cli.selection.layout import AUDIO, VIDEO, TokenLayout
from seats_cli.selection.plan import ClipCounts, Kind, Plan

CODES: dict[Kind, int] = {"video": VIDEO, "audio": AUDIO}
WIDTH = 12


@dataclass(frozen=True)
class Run:
    """kept: of each kind present; layers: (text, video, audio) in each layer; layouts: the first layer's and
    that after each cut."""

    kept: dict[Kind, Kept]
    layers: list[tuple[int, int, int]]
    layouts: list[TokenLayout]

    def retention(self, counts: ClipCounts) -> float:
        """Mean over layers of video and audio tokens, of those there were."""
        seen = sum(video + audio for _, video, audio in self.layers)
        return seen / (len(self.layers) * (counts.n_video + counts.n_audio))


def media_of(
    counts: ClipCounts,
    plan: Plan,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    flat: bool = False,
) -> dict[Kind, MediaTokens]:
    """Random tokens of each kind present, the other kind at hand; `flat`: all alike, saliency zero."""
    prompt = clip_layout(counts, plan.video_window, plan.audio_window)
    generator = torch.Generator().manual_seed(seed)
    alone: dict[Kind, MediaTokens] = {}
    for kind, code in CODES.items():
        n_tokens = plan.count(kind)
        if not n_tokens:
            continue
        embeddings = torch.randn(n_tokens, WIDTH, generator=generator).to(dtype)
        saliency = torch.rand(n_tokens, generator=generator)
        if flat:
            embeddings, saliency = embeddings[:1].expand(n_tokens, -1).contiguous(), torch.zeros(n_tokens)
        rows = prompt.subset((prompt.kind == code).nonzero().squeeze(1))
        alone[kind] = MediaTokens(kind, embeddings, saliency if plan.needs_saliency else None, 0, rows)
    return {
        kind: replace(tokens, other=next((alone[name] for name in alone if name != kind), None))
        for kind, tokens in alone.items()
    }


def run(method: Method, plan: Plan, counts: ClipCounts, media: dict[Kind, MediaTokens]) -> Run:
    """What the engine does, with random attention scores."""
    prompt = clip_layout(counts, plan.video_window, plan.audio_window)
    kept = {kind: method.before_llm(tokens, plan) for kind, tokens in media.items()}
    enters = prompt.kind == 0
    for kind, one in kept.items():
        enters[(prompt.kind == CODES[kind]).nonzero().squeeze(1)[one.indices]] = True
    layout = prompt.subset(enters.nonzero().squeeze(1))
    generator = torch.Generator().manual_seed(11)
    layers, layouts = [], [layout]
    for layer in range(1, plan.n_layers + 1):
        layers.append(layout.counts)
        if layer in plan.cut_layers:
            scores = torch.rand(len(layout), generator=generator) if layer in plan.score_layers else None
            drop = method.after_layer(layer, scores, layout, plan)
            assert (drop.keep.diff() > 0).all()
            assert drop.counts == layout.subset(drop.keep).counts
            layout = layout.subset(drop.keep, drop.counts)
            layouts.append(layout)
    return Run(kept, layers, layouts)
