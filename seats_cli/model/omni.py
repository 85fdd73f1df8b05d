"""What Qwen's Omni families share behind the `Adapter` contract: transformers' modules, called part by part.

No class is patched and no forward is copied. A family adds its encoders, its prompt and what its attention
does to queries and keys (`qwen2_5_omni.py`, `qwen3_omni.py`).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch

from seats_cli.errors import ModelError
from seats_cli.model.adapter import Adapter, Encoded, Geometry, MediaShape, Prompt, Rotary
from seats_cli.model.fused_modules import said_of_paths, why_not_packed
from seats_cli.model.fused_text import FusedText
from seats_cli.model.kernels import has_triton, matvec, rms_norm
from seats_cli.model.launching import LaunchOrder
from seats_cli.model.placement import computing_device
from seats_cli.model.preprocess import (
    MelSpec,
    PixelCaps,
    PixelStats,
    frame_size,
    patchify,
    resize_frames,
    smart_resize,
)
from seats_cli.model.prompt import PositionRule, SpecialIds, lay_out
from seats_cli.selection.transfer import on_device

VISION_BATCH_PATCHES = 1 << 16  # patches through the vision tower at once: bounds memory, not results
AUDIO_BATCH_FRAMES = 25600  # mel frames through the audio encoder at once (256 s)
ENCODERS_AT_ONCE = 4  # threads of a batch that may run an encoder: bounds the activations that are alive
ENCODERS_LAUNCHED_AT_ONCE = 1  # likewise where all that a thread does is launch: on CUDA, if they are packed


class OmniAdapter(Adapter):
    """`Adapter` over a loaded thinker of transformers. Subclasses say what differs.

    default_system:  the system turn of a prompt that asks for none; None leaves it out
    special_tokens:  role in `SpecialIds` -> (field of the thinker's config, text of the token)
    rotate:          transformers' rotary embedding of queries and keys
    """

    default_system: ClassVar[str | None]
    special_tokens: ClassVar[Mapping[str, tuple[str, str]]]
    rotate: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]]]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pixel_stats: PixelStats,
        mel_spec: MelSpec,
        eos_token_ids: tuple[int, ...],
        name: str,
        revision: str | None = None,
        random_weights: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        if model.config.text_config._attn_implementation != "sdpa":
            raise ValueError("load the thinker with attn_implementation='sdpa': causality rests on it")
        if "sliding_attention" in (getattr(model.config.text_config, "layer_types", None) or ()):
            raise ModelError(f"{name} uses sliding-window attention, which is not supported")
        self._model = model
        self._text = model.model.language_model
        self._visual = model.model.visual
        self._audio = model.model.audio_tower
        self.tokenizer = tokenizer
        self.pixel_stats = pixel_stats
        self.mel_spec = mel_spec
        self.eos_token_ids = eos_token_ids
        self.attention = model.config.text_config._attn_implementation
        self.name = name
        self.revision = revision
        self.random_weights = random_weights
        self.notes = tuple(notes)
        self.geometry = self.read_geometry(model.config, mel_spec)
        self.dtype = self._text.embed_tokens.weight.dtype
        self.device = computing_device(self._text.embed_tokens)
        self._layer_devices = [computing_device(layer) for layer in self._text.layers]
        self._vision_device = computing_device(self._visual)
        self._audio_device = computing_device(self._audio)
        self._fast_text: FusedText | None = None
        self._special = read_special_ids(model.config, tokenizer, self.special_tokens)
        self._rule = self.position_rule(self.geometry)
        self.launch_order = LaunchOrder(ENCODERS_AT_ONCE)
        self.position_dtype = self._rule.dtype
        # Clips of one length share their prompt, which takes milliseconds to lay out.
        self._lay_out = lru_cache(4)(partial(lay_out, tokenizer, self._special, self._rule))

    # ---- what a family says of itself -------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def read_geometry(config: Any, mel: MelSpec) -> Geometry:
        """The sizes that the thinker's config states."""

    @staticmethod
    @abstractmethod
    def position_rule(geometry: Geometry) -> PositionRule:
        """How time becomes positions and windows."""

    @staticmethod
    @abstractmethod
    def audio_token_count(mel_frames: int) -> int:
        """Tokens that so many mel frames become."""

    @abstractmethod
    def _pack_vision(self) -> None:
        """Pack the vision encoder's weights for its fast path."""

    @abstractmethod
    def _pack_audio(self) -> None:
        """Pack the audio encoder's weights for its fast path."""

    @abstractmethod
    def _encode_patches(
        self, patches: torch.Tensor, grid: tuple[int, int, int], window: int, with_saliency: bool
    ) -> Encoded:
        """Embed patches of whole grids, grid by grid; see `Adapter.encode_video`."""

    @abstractmethod
    def _encode_mel(self, mel: torch.Tensor, window: int, with_saliency: bool, start: int) -> Encoded:
        """Embed mel frames (bins, L > 0) that become at least one token; see `Adapter.encode_audio`."""

    def _query(self, attention: Any, normed: torch.Tensor) -> torch.Tensor:
        """A decoder layer's queries before rotation: (1, S, D) to (1, S, heads, head_dim)."""
        return attention.q_proj(normed).unflatten(-1, (-1, self.geometry.head_dim))

    def _key(self, attention: Any, normed: torch.Tensor) -> torch.Tensor:
        """A decoder layer's keys before rotation: (1, S, D) to (1, S, kv heads, head_dim)."""
        return attention.k_proj(normed).unflatten(-1, (-1, self.geometry.head_dim))

    # ---- fast paths --------------------------------------------------------------------------------

    @torch.no_grad()
    def fuse(self) -> str:
        """See `Adapter.fuse`."""
        geometry = self.geometry
        not_text = self._why_not_text()
        not_seen, not_heard = why_not_packed(self._visual), why_not_packed(self._audio)
        if not_text is None:
            self._fast_text = FusedText(
                self._text.layers, geometry.n_heads, geometry.n_kv_heads, geometry.head_dim
            )
        if not_seen is None:
            self._pack_vision()
        if not_heard is None:
            self._pack_audio()
        if self.device.type == "cuda" and not (not_seen or not_heard):
            self.launch_order = LaunchOrder(ENCODERS_LAUNCHED_AT_ONCE)
        self.fused = not (not_text or not_seen or not_heard)
        return said_of_paths(self.device, decoder=not_text, vision=not_seen, audio=not_heard)

    def _why_not_text(self) -> str | None:
        """Why the language model's weights cannot be packed; None where they can."""
        return why_not_packed(self._text, self._model.lm_head)

    @property
    def decodes_in_graph(self) -> bool:
        """See `Adapter.decodes_in_graph`."""
        return self._fast_text is not None and self.device.type == "cuda" and has_triton()

    @property
    def network(self) -> Any:
        """The stock model whose parts this adapter calls; see `model.stock`."""
        return self._model

    @property
    def parameter_count(self) -> int:
        """Parameters materialised (language model and encoders)."""
        counted: int = self._model.num_parameters()  # knows weights of which a byte holds two
        return counted

    def layer_device(self, index: int) -> torch.device:
        """Where decoder layer `index` computes."""
        return self._layer_devices[index]

    # ---- what goes in ----------------------------------------------------------------------------

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
        """See `Adapter.media_shape`."""
        geometry = self.geometry
        video_grid = image_grid = None
        unit = geometry.merge**2
        if n_frames:
            size = frame_size(height, width, n_frames, geometry.pixel_factor, caps or PixelCaps())
            grids = -(-n_frames // geometry.temporal_patch)
            video_grid = (grids, size[0] // geometry.patch, size[1] // geometry.patch)
        if image_size is not None:
            # An image is never pruned, so it may take half of the context at most.
            most = min(self.pixel_stats.image_max_pixels, self.context_length // 2 * geometry.pixel_factor**2)
            least = self.pixel_stats.image_min_pixels
            size = smart_resize(*image_size, geometry.pixel_factor, least, most)
            image_grid = (1, size[0] // geometry.patch, size[1] // geometry.patch)
        frames = self.mel_spec.frames(n_samples)
        n_audio = self.audio_token_count(frames)
        return MediaShape(
            video_grid=video_grid,
            seconds_per_grid=geometry.temporal_patch / sample_fps if video_grid else 0.0,
            audio_frames=frames if n_audio else 0,
            image_grid=image_grid,
            n_video=video_grid[0] * video_grid[1] * video_grid[2] // unit if video_grid else 0,
            n_audio=n_audio,
            n_image=image_grid[1] * image_grid[2] // unit if image_grid else 0,
        )

    def prompt(self, question: str, shape: MediaShape, *, system: str | None = None) -> Prompt:
        """See `Adapter.prompt`."""
        system = self.default_system if system is None else system
        return self._lay_out(shape, question, system)

    # ---- encoders --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_video(
        self, frames: torch.Tensor, grid: tuple[int, int, int], *, window: int = 2, saliency: bool = True
    ) -> Encoded:
        """See `Adapter.encode_video`."""
        per_grid = grid[1] * grid[2]
        windows_at_once = max(1, VISION_BATCH_PATCHES // (per_grid * window))
        step = windows_at_once * window * self.geometry.temporal_patch
        parts = []
        for first in range(0, len(frames), step):
            with self.launch_order.in_turn():
                encoded = self._encode_patches(
                    self._patches(frames[first : first + step], grid), grid, window, saliency
                )
            parts.append(encoded)
        return Encoded.join(parts)

    @torch.no_grad()
    def encode_image(self, image: torch.Tensor, grid: tuple[int, int, int]) -> Encoded:
        """See `Adapter.encode_image`."""
        with self.launch_order.in_turn():
            return self._encode_patches(self._patches(image[None], grid), grid, 1, False)

    @torch.no_grad()
    def encode_audio(
        self, mel: torch.Tensor, *, window: int = 100, saliency: bool = True, start: int = 0
    ) -> Encoded:
        """See `Adapter.encode_audio`."""
        # Whole blocks and whole saliency windows a batch: batching changes nothing.
        block = self.audio_block
        unit = block.frames * (math.lcm(block.positions, window) // block.positions)
        step = unit * max(1, AUDIO_BATCH_FRAMES // unit)
        parts = []
        for first in range(0, mel.shape[1], step):
            part = mel[:, first : first + step]
            if self.audio_token_count(part.shape[1]):
                with self.launch_order.in_turn():
                    encoded = self._encode_mel(part, window, saliency, start + first)
                parts.append(encoded)
        return Encoded.join(parts) if parts else self._nothing(saliency)

    def _patches(self, frames: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Normalised patches, in the tower's dtype, of frames of any size."""
        geometry, weight = self.geometry, self._visual.patch_embed.proj.weight
        resized = resize_frames(
            frames.to(self._vision_device), (grid[1] * geometry.patch, grid[2] * geometry.patch)
        )
        patches = patchify(
            resized,
            self.pixel_stats,
            patch=geometry.patch,
            temporal_patch=geometry.temporal_patch,
            merge=geometry.merge,
        )
        return patches.to(weight.dtype)

    def _grid_thw(self, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """transformers' grid_thw (1, 3) of patches of whole grids."""
        grids = len(patches) // (grid[1] * grid[2])
        return torch.tensor([[grids, grid[1], grid[2]]], device=patches.device)

    def _encoded(
        self,
        embeddings: torch.Tensor,
        saliency: torch.Tensor | None,
        deepstack: torch.Tensor | None = None,
    ) -> Encoded:
        """What an encoder made, where and as the language model reads it."""
        return Encoded(
            embeddings.to(self.device, self.dtype),
            None if saliency is None else saliency.to(self.device),
            None if deepstack is None else deepstack.to(self.device, self.dtype),
        )

    def _nothing(self, with_saliency: bool) -> Encoded:
        empty = torch.zeros(0, self.geometry.hidden, dtype=self.dtype, device=self.device)
        return Encoded(empty, torch.zeros(0, device=self.device) if with_saliency else None)

    # ---- the language model ----------------------------------------------------------------------

    @torch.no_grad()
    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Adapter.embed_text`."""
        return self._text.embed_tokens(on_device(input_ids, self.device)).to(self.device)

    @torch.no_grad()
    def rotary(self, position: torch.Tensor) -> Rotary:
        """See `Adapter.rotary`."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._text.rotary_emb(like, position.to(self.device)[:, None])
        return cos.to(self.device), sin.to(self.device)

    @torch.no_grad()
    def run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rotary: Rotary,
        cache: Any | None,
        deepstack: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Adapter.run_layer`. Without a mask, sdpa is causal for S > 1 and unmasked for S = 1."""
        device = self._layer_devices[index]
        cos, sin = rotary
        if self._fast_text is not None:
            out = self._fast_text.layer(index, hidden, cos, sin, cache)
        else:
            out = self._text.layers[index](
                hidden.to(device),
                position_embeddings=(cos.to(device), sin.to(device)),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        if deepstack is not None and index < len(deepstack):
            out = out + deepstack[index].to(out)
        return out

    @torch.no_grad()
    def last_token_attention(self, index: int, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """See `Adapter.last_token_attention`."""
        layer, device = self._text.layers[index], self._layer_devices[index]
        attention = layer.self_attn
        cos, sin = (x.to(device) for x in rotary)
        norm = layer.input_layernorm
        if self._fast_text is not None:
            normed = rms_norm(hidden[0], norm.weight, norm.variance_epsilon)[None]
        else:
            normed = norm(hidden.to(device))
        key = self._key(attention, normed).transpose(1, 2)
        query = self._query(attention, normed[:, -1:]).transpose(1, 2)
        # Only the signature wants q and k together: give each its own rows of cos and sin.
        query, _ = self.rotate(query, query, cos[:, -1:], sin[:, -1:])
        key, _ = self.rotate(key, key, cos, sin)
        groups = query.view(key.shape[1], -1, self.geometry.head_dim)  # (kv heads, queries of each, head_dim)
        # In float32: rounding the products to bfloat16 would shift probabilities by several percent.
        scores = torch.matmul(groups.float(), key[0].float().transpose(1, 2)) * attention.scaling
        weights = torch.softmax(scores, dim=-1)
        return weights.flatten(0, 1).mean(dim=0)

    @torch.no_grad()
    def decode_token(
        self,
        token: torch.Tensor,
        position: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """See `Adapter.decode_token`."""
        if self._fast_text is None:
            return super().decode_token(token, position, keys, values, lengths)
        x = self._text.embed_tokens(token)
        cos, sin = (part[0] for part in self.rotary(position))
        for index in range(self.n_layers):
            x = self._fast_text.decode(index, x, cos, sin, keys[index], values[index], lengths[index])
        norm = (self._text.norm.weight, self._text.norm.variance_epsilon)
        return matvec(x, self._model.lm_head.weight, norm=norm, dtype=torch.float32)

    @torch.no_grad()
    def final_logits(self, hidden: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        """See `Adapter.final_logits`."""
        if last_only:
            hidden = hidden[:, -1:]
        normed = self._text.norm(hidden.to(computing_device(self._text.norm)))
        return self._model.lm_head(normed.to(computing_device(self._model.lm_head)))


def read_special_ids(config: Any, tokenizer: Any, tokens: Mapping[str, tuple[str, str]]) -> SpecialIds:
    """Ids of the structuring tokens: media's from the thinker's config or, where it does not state them, from
    the tokenizer; the chat's from the tokenizer. ModelError names what neither has."""
    vocab = tokenizer.get_vocab()
    ids: dict[str, int] = {}
    for role, (field, token) in tokens.items():
        value = getattr(config, field, None)
        value = value if isinstance(value, int) else vocab.get(token)
        if value is None:
            raise ModelError(
                f"the checkpoint's thinker config lacks `{field}`, and its tokenizer the token {token}"
            )
        ids[role] = value
    for role, token in (("im_start", "<|im_start|>"), ("im_end", "<|im_end|>")):
        if token not in vocab:
            raise ModelError(f"the checkpoint's tokenizer lacks the token {token}")
        ids[role] = vocab[token]
    return SpecialIds(**ids)
