"""Qwen2.5-Omni's thinker behind the `Adapter` contract: its encoders, its prompt and its sizes."""

from typing import Any

import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_window_index

from seats_cli.model.adapter import AudioBlock, Encoded, Geometry
from seats_cli.model.fused_audio import FusedAudio
from seats_cli.model.fused_vision import FusedVision
from seats_cli.model.omni import OmniAdapter
from seats_cli.model.preprocess import MelSpec, audio_token_count
from seats_cli.model.prompt import PositionRule
from seats_cli.model.saliency import attention_received, last_input, received_from_qkv

DEFAULT_SYSTEM = "You are a helpful assistant."  # the model card's, for answers in text
SPECIAL_TOKENS = {
    "vision_bos": ("vision_start_token_id", "<|vision_bos|>"),
    "vision_eos": ("vision_end_token_id", "<|vision_eos|>"),
    "audio_bos": ("audio_start_token_id", "<|audio_bos|>"),
    "audio_eos": ("audio_end_token_id", "<|audio_eos|>"),
    "image": ("image_token_id", "<|IMAGE|>"),
    "video": ("video_token_id", "<|VIDEO|>"),
    "audio": ("audio_token_id", "<|AUDIO|>"),
}


class Qwen25OmniAdapter(OmniAdapter):
    """`Adapter` over a loaded `Qwen2_5OmniThinkerForConditionalGeneration`."""

    default_system = DEFAULT_SYSTEM
    special_tokens = SPECIAL_TOKENS
    rotate = staticmethod(apply_rotary_pos_emb)
    audio_token_count = staticmethod(audio_token_count)
    _fast_vision: FusedVision | None = None
    _fast_audio: FusedAudio | None = None

    @staticmethod
    def read_geometry(config: Any, mel: MelSpec) -> Geometry:
        """The sizes that a `Qwen2_5OmniThinkerConfig` states."""
        return read_geometry(config, mel)

    @staticmethod
    def position_rule(geometry: Geometry) -> PositionRule:
        """Whole positions; windows are the 2-second chunks in which video and audio follow each other."""
        return PositionRule(
            ids_per_s=geometry.position_ids_per_s,
            window_s=geometry.seconds_per_window,
            audio_tokens_per_s=geometry.audio_tokens_per_s,
            merge=geometry.merge,
        )

    def _pack_vision(self) -> None:
        self._fast_vision = FusedVision(self._visual)

    def _pack_audio(self) -> None:
        self._fast_audio = FusedAudio(self._audio)

    @property
    def audio_block(self) -> AudioBlock:
        """See `Adapter.audio_block`: a chunk, whose stride-2 convolution and pooling by pairs stay inside."""
        n = int(self._audio.n_window)
        return AudioBlock(frames=2 * n, positions=n, tokens=n // 2)

    def _encode_patches(
        self, patches: torch.Tensor, grid: tuple[int, int, int], window: int, with_saliency: bool
    ) -> Encoded:
        if self._fast_vision is not None:
            return self._encode_fast(self._fast_vision, patches, grid, window, with_saliency)
        grid_thw = self._grid_thw(patches, grid)
        if not with_saliency:
            return self._encoded(self._visual(patches, grid_thw=grid_thw).pooler_output, None)
        attention = self._visual.blocks[-1].attn
        with last_input(attention) as seen:
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
        return self._encoded(embeddings, saliency)

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
            return self._encoded(embeddings, None)
        # Windows are whole grids, within which the order of patches does not matter to what each receives.
        received = received_from_qkv(qkv, vision.n_heads, grid[1] * grid[2] * window)
        saliency = received.view(-1, self.geometry.merge**2).mean(dim=1)
        back = vision.plan(grid[1], grid[2]).back
        saliency = saliency.view(-1, len(back))[:, back].flatten()
        return self._encoded(embeddings, saliency)

    def _encode_mel(self, mel: torch.Tensor, window: int, with_saliency: bool, start: int) -> Encoded:
        n_tokens = audio_token_count(mel.shape[1])
        features = mel.to(self._audio_device, self._audio.conv1.weight.dtype)
        if self._fast_audio is not None:
            embeddings, qkv = self._fast_audio(features)
            if not with_saliency:
                return self._encoded(embeddings, None)
            received = received_from_qkv(qkv, self._fast_audio.n_heads, window)
            return self._encoded(embeddings, _pooled(received, n_tokens))
        lengths = torch.tensor([mel.shape[1]], device=self._audio_device)
        if not with_saliency:
            return self._encoded(self._audio(features, feature_lens=lengths).last_hidden_state, None)
        attention = self._audio.layers[-1].self_attn
        with last_input(attention) as seen:
            embeddings = self._audio(features, feature_lens=lengths).last_hidden_state
        split = (attention.num_heads, -1)
        query = attention.q_proj(seen["hidden_states"]).unflatten(-1, split)
        key = attention.k_proj(seen["hidden_states"]).unflatten(-1, split)
        received = attention_received(query, key, window, attention.scaling)
        return self._encoded(embeddings, _pooled(received, n_tokens))


def _pooled(received: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """A token's saliency is the mean of the two positions that were pooled into it; a tail of one is left."""
    return received[: 2 * n_tokens].view(n_tokens, 2).mean(dim=1)


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
