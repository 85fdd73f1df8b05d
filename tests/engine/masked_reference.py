"""Slow, obvious statements of what the engine must equal: the stock network with attention masks."""

from collections.abc import Sequence
from typing import Any

import torch

from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import Drop, Method
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import DropStep, Plan, Stage


def random_layout(n_text_before: int, n_media: int, n_text_after: int, seed: int = 0) -> TokenLayout:
    """Text, then video and audio tokens mixed over windows with uneven 3-D positions, then text."""
    rng = torch.Generator().manual_seed(seed)
    media = torch.randint(VIDEO, AUDIO + 1, (n_media,), generator=rng)
    kind = torch.cat([torch.zeros(n_text_before), media, torch.zeros(n_text_after)]).to(torch.int8)
    window = torch.full((len(kind),), -1, dtype=torch.int32)
    window[kind != TEXT] = torch.arange(n_media, dtype=torch.int32) // 6
    position = torch.arange(len(kind)).repeat(3, 1)
    position[1:, kind == VIDEO] += torch.randint(0, 5, (2, int((kind == VIDEO).sum())), generator=rng)
    position[:, n_text_before + n_media :] += 7  # text goes on beyond the largest media position
    per_kind = torch.bincount(kind.long(), minlength=3).tolist()
    return TokenLayout(kind, window, position, torch.zeros(len(kind)), tuple(per_kind))


class Scripted(Method):
    """Keeps, after each given layer, the media tokens that a script names by their place in the prompt."""

    name = "scripted"

    def __init__(self, kept_after: dict[int, torch.Tensor], layout: TokenLayout) -> None:
        self.kept_after = kept_after  # layer -> (S,) bool over the whole prompt, text True
        self.whole = layout

    def after_layer(self, layer: int, scores: torch.Tensor | None, layout: TokenLayout, plan: Plan) -> Drop:
        alive = self.alive_before(layer)
        keep = self.kept_after[layer][alive].nonzero().squeeze(1)
        kinds = torch.bincount(layout.kind[keep].long(), minlength=3).tolist()
        return Drop(keep, tuple(kinds))

    def alive_before(self, layer: int) -> torch.Tensor:
        """Which tokens `layer` processes, (S,) bool."""
        alive = torch.ones(len(self.whole), dtype=torch.bool)
        for cut, kept in self.kept_after.items():
            if cut < layer:
                alive &= kept
        return alive


def scripted_plan(n_layers: int, layout: TokenLayout, cuts: Sequence[int], decode_cache: str) -> Plan:
    """A plan that cuts after these layers; the numbers that a script does not read are neutral."""
    return Plan(
        method="scripted",
        preset="none",
        ratio=0.5,
        n_layers=n_layers,
        n_video=layout.n_video,
        n_audio=layout.n_audio,
        n_windows=1,
        tokens_per_grid=1,
        retention_video=0.5,
        retention_audio=0.5,
        entry_video=1.0,
        entry_audio=1.0,
        video_window=2,
        audio_window=50,
        drops=tuple(DropStep(layer, 0.5, 0.5) for layer in cuts),
        late_layer=None,
        stages=tuple(Stage(f"after layer {layer}", layer, 0, 0) for layer in cuts),
        expected_retention=0.5,
        options=SelectionOptions(decode_cache=decode_cache),  # type: ignore[arg-type]
        needs_saliency=False,
        score_layers=tuple(cuts),
    )


def random_script(
    layout: TokenLayout, cuts: Sequence[int], late: int | None, seed: int = 1
) -> dict[int, torch.Tensor]:
    """Layer -> tokens kept after it: about half of the media each time, none after `late`."""
    rng = torch.Generator().manual_seed(seed)
    script = {}
    alive = torch.ones(len(layout), dtype=torch.bool)
    for layer in cuts:
        alive = alive & ((layout.kind == TEXT) | (torch.rand(len(layout), generator=rng) < 0.6))
        script[layer] = alive
    if late is not None:
        script[late] = layout.kind == TEXT
    return script


def masked_forward(
    language_model: Any,
    head: Any,
    embeddings: torch.Tensor,
    position: torch.Tensor,
    alive_per_layer: Sequence[torch.Tensor],
    answer_sees: Sequence[torch.Tensor] | None = None,
    n_answer: int = 0,
    deepstack: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (n_answer + 1, V) of the prompt's last token and the answer's, by masking the full sequence.

    `language_model` and `head` are stock modules. In each layer a token attends to earlier ones that it
    processes: `alive_per_layer` (P,) bool over the prompt. Answer tokens (the last `n_answer`) attend to the
    prompt tokens in `answer_sees` (per layer) instead. `deepstack` (E, P, D) is added behind the first
    layers.
    """
    n = embeddings.shape[0]
    n_prompt = n - n_answer
    rotary = language_model.rotary_emb(embeddings[None], position[:, None])
    hidden = embeddings[None]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for i, layer in enumerate(language_model.layers):
        seen = torch.cat([alive_per_layer[i], torch.ones(n_answer, dtype=torch.bool)])
        allowed = causal & seen[None, :]
        if n_answer and answer_sees is not None:
            allowed[n_prompt:, :n_prompt] = answer_sees[i][None, :]
        allowed |= torch.eye(
            n, dtype=torch.bool
        )  # rows of dropped tokens must not be empty; nobody reads them
        mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        if deepstack is not None and i < len(deepstack):
            hidden = hidden + deepstack[i]
    return head(language_model.norm(hidden))[0, n_prompt - 1 :]
