"""Qwen3-Omni's thinker behind the `Adapter` contract: its encoders, its prompt and its sizes.

The language model is a mixture of experts, which transformers runs as grouped products. The vision encoder
feeds the language model twice: the embeddings, and features of its earlier blocks that are added behind the
first layers (deepstack).
"""

from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from seats_cli.errors import ModelError
from seats_cli.model.adapter import AudioBlock, Encoded, Geometry
from seats_cli.model.fused_audio import FusedConvolvedAudio
from seats_cli.model.fused_deepstack import FusedDeepstackVision
from seats_cli.model.fused_moe import is_mixture
from seats_cli.model.omni import OmniAdapter
from seats_cli.model.preprocess import MelSpec, qwen3_audio_token_count
from seats_cli.model.prompt import PositionRule
from seats_cli.model.saliency import attention_received, last_input, received_from_qkv

SPECIAL_TOKENS = {
    "vision_bos": ("vision_start_token_id", "<|vision_start|>"),
    "vision_eos": ("vision_end_token_id", "<|vision_end|>"),
    "audio_bos": ("audio_start_token_id", "<|audio_start|>"),
    "audio_eos": ("audio_end_token_id", "<|audio_end|>"),
    "image": ("image_token_id", "<|image_pad|>"),
    "video": ("video_token_id", "<|video_pad|>"),
    "audio": ("audio_token_id", "<|audio_pad|>"),
}
CHUNK_FRAMES = 100  # mel frames that become 13 tokens, in transformers' count of them as in ours
WINDOW_S = 1.0  # of sound without video; with video a window is a grid, usually as long


class Qwen3OmniAdapter(OmniAdapter):
    """`Adapter` over a loaded `Qwen3OmniMoeThinkerForConditionalGeneration`."""

    default_system = None
    special_tokens = SPECIAL_TOKENS
    rotate = staticmethod(apply_rotary_pos_emb)
    audio_token_count = staticmethod(qwen3_audio_token_count)
    _fast_vision: FusedDeepstackVision | None = None
    _fast_audio: FusedConvolvedAudio | None = None

    @staticmethod
    def read_geometry(config: Any, mel: MelSpec) -> Geometry:
        """The sizes that a `Qwen3OmniMoeThinkerConfig` states."""
        return read_geometry(config, mel)

    @staticmethod
    def position_rule(geometry: Geometry) -> PositionRule:
        """Positions that may be fractions; video and audio merged by time, a window is a grid."""
        return PositionRule(
            ids_per_s=geometry.position_ids_per_s,
            window_s=geometry.seconds_per_window,
            audio_tokens_per_s=geometry.audio_tokens_per_s,
            merge=geometry.merge,
            by_time=True,
        )

    def _why_not_text(self) -> str | None:
        experts = (
            weight
            for layer in self._text.layers
            if is_mixture(layer.mlp)
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight)
        )
        reason = super()._why_not_text()
        if reason is None and any(weight.dtype != self.dtype for weight in experts):
            return "the weights are of several dtypes"
        return reason

    def _pack_vision(self) -> None:
        self._fast_vision = FusedDeepstackVision(self._visual)

    def _pack_audio(self) -> None:
        self._fast_audio = FusedConvolvedAudio(self._audio)

    @property
    def audio_block(self) -> AudioBlock:
        """See `Adapter.audio_block`: some chunks of the convolutions, attended to together."""
        frames = int(self._audio.n_window_infer)
        n_tokens = qwen3_audio_token_count(frames)
        return AudioBlock(frames=frames, positions=n_tokens, tokens=n_tokens)

    def _query(self, attention: Any, normed: torch.Tensor) -> torch.Tensor:
        return attention.q_norm(super()._query(attention, normed))

    def _key(self, attention: Any, normed: torch.Tensor) -> torch.Tensor:
        return attention.k_norm(super()._key(attention, normed))

    # ---- encoders --------------------------------------------------------------------------------

    def _encode_patches(
        self, patches: torch.Tensor, grid: tuple[int, int, int], window: int, with_saliency: bool
    ) -> Encoded:
        window_patches = grid[1] * grid[2] * window
        if self._fast_vision is not None:
            embeddings, features, qkv = self._fast_vision(patches, grid[1], grid[2])
            deepstack = torch.stack(features) if features else None
            if not with_saliency:
                return self._encoded(embeddings, None, deepstack)
            received = received_from_qkv(qkv, self._fast_vision.n_heads, window_patches)
            return self._encoded(embeddings, self._per_token(received), deepstack)
        grid_thw = self._grid_thw(patches, grid)
        attention = self._visual.blocks[-1].attn
        with last_input(attention) as seen:
            output = self._visual(patches, grid_thw=grid_thw)
        deepstack = torch.stack(output.deepstack_features) if output.deepstack_features else None
        if not with_saliency:
            return self._encoded(output.pooler_output, None, deepstack)
        qkv = attention.qkv(seen["hidden_states"]).unflatten(-1, (3, attention.num_heads, -1))
        query, key, _ = qkv.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *seen["position_embeddings"])
        received = attention_received(query, key, window_patches, attention.scaling)
        return self._encoded(output.pooler_output, self._per_token(received), deepstack)

    def _per_token(self, received: torch.Tensor) -> torch.Tensor:
        """The mean over the patches that make a token, which stand together."""
        return received.view(-1, self.geometry.merge**2).mean(dim=1)

    def _encode_mel(self, mel: torch.Tensor, window: int, with_saliency: bool, start: int) -> Encoded:
        device = self._audio_device
        features, chunk_lengths = self._chunks(mel.to(device, self._audio.conv2d1.weight.dtype), start)
        n_tokens, block = qwen3_audio_token_count(mel.shape[1]), self.audio_block.positions
        if self._fast_audio is not None:
            embeddings, qkv = self._fast_audio(features, n_tokens, block)
            if not with_saliency:
                return self._encoded(embeddings, None)
            return self._encoded(embeddings, received_from_qkv(qkv, self._fast_audio.n_heads, window))
        attention = self._audio.layers[-1].self_attn
        with last_input(attention) as seen:
            embeddings = self._audio(
                padded_feature=features,
                chunk_lengths=torch.tensor(chunk_lengths, device=device),
                valid_indices=torch.arange(n_tokens, device=device),  # padding is at the end alone
                cu_seqlens=torch.tensor(
                    [*range(0, n_tokens, block), n_tokens], dtype=torch.int32, device=device
                ),
            ).last_hidden_state
        if not with_saliency:
            return self._encoded(embeddings, None)
        split = (attention.num_heads, -1)
        query = attention.q_proj(seen["hidden_states"]).unflatten(-1, split)
        key = attention.k_proj(seen["hidden_states"]).unflatten(-1, split)
        return self._encoded(embeddings, attention_received(query, key, window, attention.scaling))

    def _chunks(self, mel: torch.Tensor, start: int) -> tuple[torch.Tensor, list[int]]:
        """Mel frames in chunks for the convolutions, (n, bins, frames), and how many frames of each are real.

        transformers pads the last chunk to the clip's longest one, and the convolutions hear the padding: a
        clip shorter than a chunk is not padded, the end of a longer one is, wherever it is cut."""
        size = 2 * int(self._audio.n_window)
        n_frames = mel.shape[1]
        lengths = [min(size, n_frames - i) for i in range(0, n_frames, size)]
        width = size if start or len(lengths) > 1 else lengths[0]
        padded = nn.functional.pad(mel, (0, len(lengths) * width - n_frames))
        return padded.view(mel.shape[0], len(lengths), width).transpose(0, 1), lengths


