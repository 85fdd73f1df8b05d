"""What a model family must offer, so that the engine is written once over all of them.

An `Adapter` wraps one loaded network. It lays out prompts, turns frames and mel frames into embeddings with
their saliency, and runs the language model layer by layer. Nothing outside this room names an attribute of
transformers. A second family is one more subclass; the prefill loop does not change for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seats_cli.errors import PlanError
from seats_cli.model.launching import LaunchOrder
from seats_cli.model.preprocess import MelSpec, PixelCaps, PixelStats
from seats_cli.selection.layout import TokenLayout

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (1, S, head_dim)


@dataclass(frozen=True)
class MediaShape:
    """What of a clip enters the prompt, before any pixel or sample is decoded.

    video_grid:       (t, h, w): t grids (frame pairs) of h x w patches, HF's video_grid_thw; None: no video
    seconds_per_grid: time from one grid to the next, 2 / (true sampled fps); 0 without video
    audio_frames:     mel frames (100 a second); 0 without audio
    image_grid:       (1, h, w) in patches, HF's image_grid_thw; None: no image
    n_video, n_audio, n_image: the tokens that those become
    """

    video_grid: tuple[int, int, int] | None = None
    seconds_per_grid: float = 0.0
    audio_frames: int = 0
    image_grid: tuple[int, int, int] | None = None
    n_video: int = 0
    n_audio: int = 0
    n_image: int = 0

    @property
    def tokens_per_grid(self) -> int:
        """Video tokens of one grid; 0 without video."""
        return self.n_video // self.video_grid[0] if self.video_grid else 0


@dataclass(frozen=True)
class Prompt:
    """One question about one clip, as tokens, on the CPU.

    input_ids:     (S,) int64; placeholders stand where media embeddings go
    layout:        kind, window, position and time of every token; the i-th video (audio) token of the
                   sequence is the i-th row of the video (audio) embeddings
    image_slots:   (n_image,) int64, indices of the image tokens, which are kind text
    next_position: the rotary position (all three axes) of the first generated token; a whole number where the
                   family's positions are
    """

    input_ids: torch.Tensor
    layout: TokenLayout
    image_slots: torch.Tensor
    next_position: float

    def __len__(self) -> int:
        return len(self.layout)


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of one stretch of one kind.

    embeddings: (N, D) in the language model's dtype, in time order
    saliency:   (N,) float32, attention received per token (docs/method.md, "Stage I"); None if not asked
    deepstack:  (E, N, D), what the encoder's earlier blocks add to the same tokens behind the language
                model's first E layers; None where the family or the kind has no such features
    """

    embeddings: torch.Tensor
    saliency: torch.Tensor | None
    deepstack: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    @classmethod
    def join(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """One after the other; at least one part."""
        if len(parts) == 1:
            return parts[0]
        saliency = [part.saliency for part in parts if part.saliency is not None]
        if saliency and len(saliency) < len(parts):
            raise ValueError("some parts have saliency and some have none")
        deepstack = [part.deepstack for part in parts if part.deepstack is not None]
        return cls(
            torch.cat([part.embeddings for part in parts]),
            torch.cat(saliency) if saliency else None,
            torch.cat(deepstack, dim=1) if deepstack else None,
        )


@dataclass(frozen=True)
class AudioBlock:
    """The stretch of sound that an audio encoder looks at on its own, and what it becomes.

    frames:    mel frames
    positions: of the encoder, among which it attends
    tokens:    of the language model
    """

    frames: int
    positions: int
    tokens: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of a network as its config states them: what FLOPs and bytes are counted from.

    `mlp` is the width of one token's MLP (for a mixture: of one expert). `vision_full_layers` attend within a
    whole grid, the others within windows of `vision_window_patches` patches. `audio_chunk` is the number of
    encoder positions that attend to each other. `vision_mlp_products` matrices make one block's MLP, 3 with a
    gate; `deepstack_layers` mergers beside the last one feed as many layers of the language model.
    `audio_stem_width` is the width of the audio encoder's three 2-D convolutions, over `audio_stem_frames`
    mel frames at a time; 0 where it has two 1-D ones.
    """

    family: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context_length: int
    patch: int
    merge: int
    temporal_patch: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_mlp: int
    vision_full_layers: int
    vision_window_patches: int
    audio_layers: int
    audio_hidden: int
    audio_heads: int
    audio_mlp: int
    audio_chunk: int
    mel_bins: int
    audio_tokens_per_s: float
    position_ids_per_s: float
    seconds_per_window: float
    tied_embeddings: bool
    experts: int = 0
    active_experts: int = 0
    shared_mlp: int = 0
    deepstack_layers: int = 0
    vision_mlp_products: int = 3
    audio_stem_width: int = 0
    audio_stem_frames: int = 0

    @property
    def key_width(self) -> int:
        """Width of one layer's keys (and of its values) for one token: what the KV cache stores twice."""
        return self.n_kv_heads * self.head_dim

    @property
    def pixel_factor(self) -> int:
        """Sides of resized frames are multiples of this: one token's side in pixels."""
        return self.patch * self.merge


class Adapter(ABC):
    """One loaded network of a known family. Layers are 0-based here: `run_layer(0, ...)` is the first.

    Attributes (set by the subclass's constructor):
        geometry:       sizes from the config
        tokenizer:      the checkpoint's tokenizer, with `decode(ids, skip_special_tokens=...)`
        name:           path or hub id as given; `revision` the resolved commit, where there is one
        random_weights: True after `load_format="dummy"`; every output must say so
        dtype, device:  of the language model's input embeddings; layers may sit on other devices
        eos_token_ids:  tokens that end an answer
        attention:      the attention backend's name, as transformers calls it
        pixel_stats, mel_spec: preprocessing constants from the checkpoint's preprocessor_config.json
        notes:          automatic choices made while loading, with their reasons
        quantization:   how the weights are quantised, in words; None where they are not
        fused:          whether `fuse` found that the fast paths can run, and they do
        position_dtype: of rotary positions: torch.int64, or torch.float32 where the family's may be fractions
        launch_order:   in which several threads run the network; the encoders keep to it by themselves
    """

    geometry: Geometry
    tokenizer: Any
    name: str
    revision: str | None
    random_weights: bool
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    attention: str
    pixel_stats: PixelStats
    mel_spec: MelSpec
    notes: tuple[str, ...]
    launch_order: LaunchOrder
    quantization: str | None = None
    fused: bool = False
    position_dtype: torch.dtype = torch.int64

    @property
    def n_layers(self) -> int:
        """Decoder layers of the language model."""
        return self.geometry.n_layers

    @property
    def context_length(self) -> int:
        """Most tokens that the language model was made for (max_position_embeddings)."""
        return self.geometry.context_length

    @property
    @abstractmethod
    def network(self) -> Any:
        """The stock transformers model underneath, for comparisons with it (`model.stock`)."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Parameters materialised (language model and encoders)."""

    @abstractmethod
    def layer_device(self, index: int) -> torch.device:
        """Where decoder layer `index` computes; its cache lives there too."""

    @property
    def on_one_device(self) -> bool:
        """Whether all decoder layers compute on `device`."""
        return all(self.layer_device(index) == self.device for index in range(self.n_layers))

    def fuse(self) -> str:
        """Switch to the family's fast paths where they can run, and say in one line what happened and why.

        The results stay those of transformers' modules, which the reference paths call, up to rounding."""
        return "reference paths: this family has no fast ones"

    @property
    def decodes_in_graph(self) -> bool:
        """Whether `decode_token` can be recorded in a CUDA graph."""
        return False

    # ---- what goes in ----------------------------------------------------------------------------

    @abstractmethod
    def media_shape(
        self,
        *,
        n_frames: int = 0,
        height: int = 0,
        width: int = 0,
        sample_fps: float = 0.0,
        n_samples: int = 0,
        image_size: tuple[int, int] | None = None,
        caps: PixelCaps | None = None,
    ) -> MediaShape:
        """How many tokens a clip becomes.

        n_frames (even) sampled frames, upright, height x width pixels, at the true sample_fps; n_samples of
        16 kHz mono audio; an image of image_size (height, width); `caps` None means `PixelCaps()`.
        Raises MediaError for impossible sizes."""

    @abstractmethod
    def prompt(self, question: str, shape: MediaShape, *, system: str | None = None) -> Prompt:
        """The token sequence for a question about media of this shape. `system` None means the family's own
        default. Text of the user cannot form special tokens. Does not check the context length: see
        `check_context`."""

    def check_context(self, prompt: Prompt, entering: int, *, max_new_tokens: int = 0) -> None:
        """Raise PlanError when what enters the language model and the answer do not fit its context.

        `entering`: tokens of the prompt left by stage I; what it drops needs no room."""
        if entering + max_new_tokens <= self.context_length:
            return
        layout = prompt.layout
        n_image = prompt.image_slots.numel()
        parts = f"{layout.n_video} video + {layout.n_audio} audio + {n_image} image"
        raise PlanError(
            f"the prompt is too long: {entering} of its {len(prompt)} tokens ({parts} + "
            f"{layout.n_text - n_image} text) would enter the model, with {max_new_tokens} for the answer, "
            f"but this model's context holds {self.context_length}",
            hint="lower --ratio, --max-frames, --fps or --max-new-tokens, or give --start and --end",
        )

    def check_cuts(self, cut_layers: Sequence[int]) -> None:
        """Raise PlanError when tokens would leave after one of the layers (1-based) whose output the vision
        encoder still adds to: what it adds is meant for all of them together."""
        depth = self.geometry.deepstack_layers
        early = [layer for layer in cut_layers if layer < depth]
        if early:
            raise PlanError(
                f"tokens cannot be dropped after layer {early[0]}: the vision encoder of this model adds "
                f"features behind each of the first {depth} layers (deepstack)",
                hint=f"use a method or a preset whose first drop layer is {depth} or more",
            )

    # ---- encoders --------------------------------------------------------------------------------

    @abstractmethod
    def encode_video(
        self, frames: torch.Tensor, grid: tuple[int, int, int], *, window: int = 2, saliency: bool = True
    ) -> Encoded:
        """Embed frames (T, H, W, 3) uint8 of any size, T = 2 * number of grids; of `grid` only h and w count.

        Frames are resized to the grid's size here. Saliency windows are `window` grids long, starting at the
        first frame given, so give whole windows (the clip's last may be shorter): encoding window by window
        then equals encoding at once. Tokens come grid by grid, rows of a grid top to bottom."""

    @abstractmethod
    def encode_audio(
        self, mel: torch.Tensor, *, window: int = 100, saliency: bool = True, start: int = 0
    ) -> Encoded:
        """Embed mel (bins, L) float32, which `start` mel frames of the clip come before. Saliency windows are
        `window` encoder positions.

        Exact when called on multiples of `audio_block.frames`; the clip's last call may have any length."""

    @abstractmethod
    def encode_image(self, image: torch.Tensor, grid: tuple[int, int, int]) -> Encoded:
        """Embed one image (H, W, 3) uint8, without saliency."""

    @property
    @abstractmethod
    def audio_block(self) -> AudioBlock:
        """The stretch that the audio encoder attends within (2 s for Qwen2.5-Omni, 8 s for Qwen3-Omni)."""

    # ---- the language model ----------------------------------------------------------------------

    @abstractmethod
    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(S,) int64 to (S, D) on `device` in `dtype`; rows of media placeholders are to be overwritten."""

    @abstractmethod
    def rotary(self, position: torch.Tensor) -> Rotary:
        """cos and sin for positions (3, S) of `position_dtype`: (1, S, head_dim) on `device` in `dtype`."""

    @abstractmethod
    def run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rotary: Rotary,
        cache: Any | None,
        deepstack: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One decoder layer on (1, S, D), causal within the S tokens; (1, S, D) on `layer_device(index)`.

        `deepstack` (E, S, D), zeros where a token has none: row `index` is added to the layer's output, and
        layers from E on add nothing.

        `cache` follows transformers' Cache contract: `cache.update(key, value, layer_idx)` takes rotated keys
        (1, n_kv_heads, S, head_dim) and returns all keys and values to attend to; None keeps nothing. With
        S > 1 the layer's cache must be empty before the call; with S = 1 the token attends to all of it."""

    @abstractmethod
    def last_token_attention(self, index: int, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """(S,) float32: attention that each token receives from the last one.

        Through layer `index`'s own input norm, projections and rotary embedding, softmax over the sequence,
        mean over heads (docs/method.md, "Stage II", step 1). `hidden` (1, S, D) is that layer's output; one
        query row is computed."""

    def decode_token(
        self,
        token: torch.Tensor,
        position: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """All layers and the head on one token of each of B sequences, (B, V) float32, without asking the
        device anything.

        token: (B,) int64; position: (3, B); keys, values: a buffer (B, n_kv_heads, capacity, head_dim) a
        layer, which get the tokens' at lengths (n_layers, B) int32. Only where `decodes_in_graph`."""
        raise ValueError(f"{self.name} does not decode in a graph")

    @abstractmethod
    def final_logits(self, hidden: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        """Final norm and head: (1, S, D) to (1, S, V), or (1, 1, V) of the last token with `last_only`."""
