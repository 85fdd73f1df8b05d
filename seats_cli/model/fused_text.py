"""The Omni families' decoder layers with few passes over their activations; equal to transformers' by test.

Two forms of one layer: `layer` on a prompt, where the matrix products are the work, and `decode` on one token
of each sequence against buffers whose fill only the device knows, where reading the weights is. The second
contains no call that a CUDA graph could not record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from seats_cli.model.fused_modules import pack_rows
from seats_cli.model.fused_moe import ExpertMlp, is_mixture, take_experts
from seats_cli.model.kernels import (
    HeadNorms,
    attention,
    decode_attention,
    matvec,
    rms_norm,
    rotate_and_split,
    silu_mul,
)


@dataclass(frozen=True)
class DenseMlp:
    """One layer's gated MLP, gate and up packed in one."""

    gate_up: torch.Tensor
    down: torch.Tensor

    def added(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """x + mlp(normed), both (S, D); x is overwritten."""
        return x.addmm_(silu_mul(functional.linear(normed, self.gate_up)), self.down.t())

    def added_to_token(self, x: torch.Tensor, norm: tuple[torch.Tensor, float]) -> torch.Tensor:
        """x + mlp(rms_norm(x)) for one token of each of B sequences, (B, D)."""
        return matvec(matvec(x, self.gate_up, norm=norm, gated=True), self.down, residual=x)


@dataclass(frozen=True)
class DecoderWeights:
    """One layer's packed weights: query, key and value in one. `norms` of each query and key head, if any."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    norms: HeadNorms | None
    out: torch.Tensor
    norm2: torch.Tensor
    mlp: DenseMlp | ExpertMlp


class FusedText:
    """The decoder layers of a language model, packed."""

    def __init__(self, layers: Sequence[Any], n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self._eps = layers[0].input_layernorm.variance_epsilon
        self._layers = [_pack(layer) for layer in layers]

    def layer(
        self, index: int, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Any | None
    ) -> torch.Tensor:
        """Layer `index` on hidden (1, S, D), cos and sin (1, S, d): see `Adapter.run_layer`."""
        weights, x = self._layers[index], hidden[0]
        normed = rms_norm(x, weights.norm1, self._eps)
        qkv = functional.linear(normed, weights.qkv, weights.qkv_bias)
        sizes = (self.n_heads, self.n_kv_heads, self.head_dim)
        query, key, value = (
            part[None] for part in rotate_and_split(qkv, cos[0], sin[0], *sizes, norms=weights.norms)
        )
        if cache is not None:
            key, value = cache.update(key, value, index)
        seen = attention(query, key, value, causal=len(x) > 1)
        x = torch.addmm(x, seen[0].transpose(0, 1).flatten(1), weights.out.t())
        return weights.mlp.added(x, rms_norm(x, weights.norm2, self._eps))[None]

    def decode(
        self,
        index: int,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
    ) -> torch.Tensor:
        """Layer `index` on one token of each of B sequences, x (B, D), cos and sin (B, d): (B, D).

        keys, values: (B, K, capacity, d), which get the tokens' at `length` (B,) int32, left as it is.
        """
        weights = self._layers[index]
        qkv = matvec(x, weights.qkv, norm=(weights.norm1, self._eps), bias=weights.qkv_bias)
        seen = decode_attention(qkv, cos, sin, keys, values, length, self.n_heads, norms=weights.norms)
        x = matvec(seen, weights.out, residual=x)
        return weights.mlp.added_to_token(x, (weights.norm2, self._eps))


def _pack(layer: Any) -> DecoderWeights:
    heads, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = pack_rows([heads.q_proj, heads.k_proj, heads.v_proj])
    norms = None
    if hasattr(heads, "q_norm"):
        norms = HeadNorms(heads.q_norm.weight, heads.k_norm.weight, heads.q_norm.variance_epsilon)
    packed: DenseMlp | ExpertMlp
    if is_mixture(mlp):
        packed = take_experts(mlp)
    else:
        packed = DenseMlp(pack_rows([mlp.gate_proj, mlp.up_proj])[0], mlp.down_proj.weight)
    return DecoderWeights(
        layer.input_layernorm.weight, qkv, qkv_bias, norms, heads.o_proj.weight,
        layer.post_attention_layernorm.weight, packed,
    )  # fmt: skip