def read_geometry(config: Any, mel: MelSpec) -> Geometry:
    """The sizes that a `Qwen3OmniMoeThinkerConfig` states."""
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    chunk = 2 * audio.n_window
    if chunk != CHUNK_FRAMES or audio.n_window_infer % chunk:
        raise ModelError(
            f"audio chunks of {chunk} mel frames, attended to in blocks of {audio.n_window_infer}, are not "
            f"known: Qwen3-Omni's are {CHUNK_FRAMES}, in blocks of whole chunks",
            hint="n_window and n_window_infer of audio_config in config.json say so",
        )
    return Geometry(
        family="qwen3_omni_moe",
        n_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        mlp=text.moe_intermediate_size,
        vocab=text.vocab_size,
        context_length=text.max_position_embeddings,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal_patch=vision.temporal_patch_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_heads=vision.num_heads,
        vision_mlp=vision.intermediate_size,
        vision_full_layers=vision.depth,
        vision_window_patches=0,
        audio_layers=audio.encoder_layers,
        audio_hidden=audio.d_model,
        audio_heads=audio.encoder_attention_heads,
        audio_mlp=audio.encoder_ffn_dim,
        audio_chunk=qwen3_audio_token_count(audio.n_window_infer),
        mel_bins=audio.num_mel_bins,
        audio_tokens_per_s=qwen3_audio_token_count(chunk) * mel.frames_per_s / chunk,
        position_ids_per_s=config.position_id_per_seconds,
        seconds_per_window=WINDOW_S,
        tied_embeddings=bool(config.tie_word_embeddings),
        experts=text.num_experts,
        active_experts=text.num_experts_per_tok,
        deepstack_layers=len(vision.deepstack_visual_indexes),
        vision_mlp_products=2,
        audio_stem_width=audio.downsample_hidden_size,
        audio_stem_frames=chunk,
    )
