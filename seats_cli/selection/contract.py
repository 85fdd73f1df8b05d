"""What a method is given, what it gives back, and the base class of all methods."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from seats_cli.presets import Preset
from seats_cli.selection.diversity import merge_dropped
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Kind, Plan
from seats_cli.selection.transfer import on_device


@dataclass(frozen=True)
class MediaTokens:
    """Tokens of one kind on their way to the LLM: whole stage-I windows in time order.

    embeddings:  (N, D) what the LLM would read, any float dtype
    saliency:    (N,) float32, attention received in the encoder's last block; None where the plan needs none
    first_token: index of the first of them among all the clip's tokens of this kind, so that what a method
                 does to a window does not depend on how the stream was cut
    layout:      the rows of these N tokens in the prompt's layout: windows, positions, times
    other:       scope "clip" only: the other kind's tokens, for methods that let one kind guide the other
    """

    kind: Kind
    embeddings: torch.Tensor
    saliency: torch.Tensor | None = None
    first_token: int = 0
    layout: TokenLayout | None = None
    other: "MediaTokens | None" = None


@dataclass(frozen=True)
class Kept:
    """What is left of `MediaTokens`.

    indices:    (K,) int64, sorted, into the clip's tokens of this kind (`first_token` is already added)
    embeddings: (K, D) of the same dtype as came in; merged ones where the method merges
    """

    indices: torch.Tensor
    embeddings: torch.Tensor


@dataclass(frozen=True)
class Drop:
    """What stays after a layer.

    keep:   (K,) int64, sorted, into the sequence as that layer saw it; every text token is in it
    counts: (text, video, audio) tokens left, on the host, so that nobody has to ask the device again
    """

    keep: torch.Tensor
    counts: tuple[int, int, int]


class Method:
    """The contract. The defaults keep everything before the LLM and make the late cut inside it.

    name, summary:  for `--method` and its help, one line
    source:         where it is from: a citation, or "ours"
    scope:          "window" if `before_llm` may be called window by window, "clip" if it needs all of a kind
    needs_saliency: whether it reads the encoders' saliency; `Plan.needs_saliency` says so for one plan
    needs_scores:   whether it reads attention scores; `Plan.score_layers` says at which layers
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[Literal["window", "clip"]] = "window"
    needs_saliency: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def plan(self, preset: Preset, ratio: float, counts: ClipCounts, options: SelectionOptions) -> Plan:
        """The plan that meets `ratio` on a clip with these counts. Raises PlanError naming what to change."""
        raise NotImplementedError

    def before_llm(self, tokens: MediaTokens, plan: Plan) -> Kept:
        """Choose, and perhaps merge, among tokens that wait for the LLM."""
        return keep_everything(tokens)

    def after_layer(self, layer: int, scores: torch.Tensor | None, layout: TokenLayout, plan: Plan) -> Drop:
        """Choose what goes on after 1-based `layer`, one of `plan.cut_layers`.

        scores: (S,) float32, attention received from the last text token, where the plan asks for it.
        """
        if plan.late_layer is None or layer != plan.late_layer - 1:
            raise ValueError(f"{self.name} drops nothing after layer {layer}")
        return keep_text(layout)


def keep_everything(tokens: MediaTokens) -> Kept:
    """All tokens, untouched."""
    n_tokens = tokens.embeddings.shape[0]
    start = tokens.first_token
    indices = torch.arange(start, start + n_tokens, device=tokens.embeddings.device)
    return Kept(indices, tokens.embeddings)


def keep_text(layout: TokenLayout) -> Drop:
    """Stage III: text only. No device-to-host sync."""
    return drop_to(layout.kind == TEXT, (layout.n_text, 0, 0))


def drop_to(mask: torch.Tensor, counts: tuple[int, int, int]) -> Drop:
    """The drop that keeps where `mask` (S,) bool is True, given how many of each kind that is. No sync."""
    order = (~mask).to(torch.uint8).argsort(stable=True)
    return Drop(order[: sum(counts)], counts)


def counted_drop(mask: torch.Tensor, layout: TokenLayout) -> Drop:
    """The same where only the device knows the counts: one sync, for the new sequence length."""
    kept = torch.stack([(mask & (layout.kind == kind)).sum() for kind in (VIDEO, AUDIO)]).tolist()
    return drop_to(mask, (layout.n_text, kept[0], kept[1]))


def by_windows(
    tokens: MediaTokens,
    plan: Plan,
    choose: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, int], torch.Tensor],
    *,
    merge: bool = False,
) -> Kept:
    """Apply `choose` to the stage-I windows of `tokens`, all windows of one size and keep in one batch.

    choose(embeddings (B, N, D), saliency (B, N) or None, indices (B, N), n_keep) returns (B, n_keep) int64
    positions in each window, ascending; `indices` are the tokens' places in the clip. Raises ValueError for
    part windows.
    """
    embeddings, device = tokens.embeddings, tokens.embeddings.device
    n_tokens, width = embeddings.shape
    groups: dict[tuple[int, int], list[int]] = {}
    start = 0
    for size, n_keep in plan.keeps_in(tokens.kind, tokens.first_token, n_tokens):
        groups.setdefault((size, n_keep), []).append(start)
        start += size
    chosen, values = [], []
    for (size, n_keep), starts in groups.items():
        rows = _starts(starts, device)[:, None] + torch.arange(size, device=device)
        inputs = embeddings[rows]
        saliency = None if tokens.saliency is None else tokens.saliency[rows]
        keep = choose(inputs, saliency, rows + tokens.first_token, n_keep)
        chosen.append(rows.gather(1, keep).flatten())
        if merge and n_keep < size:
            values.append(merge_dropped(inputs, keep).view(-1, width))
        else:
            values.append(embeddings[chosen[-1]])
    if not chosen:
        return keep_everything(tokens)
    indices, order = torch.cat(chosen).sort()
    return Kept(indices + tokens.first_token, torch.cat(values)[order])


def _starts(starts: list[int], device: torch.device) -> torch.Tensor:
    """The numbers as a tensor on `device`, which the host does not wait for."""
    step = starts[1] - starts[0] if len(starts) > 1 else 1
    if starts == list(range(starts[0], starts[-1] + 1, step)):
        return torch.arange(starts[0], starts[-1] + 1, step, device=device)
    return on_device(torch.tensor(starts), device)
