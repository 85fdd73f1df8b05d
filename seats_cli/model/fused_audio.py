"""The audio encoders with all their chunks as one batch; equal to transformers' by test.

The references (`model.audio_tower`) attend block by block in a Python loop in every layer and wait for the
device to learn the chunks' lengths, which are known on the host. Both families have the same layers, and each
its own front and back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from seats_cli.model.fused_modules import pack_rows
from seats_cli.model.kernels import attention, layer_norm


@dataclass(frozen=True)
class AudioLayer:
    """One layer's weights, query, key and value packed. The offsets (D,) float32 are the sums of all output
    biases before its two norms, as in `fused_vision.Block`."""

    norm1: Any
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    norm2: Any
    up: torch.Tensor
    up_bias: torch.Tensor
    down: torch.Tensor
    offset1: torch.Tensor
    offset2: torch.Tensor


class FusedAudioLayers:
    """The layers of an audio tower, packed."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self.n_heads = tower.layers[0].self_attn.num_heads
        self._activation = tower.layers[0].activation_fn
        offset = torch.zeros(tower.ln_post.normalized_shape, device=tower.ln_post.weight.device)
        self._layers = []
        for layer in tower.layers:
            packed, offset = _pack(layer, offset)
            self._layers.append(packed)
        self._last_offset = offset

    def run(self, x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers on positions (P, D), overwritten, which attend within consecutive blocks of `block`, the
        last one shorter: the residual stream without `_last_offset`, and the last layer's queries, keys and
        values (P, 3 H d)."""
        full_rows = len(x) - len(x) % block
        for layer in self._layers:
            normed = _norm(x, layer.norm1, layer.offset1)
            qkv = functional.linear(normed, layer.qkv, layer.qkv_bias)
            x.addmm_(self._attend(qkv, full_rows, block), layer.out.t())
            inner = functional.linear(_norm(x, layer.norm2, layer.offset2), layer.up, layer.up_bias)
            x.addmm_(self._activation(inner), layer.down.t())
            if x.dtype == torch.float16:
                limit = torch.finfo(x.dtype).max - 1000
                x.clamp_(-limit, limit)
        return x, qkv

    def _attend(self, qkv: torch.Tensor, full_rows: int, block: int) -> torch.Tensor:
        """Attention within whole blocks, and within the rest that is left of the last: (P, H d)."""
        parts = []
        for rows, size in ((qkv[:full_rows], block), (qkv[full_rows:], len(qkv) - full_rows)):
            if not len(rows):
                continue
            heads = rows.view(-1, size, 3, self.n_heads, qkv.shape[1] // 3 // self.n_heads)
            query, key, value = heads.permute(2, 0, 3, 1, 4)
            seen = attention(query, key, value)
            parts.append(seen.transpose(1, 2).reshape(len(rows), -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class FusedAudio(FusedAudioLayers):
    """Qwen2.5-Omni's audio tower, packed; call it with the mel frames of one clip."""

    def __call__(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (tokens, D) of mel (bins, L) in the tower's dtype, chunks of 2 n_window frames on their
        own, the last one shorter; and the last layer's queries, keys and values (P, 3 H d)."""
        tower, whole = self._tower, 2 * self._tower.n_window
        n_chunks, rest = divmod(mel.shape[1], whole)
        parts = [mel[:, : n_chunks * whole].view(mel.shape[0], n_chunks, whole).transpose(0, 1)]
        if rest:
            parts.append(mel[:, n_chunks * whole :][None])
        x = torch.cat([self._front(part).flatten(0, 1) for part in parts if len(part)])
        x, qkv = self.run(x, tower.n_window)
        x = (x.float() + self._last_offset).to(x.dtype)
        pairs = x[: len(x) // 2 * 2]
        pooled = (pairs[0::2] + pairs[1::2]) / 2
        return tower.proj(tower.ln_post(pooled)), qkv

    def _front(self, mel: torch.Tensor) -> torch.Tensor:
        """Convolutions and positions of chunks (n, bins, frames) of one length: (n, positions, D)."""
        tower = self._tower
        x = functional.gelu(tower.conv1(mel))
        x = functional.gelu(tower.conv2(x)).transpose(1, 2)
        return x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)


class FusedConvolvedAudio(FusedAudioLayers):
    """Qwen3-Omni's audio tower, packed; call it with chunks of one clip."""

    def __call__(
        self, chunks: torch.Tensor, n_positions: int, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (n_positions, D) of chunks (n, bins, frames) in the tower's dtype, whose last positions
        may be padding, attending within blocks of `block`; and the last layer's queries, keys and values."""
        tower = self._tower
        parts = [self._front(part).flatten(0, 1) for part in chunks.split(tower.conv_chunksize)]
        x = (torch.cat(parts) if len(parts) > 1 else parts[0])[:n_positions]
        x, qkv = self.run(x, block)
        normed = _norm(x, tower.ln_post, self._last_offset)
        return tower.proj2(tower.act(tower.proj1(normed))), qkv

    def _front(self, mel: torch.Tensor) -> torch.Tensor:
        """Convolutions and positions of chunks (n, bins, frames): (n, positions, D)."""
        tower = self._tower
        x = mel[:, None]
        for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
            x = functional.gelu(convolution(x))
        x = tower.conv_out(x.permute(0, 3, 1, 2).flatten(2))
        return x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)


def _norm(x: torch.Tensor, norm: Any, offset: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, offset)


def _pack(layer: Any, offset: torch.Tensor) -> tuple[AudioLayer, torch.Tensor]:
    """A layer's packed weights, given the biases so far; and the biases after it."""
    heads = layer.self_attn
    qkv, qkv_bias = pack_rows([heads.q_proj, heads.k_proj, heads.v_proj])
    between = offset + heads.out_proj.bias.float()
    packed = AudioLayer(
        layer.self_attn_layer_norm, qkv, qkv_bias, heads.out_proj.weight, layer.final_layer_norm,
        layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, offset, between,
    )  # fmt: skip
    return packed, between + layer.fc2.bias.float()
