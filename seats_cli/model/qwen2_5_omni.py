"""Qwen2.5-Omni's thinker behind the `Adapter` contract: transformers' own modules, called part by part.

No class is patched and no forward is copied. Encoders run whole through their own forward; the saliency of
stage I is an extra pass over what their last block's attention was given, so their output cannot change.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_window_index

from seats_cli.errors import ModelError
from seats_cli.model.adapter import Adapter, Encoded, Geometry, MediaShape, Prompt, Rotary
from seats_cli.model.fused_audio import FusedAudio
from seats_cli.model.fused_modules import said_of_paths, why_not_packed
from seats_cli.model.fused_text import FusedText
from seats_cli.model.fused_vision import FusedVision
from seats_cli.model.kernels import attention_received as attention_received_fused
from seats_cli.model.kernels import has_triton, is_fused, matvec, rms_norm
from seats_cli.model.placement import computing_device
from seats_cli.model.preprocess import (
    MelSpec,
    PixelCaps,
    PixelStats,
    audio_token_count,
    frame_size,
    patchify,
    resize_frames,
    smart_resize,
)
from seats_cli.model.prompt import PositionRule, SpecialIds, lay_out

DEFAULT_SYSTEM = "You are a helpful assistant."
VISION_BATCH_PATCHES = 1 << 16  # patches through the vision tower at once: bounds memory, not results
AUDIO_BATCH_CHUNKS = 128  # chunks through the audio encoder at once (256 s)
SALIENCY_SCORES = 1 << 27  # attention scores held at once while saliency is computed (0.5 GB in float32)


class Qwen25OmniAdapter(Adapter):
    """`Adapter` over a loaded `Qwen2_5OmniThinkerForConditionalGeneration`."""

    def __init__(
        self,
        model: Qwen2_5OmniThinkerForConditionalGeneration,
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
        self.geometry = read_geometry(model.config, mel_spec)
        self.dtype = self._text.embed_tokens.weight.dtype
        self.device = computing_device(self._text.embed_tokens)
        self._layer_devices = [computing_device(layer) for layer in self._text.layers]
        self._vision_device = computing_device(self._visual)
        self._audio_device = computing_device(self._audio)
        self._fast_text: FusedText | None = None
        self._fast_vision: FusedVision | None = None
        self._fast_audio: FusedAudio | None = None
        self._special = read_special_ids(model.config, tokenizer)
        self._rule = PositionRule(
            ids_per_s=self.geometry.position_ids_per_s,
            window_s=self.geometry.seconds_per_window,
            audio_tokens_per_s=self.geometry.audio_tokens_per_s,
            merge=self.geometry.merge,
        )

    @torch.no_grad()
    def fuse(self) -> str:
        """See `Adapter.fuse`."""
        geometry = self.geometry
        layers = self._text.layers
        not_text = why_not_packed(self._text, self._model.lm_head)
        not_seen, not_heard = why_not_packed(self._visual), why_not_packed(self._audio)
        if not_text is None:
            self._fast_text = FusedText(layers, geometry.n_heads, geometry.n_kv_heads, geometry.head_dim)
        if not_seen is None:
            self._fast_vision = FusedVision(self._visual)
        if not_heard is None:
            self._fast_audio = FusedAudio(self._audio)
        self.fused = not (not_text or not_seen or not_heard)
        return said_of_paths(self.device, decoder=not_text, vision=not_seen, audio=not_heard)

    @property
    def decodes_in_graph(self) -> bool:
        """See `Adapter.decodes_in_graph`."""
        return self._fast_text is not None and self.device.type == "cuda" and has_triton()

    @property
    def network(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        """The stock model whose parts this adapter calls; see `model.stock`."""
        return self._model

    @property
    def parameter_count(self) -> int:
        """Parameters materialised (language model and encoders)."""
        counted: int = self._model.num_parameters()  # knows weights of which a byte holds two
        return counted

    @property
    def audio_block_frames(self) -> int:
        """Mel frames in one chunk of the audio encoder, which attends within chunks only."""
        return 2 * int(self._audio.n_window)

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
        n_audio = audio_token_count(frames)
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
        """See `Adapter.prompt`; the default system text is the model card's for text answers."""
        system = DEFAULT_SYSTEM if system is None else system
        return lay_out(self.tokenizer, self._special, self._rule, shape, question, system)

    # ---- encoders --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_video(
        self, frames: torch.Tensor, grid: tuple[int, int, int], *, window: int = 2, saliency: bool = True
    ) -> Encoded:
        """See `Adapter.encode_video`."""
        per_grid = grid[1] * grid[2]
        windows_at_once = max(1, VISION_BATCH_PATCHES // (per_grid * window))
        step = windows_at_once * window * self.geometry.temporal_patch
        starts = range(0, len(frames), step)
        return Encoded.join(
            [self._encode_frames(frames[i : i + step], grid, window, saliency) for i in starts]
        )

    @torch.no_grad()
    def encode_image(self, image: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """See `Adapter.encode_image`."""
        patches, grid_thw = self._patches(image[None], grid)
        if self._fast_vision is not None:
            return self._fast_vision(patches, grid[1], grid[2])[0].to(self.device, self.dtype)
        return self._visual(patches, grid_thw=grid_thw).pooler_output.to(self.device, self.dtype)

    @torch.no_grad()
    def encode_audio(self, mel: torch.Tensor, *, window: int = 100, saliency: bool = True) -> Encoded:
        """See `Adapter.encode_audio`."""
        # Whole chunks and whole saliency windows (2 mel frames a position) a batch: batching changes nothing.
        unit = math.lcm(self.audio_block_frames, 2 * window)
        step = unit * max(1, AUDIO_BATCH_CHUNKS * self.audio_block_frames // unit)
        starts = range(0, mel.shape[1], step)
        parts = [self._encode_mel(mel[:, i : i + step], window, saliency) for i in starts]
        return Encoded.join(parts) if parts else self._nothing(saliency)

    def _patches(self, frames: torch.Tensor, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised patches of frames of any size, and the grid_thw (1, 3) of them."""
        geometry, device = self.geometry, self._vision_device
        resized = resize_frames(frames.to(device), (grid[1] * geometry.patch, grid[2] * geometry.patch))
        patches = patchify(
            resized,
            self.pixel_stats,
            patch=geometry.patch,
            temporal_patch=geometry.temporal_patch,
            merge=geometry.merge,
        )
        grids = patches.shape[0] // (grid[1] * grid[2])
        dtype = self._visual.patch_embed.proj.weight.dtype
        return patches.to(dtype), torch.tensor([[grids, grid[1], grid[2]]], device=device)

    def _encode_frames(
        self, frames: torch.Tensor, grid: tuple[int, int, int], window: int, with_saliency: bool
    ) -> Encoded:
        patches, grid_thw = self._patches(frames, grid)
        if self._fast_vision is not None:
            return self._encode_fast(self._fast_vision, patches, grid, window, with_saliency)
        if not with_saliency:
            embeddings = self._visual(patches, grid_thw=grid_thw).pooler_output
            return Encoded(embeddings.to(self.device, self.dtype), None)
        attention = self._visual.blocks[-1].attn
        with _last_input(attention) as seen:
            embeddings = self._visual(patches, grid_thw=grid_thw).pooler_output
        n_heads = attention.num_heads
        query = attention.q(seen["hidden_states"]).unflatten(-1, (n_heads, -1))
        key = attention.k(seen["hidden_states"]).unflatten(-1, (n_heads, -1))
        query, key = apply_rotary_pos_emb_vision(query, key, *seen["position_embeddings"])
        # The tower works in the order of its attention windows; go back to the order of time and rows.
        order, _ = get_vision_window_index(
            grid_thw,
            spatial_merge_size=self.geometry.merge,
            window_size=self._visual.window_size,
            patch_size=self.geometry.patch,
        )
        back = torch.argsort(order).to(query.device)
        unit = self.geometry.merge**2
        query, key = (x.unflatten(0, (-1, unit))[back].flatten(0, 1) for x in (query, key))
        received = attention_received(query, key, grid[1] * grid[2] * window, attention.scaling)
        saliency = received.view(-1, unit).mean(dim=1)
        return Encoded(embeddings.to(self.device, self.dtype), saliency.to(self.device))

    def _encode_fast(
        self,
        vision: FusedVision,
        patches: torch.Tensor,
        grid: tuple[int, int, int],
        window: int,
        with_saliency: bool,
    ) -> Encoded:
        embeddings, qkv = vision(patches, grid[1], grid[2], last=with_saliency)
        if qkv is None:
            return Encoded(embeddings.to(self.device, self.dtype), None)
        # Windows are whole grids, within which the order of patches does not matter to what each receives.
        received = received_from_qkv(qkv, vision.n_heads, grid[1] * grid[2] * window)
        saliency = received.view(-1, self.geometry.merge**2).mean(dim=1)
        back = vision.plan(grid[1], grid[2]).back
        saliency = saliency.view(-1, len(back))[:, back].flatten()
        return Encoded(embeddings.to(self.device, self.dtype), saliency.to(self.device))

    def _encode_mel(self, mel: torch.Tensor, window: int, with_saliency: bool) -> Encoded:
        n_tokens = audio_token_count(mel.shape[1])
        if not n_tokens:
            return self._nothing(with_saliency)
        features = mel.to(self._audio_device, self._audio.conv1.weight.dtype)
        if self._fast_audio is not None:
            embeddings, qkv = self._fast_audio(features, last=with_saliency)
            embeddings = embeddings.to(self.device, self.dtype)
            if qkv is None:
                return Encoded(embeddings, None)
            received = received_from_qkv(qkv, self._fast_audio.n_heads, window)
            return Encoded(embeddings, received[: 2 * n_tokens].view(n_tokens, 2).mean(dim=1).to(self.device))
        lengths = torch.tensor([mel.shape[1]], device=self._audio_device)
        if not with_saliency:
            embeddings = self._audio(features, feature_lens=lengths).last_hidden_state
            return Encoded(embeddings.to(self.device, self.dtype), None)
        attention = self._audio.layers[-1].self_attn
        with _last_input(attention) as seen:
            embeddings = self._audio(features, feature_lens=lengths).last_hidden_state
        n_heads = attention.num_heads
        query = attention.q_proj(seen["hidden_states"]).unflatten(-1, (n_heads, -1))
        key = attention.k_proj(seen["hidden_states"]).unflatten(-1, (n_heads, -1))
        received = attention_received(query, key, window, attention.scaling)
        saliency = received[: 2 * n_tokens].view(n_tokens, 2).mean(dim=1)
        return Encoded(embeddings.to(self.device, self.dtype), saliency.to(self.device))

    def _nothing(self, with_saliency: bool) -> Encoded:
        empty = torch.zeros(0, self.geometry.hidden, dtype=self.dtype, device=self.device)
        return Encoded(empty, torch.zeros(0, device=self.device) if with_saliency else None)

    # ---- the language model ----------------------------------------------------------------------

    @torch.no_grad()
    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Adapter.embed_text`."""
        return self._text.embed_tokens(input_ids.to(self.device)).to(self.device)

    @torch.no_grad()
    def rotary(self, position: torch.Tensor) -> Rotary:
        """See `Adapter.rotary`."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._text.rotary_emb(like, position.to(self.device)[:, None])
        return cos.to(self.device), sin.to(self.device)

    @torch.no_grad()
    def run_layer(self, index: int, hidden: torch.Tensor, rotary: Rotary, cache: Any | None) -> torch.Tensor:
        """See `Adapter.run_layer`. Without a mask, sdpa is causal for S > 1 and unmasked for S = 1."""
        device = self._layer_devices[index]
        cos, sin = rotary
        if self._fast_text is not None:
            return self._fast_text.layer(index, hidden, cos, sin, cache)
        return self._text.layers[index](
            hidden.to(device),
            position_embeddings=(cos.to(device), sin.to(device)),
            past_key_values=cache,
            use_cache=cache is not None,
        )

    @torch.no_grad()
    def last_token_attention(self, index: int, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """See `Adapter.last_token_attention`."""
        layer, device = self._text.layers[index], self._layer_devices[index]
        attention = layer.self_attn
        cos, sin = (x.to(device) for x in rotary)
        norm, split = layer.input_layernorm, (-1, self.geometry.head_dim)
        if self._fast_text is not None:
            normed = rms_norm(hidden[0], norm.weight, norm.variance_epsilon)[None]
        else:
            normed = norm(hidden.to(device))
        key = attention.k_proj(normed).unflatten(-1, split).transpose(1, 2)
        query = attention.q_proj(normed[:, -1:]).unflatten(-1, split).transpose(1, 2)
        # Only the signature wants q and k together: give each its own rows of cos and sin.
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
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


def attention_received(query: torch.Tensor, key: torch.Tensor, window: int, scaling: float) -> torch.Tensor:
    """Attention that each position receives from its window: (P, heads, dim) each, to (P,) float32.

    Full softmax within consecutive windows of `window` positions (the last may be shorter), mean over heads,
    sum over queries (docs/method.md, "Stage I", step 1). Windows go in chunks, so memory stays bounded.
    """
    n, n_heads, _ = query.shape
    whole = n - n % window
    at_once = max(1, SALIENCY_SCORES // (n_heads * window * window))
    edges = [*range(0, whole, at_once * window), whole]
    spans = [(start, stop, window) for start, stop in itertools.pairwise(edges)]
    if n > whole:
        spans.append((whole, n, n - whole))
    received = torch.empty(n, dtype=torch.float32, device=query.device)
    for start, stop, width in spans:
        q, k = (x[start:stop].float().unflatten(0, (-1, width)).transpose(1, 2) for x in (query, key))
        weights = torch.softmax(torch.matmul(q, k.transpose(2, 3)) * scaling, dim=-1)
        received[start:stop] = weights.sum(dim=2).mean(dim=1).flatten()
    return received


def received_from_qkv(qkv: torch.Tensor, n_heads: int, window: int) -> torch.Tensor:
    """`attention_received` of packed queries, keys and values (P, 3 H d), rotated: (P,) float32."""
    head_dim = qkv.shape[1] // 3 // n_heads
    if is_fused(qkv):
        return attention_received_fused(qkv, n_heads, head_dim, window)
    query, key, _ = qkv.view(len(qkv), 3, n_heads, head_dim).unbind(1)
    return attention_received(query, key, window, head_dim**-0.5)


@contextmanager
def _last_input(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """What `module` is called with inside the block, by argument name; the hook goes when the block ends."""
    seen: dict[str, Any] = {}

    def remember(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        if args:
            seen["hidden_states"] = args[0]

    handle = module.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def read_geometry(config: Any, mel: MelSpec) -> Geometry:
    """The sizes that a `Qwen2_5OmniThinkerConfig` states."""
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    merge_side = vision.window_size // vision.spatial_merge_size // vision.patch_size
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Geometry(
        family="qwen2_5_omni",
        n_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        context_length=text.max_position_embeddings,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal_patch=vision.temporal_patch_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads,
        vision_mlp=vision.intermediate_size,
        vision_full_layers=len(vision.fullatt_block_indexes),
        vision_window_patches=(merge_side * vision.spatial_merge_size) ** 2,
        audio_layers=audio.encoder_layers,
        audio_hidden=audio.d_model,
        audio_heads=audio.encoder_attention_heads,
        audio_mlp=audio.encoder_ffn_dim,
        audio_chunk=audio.n_window,
        mel_bins=audio.num_mel_bins,
        audio_tokens_per_s=mel.frames_per_s / 4,  # a stride-2 convolution, then pooling by pairs
        position_ids_per_s=config.position_id_per_seconds,
        seconds_per_window=config.seconds_per_chunk,
        tied_embeddings=bool(config.tie_word_embeddings),
    )


def read_special_ids(config: Any, tokenizer: Any) -> SpecialIds:
    """Ids of the structuring tokens: media's from the config, the chat's from the tokenizer."""
    names = {
        "vision_bos": "vision_start_token_id",
        "vision_eos": "vision_end_token_id",
        "audio_bos": "audio_start_token_id",
        "audio_eos": "audio_end_token_id",
        "image": "image_token_id",
        "video": "video_token_id",
        "audio": "audio_token_id",
    }
    ids: dict[str, int] = {}
    for role, field in names.items():
        value = getattr(config, field, None)
        if not isinstance(value, int):
            raise ModelError(f"the checkpoint's thinker config lacks `{field}`")
        ids[role] = value
    vocab = tokenizer.get_vocab()
    for role, token in (("im_start", "<|im_start|>"), ("im_end", "<|im_end|>")):
        if token not in vocab:
            raise ModelError(f"the checkpoint's tokenizer lacks the token {token}")
        ids[role] = vocab[token]
    return SpecialIds(**ids)
