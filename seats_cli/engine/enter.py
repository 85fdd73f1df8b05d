"""Stage I, and what of a clip enters the language model: tokens, their layout, their deepstack features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from seats_cli.errors import MediaError
from seats_cli.measure.clock import Stopwatch
from seats_cli.model.adapter import Adapter, Encoded, Prompt
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import Kept, MediaTokens, Method
from seats_cli.selection.plan import Kind, Plan
from seats_cli.selection.transfer import on_device

CODES: dict[Kind, int] = {"video": VIDEO, "audio": AUDIO}


@dataclass(frozen=True)
class ModelInput:
    """What the first decoder layer is given.

    embeddings: (S, D) in the adapter's dtype on its device, text and kept media in prompt order
    layout:     of these S tokens, on the same device
    kept:       (S,) int64, sorted: where each of them stood in the prompt
    deepstack:  (E, S, D), added to the outputs of the first E layers, zeros where a token has nothing to add;
                None where none has (`Adapter.run_layer`)
    """

    embeddings: torch.Tensor
    layout: TokenLayout
    kept: torch.Tensor
    deepstack: torch.Tensor | None = None


def slots_of(layout: TokenLayout, code: int) -> torch.Tensor:
    """Indices of a kind's tokens in the sequence, (n,) int64."""
    return (layout.kind == code).nonzero().squeeze(1)


@dataclass(frozen=True)
class Choice:
    """What decides which tokens go on to the LLM."""

    method: Method
    plan: Plan
    clock: Stopwatch


@dataclass(frozen=True)
class Entering:
    """What of a kind goes on to the LLM.

    indices:    (K,) int64, sorted, into the clip's tokens of the kind
    embeddings: (K, D)
    deepstack:  (E, K, D), the same tokens' features for the first layers, or None. What a method merges into
                a kept token's embedding leaves its features as they are.
    """

    indices: torch.Tensor
    embeddings: torch.Tensor
    deepstack: torch.Tensor | None

    @classmethod
    def of(cls, kept: Kept, encoded: Encoded, first: int = 0) -> "Entering":
        """What was kept of tokens that `first` others of the clip come before."""
        features = encoded.deepstack
        if features is not None:
            features = features.index_select(1, kept.indices - first)
        return cls(kept.indices, kept.embeddings, features)

    @classmethod
    def join(cls, parts: Sequence["Entering"]) -> "Entering":
        """One after the other; at least one part."""
        features = [part.deepstack for part in parts if part.deepstack is not None]
        return cls(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.embeddings for part in parts]),
            torch.cat(features, dim=1) if features else None,
        )


def choose_by_window(
    choice: Choice,
    streams: dict[Kind, Iterable[Encoded]],
    layout: TokenLayout,
    slots: dict[Kind, torch.Tensor],
) -> dict[Kind, Entering]:
    """Stage I on each batch as it comes; only what is kept stays in memory."""
    entering: dict[Kind, Entering] = {}
    for kind, stream in streams.items():
        parts: list[Entering] = []
        first = 0
        for encoded in stream:
            _check_batch(choice.plan, kind, first, len(encoded))
            with choice.clock.stage("select"):
                tokens = _media_tokens(kind, encoded, first, layout, slots[kind])
                kept = choice.method.before_llm(tokens, choice.plan)
                parts.append(Entering.of(kept, encoded, first))
            first += len(encoded)
        check_count(kind, first, choice.plan.count(kind))
        entering[kind] = Entering.join(parts)
    return entering


