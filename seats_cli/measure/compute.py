"""What a plan costs, counted and not measured: multiply-adds of the prefill and the encoders, bytes of the
cache.

Pure functions over a network's sizes. As the paper counts, 1 multiply-add is 1 FLOP, and norms, softmax,
rotary embeddings and biases are left out. Source: docs/method.md, "What is counted" (arXiv 2605.20035).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from seats_cli.selection.plan import Plan, Stage


class LanguageSizes(Protocol):
    """The sizes of a decoder; `seats_cli.model.adapter.Geometry` has them, and `LanguageGeometry` below.

    mlp: width of one token's MLP, of one expert in a mixture; experts: how many a mixture has;
    active_experts: those that a token runs through, 0 if it is no mixture; shared_mlp: width of what every
    token runs through besides.
    """

    @property
    def n_layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def active_experts(self) -> int: ...
    @property
    def shared_mlp(self) -> int: ...


class EncoderSizes(Protocol):
    """The sizes of an Omni family's encoders; `seats_cli.model.adapter.Geometry` has them and says what they
    are."""

    @property
    def hidden(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def merge(self) -> int: ...
    @property
    def temporal_patch(self) -> int: ...
    @property
    def vision_layers(self) -> int: ...
    @property
    def vision_hidden(self) -> int: ...
    @property
    def vision_mlp(self) -> int: ...
    @property
    def vision_full_layers(self) -> int: ...
    @property
    def vision_window_patches(self) -> int: ...
    @property
    def audio_layers(self) -> int: ...
    @property
    def audio_hidden(self) -> int: ...
    @property
    def audio_mlp(self) -> int: ...
    @property
    def audio_chunk(self) -> int: ...
    @property
    def mel_bins(self) -> int: ...
    @property
    def vision_mlp_products(self) -> int: ...
    @property
    def deepstack_layers(self) -> int: ...
    @property
    def audio_stem_width(self) -> int: ...
    @property
    def audio_stem_frames(self) -> int: ...


@dataclass(frozen=True)
class LanguageGeometry:
    """`LanguageSizes` on their own, for counting without a model."""

    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    experts: int = 0
    active_experts: int = 0
    shared_mlp: int = 0


# --- tokens per layer -------------------------------------------------------------------------------------


def layer_counts(
    stages: Sequence[Stage], n_layers: int, before: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """(video, audio) tokens in each layer, the first layer first; `before`: what there was before stage I."""
    counts: list[tuple[int, int]] = []
    for layer in range(1, n_layers + 1):
        passed = [stage for stage in stages if stage.after_layer < layer]
        counts.append((passed[-1].n_video, passed[-1].n_audio) if passed else before)
    return tuple(counts)


def layer_lengths(plan: Plan, n_text: int) -> tuple[int, ...]:
    """Tokens of all kinds that each layer is expected to process under a plan."""
    counts = layer_counts(plan.stages, plan.n_layers, (plan.n_video, plan.n_audio))
    return tuple(n_text + video + audio for video, audio in counts)


def mean_retention(counts: Sequence[tuple[int, int]], before: tuple[int, int]) -> float:
    """The retention ratio R: the mean over layers of (video + audio processed / before); 1 without any."""
    if not sum(before):
        return 1.0
    return sum(video + audio for video, audio in counts) / (len(counts) * sum(before))


# --- language model ---------------------------------------------------------------------------------------


def layer_flops(length: int, geometry: LanguageSizes, *, as_run: bool = False) -> int:
    """One decoder layer on `length` tokens: 2 S D^2 + 2 S D D_kv + 2 S^2 D + 3 S D I.

    As the paper counts: queries are as wide as the hidden state, attention is not halved for causality, and a
    mixture counts the experts that run, not the router. `as_run`: queries as wide as they are (in Qwen3-Omni
    twice the hidden state), and the router.
    """
    width, key_width = geometry.hidden, geometry.n_kv_heads * geometry.head_dim
    query_width = geometry.n_heads * geometry.head_dim if as_run else width
    router = geometry.experts if as_run else 0
    mlp = geometry.mlp * max(geometry.active_experts, 1) + geometry.shared_mlp
    projections = length * width * (2 * query_width + 2 * key_width + router)
    return projections + 2 * length**2 * query_width + 3 * length * width * mlp


def prefill_flops(
    lengths: Sequence[int],
    geometry: LanguageSizes,
    *,
    head_tokens: int | None = None,
    as_run: bool = False,
) -> int:
    """The prefill on `lengths[l]` tokens in layer l, with the language head on `head_tokens` of them.

    By default the head runs on all that the last layer processes, as the paper counts; our engine runs it on
    the last token only (`head_tokens=1`). `as_run`: see `layer_flops`. Raises ValueError unless there is one
    length a layer.
    """
    if len(lengths) != geometry.n_layers:
        raise ValueError(f"{len(lengths)} lengths for {geometry.n_layers} layers")
    head = lengths[-1] if head_tokens is None else head_tokens
    layers = sum(layer_flops(length, geometry, as_run=as_run) for length in lengths)
    return layers + head * geometry.hidden * geometry.vocab


def score_flops(length: int, geometry: LanguageSizes) -> int:
    """One row of last-token attention over `length` tokens: their keys, one query, one row of products."""
    width = geometry.hidden
    query_width = geometry.n_heads * geometry.head_dim
    return (
        length * width * geometry.n_kv_heads * geometry.head_dim + width * query_width + length * query_width
    )


def kv_bytes(lengths: Sequence[int], geometry: LanguageSizes, bytes_per_number: int) -> int:
    """Keys and values of `lengths[l]` tokens in layer l's cache, for `decode_cache="layerwise"` as it stands.

    For "text", give `text_cache_lengths`.
    """
    return 2 * sum(lengths) * geometry.n_kv_heads * geometry.head_dim * bytes_per_number


def text_cache_lengths(plan: Plan, n_text: int) -> tuple[int, ...]:
    """What `decode_cache="text"` leaves: every layer holds only the tokens that outlived all drops."""
    if not plan.stages:
        return (n_text + plan.n_video + plan.n_audio,) * plan.n_layers
    last = plan.stages[-1]
    return (n_text + last.n_video + last.n_audio,) * plan.n_layers


# --- encoders ---------------------------------------------------------------------------------------------


def vision_flops(grid: tuple[int, int, int], geometry: EncoderSizes) -> int:
    """The vision encoder on a grid of (t, h, w) patches, with patch embedding and mergers.

    Attention reaches over a whole grid in `vision_full_layers`, over at most `vision_window_patches`
    elsewhere.
    """
    grids, height, width = grid
    per_grid = height * width
    patches = grids * per_grid
    hidden = geometry.vision_hidden
    pixels = 3 * geometry.temporal_patch * geometry.patch**2
    mlp = geometry.vision_mlp_products * hidden * geometry.vision_mlp
    dense = geometry.vision_layers * patches * (4 * hidden**2 + mlp)
    windowed = geometry.vision_layers - geometry.vision_full_layers
    reach = min(per_grid, geometry.vision_window_patches)
    attention = 2 * patches * hidden * (geometry.vision_full_layers * per_grid + windowed * reach)
    merged = hidden * geometry.merge**2
    tokens = (1 + geometry.deepstack_layers) * (patches // geometry.merge**2)
    return patches * pixels * hidden + dense + attention + tokens * merged * (merged + geometry.hidden)


def audio_flops(mel_frames: int, geometry: EncoderSizes) -> int:
    """The audio encoder on `mel_frames` (100 a second): convolutions, blocks, projection."""
    hidden = geometry.audio_hidden
    if geometry.audio_stem_width:
        positions, convolutions = _stem(mel_frames, geometry)
        projection = positions * hidden * (hidden + geometry.hidden)
    else:
        positions = -(-mel_frames // 2)
        convolutions = 3 * mel_frames * geometry.mel_bins * hidden + 3 * positions * hidden**2
        projection = positions // 2 * hidden * geometry.hidden
    dense = geometry.audio_layers * positions * (4 * hidden**2 + 2 * hidden * geometry.audio_mlp)
    whole, rest = divmod(positions, geometry.audio_chunk)
    attention = geometry.audio_layers * 2 * hidden * (whole * geometry.audio_chunk**2 + rest**2)
    return convolutions + dense + attention + projection


def _stem(mel_frames: int, geometry: EncoderSizes) -> tuple[int, int]:
    """Positions that three stride-2 convolutions make of mel frames, chunk by chunk, and their multiply-adds
    with the projection behind them; padding of the last chunk is not counted."""
    positions = flops = 0
    whole, rest = divmod(mel_frames, geometry.audio_stem_frames)
    for n_chunks, frames in ((whole, geometry.audio_stem_frames), (1, rest)):
        if not (n_chunks and frames):
            continue
        bins, channels, width = geometry.mel_bins, 1, geometry.audio_stem_width
        for _ in range(3):
            bins, frames = (bins + 1) // 2, (frames + 1) // 2
            flops += n_chunks * 9 * channels * width * bins * frames
            channels = width
        positions += n_chunks * frames
        flops += n_chunks * frames * width * bins * geometry.audio_hidden
    return positions, flops