def choose_by_clip(
    choice: Choice,
    streams: dict[Kind, Iterable[Encoded]],
    layout: TokenLayout,
    slots: dict[Kind, torch.Tensor],
) -> dict[Kind, Entering]:
    """Stage I on a kind's whole clip at once, the other kind at hand."""
    held: dict[Kind, Encoded] = {}
    whole: dict[Kind, MediaTokens] = {}
    for kind, stream in streams.items():
        parts = list(stream)
        held[kind] = Encoded.join(parts)
        check_count(kind, len(held[kind]), choice.plan.count(kind))
        whole[kind] = _media_tokens(kind, held[kind], 0, layout, slots[kind])
    entering: dict[Kind, Entering] = {}
    for kind, tokens in whole.items():
        other = next((whole[name] for name in whole if name != kind), None)
        both = MediaTokens(kind, tokens.embeddings, tokens.saliency, 0, tokens.layout, other)
        with choice.clock.stage("select"):
            kept = choice.method.before_llm(both, choice.plan)
            entering[kind] = Entering.of(kept, held[kind])
    return entering


def _media_tokens(
    kind: Kind, encoded: Encoded, first: int, layout: TokenLayout, slots: torch.Tensor
) -> MediaTokens:
    n = len(encoded)
    counts = (0, n, 0) if kind == "video" else (0, 0, n)
    rows = layout.subset(slots[first : first + n], counts)
    return MediaTokens(kind, encoded.embeddings, encoded.saliency, first, rows)


def _check_batch(plan: Plan, kind: Kind, first: int, n: int) -> None:
    """All batches but a kind's last consist of whole stage-I windows; none goes past what was announced."""
    short = n % plan.window(kind) and first + n < plan.count(kind)
    if short or first + n > plan.count(kind):
        check_count(kind, first + n, plan.count(kind))


def check_count(kind: str, found: int, expected: int) -> None:
    """The prompt was laid out for so many tokens; a file that changed since would put words out of place."""
    if found != expected:
        raise MediaError(
            f"the {kind} became {found} tokens, not the {expected} announced",
            hint="the file changes while it is read, or is damaged",
        )


# ---- the sequence -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRows:
    """The tokens that no method drops: text, and what an image became.

    slots: (N,) int64, sorted, in the prompt; rows: (N, D); both on the device
    image: (n_image,) int64, which of these rows are the image's, and their deepstack features; or None
    """

    slots: torch.Tensor
    rows: torch.Tensor
    image: tuple[torch.Tensor, torch.Tensor] | None = None


def text_rows(adapter: Adapter, prompt: Prompt, image: Encoded | None) -> TextRows:
    """Embed the prompt's text, and put an image's embeddings into their places."""
    slots = slots_of(prompt.layout, TEXT)
    rows = adapter.embed_text(prompt.input_ids[slots])
    if image is None:
        return TextRows(on_device(slots, rows.device), rows)
    of_image = on_device(torch.searchsorted(slots, prompt.image_slots), rows.device)
    rows[of_image] = image.embeddings.to(rows)
    features = None if image.deepstack is None else (of_image, image.deepstack)
    return TextRows(on_device(slots, rows.device), rows, features)


def assemble(
    written: TextRows,
    layout: TokenLayout,
    slots: dict[Kind, torch.Tensor],
    entering: dict[Kind, Entering],
) -> ModelInput:
    """Text, all of it, and the kept media in prompt order. `layout` is the prompt's, on the device."""
    text = written.rows
    places, rows = [written.slots], [text]
    features = [] if written.image is None else [written.image]  # at which of the rows, what
    n_kept = {"video": 0, "audio": 0}
    for kind, chosen in entering.items():
        if chosen.deepstack is not None:
            start = sum(map(len, rows))
            these = torch.arange(start, start + len(chosen.indices), device=text.device)
            features.append((these, chosen.deepstack))
        places.append(slots[kind][chosen.indices])
        rows.append(chosen.embeddings.to(text))
        n_kept[kind] = len(chosen.indices)
    kept_slots, order = torch.cat(places).sort()
    counts = (len(text), n_kept["video"], n_kept["audio"])
    deepstack = None
    if features:
        deepstack = text.new_zeros(len(features[0][1]), len(order), text.shape[1])
        for at, values in features:
            deepstack[:, at] = values.to(text)
        deepstack = deepstack.index_select(1, order)
    return ModelInput(torch.cat(rows)[order], layout.subset(kept_slots, counts), kept_slots, deepstack)
