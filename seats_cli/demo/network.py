"""The embedded model's forward pass for training: static shapes, batched, compiled block by block.

The parameters live in an ordinary `Qwen2_5OmniThinkerForConditionalGeneration`, so that what is saved is
what `seats ask` loads; only the forward pass is written anew, because the stock one loops over attention
windows in Python. `tests/demo/test_network.py` holds it equal to the stock modules.

Shapes: B clips, G grids (frame pairs) a clip, M audio chunks of 2 s, P prefix tokens, Q question tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float32, epsilon 1e-6, over the last axis; returns x's dtype."""
    x32 = x.float()
    return weight.to(x.dtype) * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., d) by cos and sin (broadcastable, d), in float32."""
    half = x.shape[-1] // 2
    x32 = x.float()
    turned = torch.cat((-x32[..., half:], x32[..., :half]), dim=-1)
    return (x32 * cos + turned * sin).to(x.dtype)


def _vision_block(x: Tensor, cos: Tensor, sin: Tensor, heads: int, w: tuple[Tensor, ...]) -> Tensor:
    """One vision block over x (n, s, d): n independent attention windows of s patches."""
    norm1, q_w, q_b, k_w, k_b, v_w, v_b, o_w, o_b, norm2, gate_w, gate_b, up_w, up_b, down_w, down_b = w
    n, s, d = x.shape
    h = rms_norm(x, norm1)
    q, k, v = (
        F.linear(h, weight, bias).view(n, s, heads, d // heads).transpose(1, 2)
        for weight, bias in ((q_w, q_b), (k_w, k_b), (v_w, v_b))
    )
    a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + F.linear(a.transpose(1, 2).reshape(n, s, d), o_w, o_b)
    h = rms_norm(x, norm2)
    return x + F.linear(F.silu(F.linear(h, gate_w, gate_b)) * F.linear(h, up_w, up_b), down_w, down_b)


def _audio_block(x: Tensor, heads: int, w: tuple[Tensor, ...]) -> Tensor:
    """One audio encoder layer over x (n, s, d): n chunks of s positions."""
    n1_w, n1_b, q_w, q_b, k_w, v_w, v_b, o_w, o_b, n2_w, n2_b, fc1_w, fc1_b, fc2_w, fc2_b = w
    n, s, d = x.shape
    h = F.layer_norm(x, (d,), n1_w, n1_b)
    q = F.linear(h, q_w, q_b).view(n, s, heads, d // heads).transpose(1, 2)
    k = F.linear(h, k_w).view(n, s, heads, d // heads).transpose(1, 2)
    v = F.linear(h, v_w, v_b).view(n, s, heads, d // heads).transpose(1, 2)
    a = F.scaled_dot_product_attention(q, k, v)
    x = x + F.linear(a.transpose(1, 2).reshape(n, s, d), o_w, o_b)
    h = F.layer_norm(x, (d,), n2_w, n2_b)
    return x + F.linear(F.gelu(F.linear(h, fc1_w, fc1_b)), fc2_w, fc2_b)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _decoder_block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    dropped: Tensor,
    attend: Attend,
    doc: Tensor,
    is_av: Tensor,
    first: int,
    heads: tuple[int, int],
    w: tuple[Tensor, ...],
) -> Tensor:
    """One decoder layer over x (B, S, D); `dropped` (B,) bool: text no longer sees audio-visual tokens."""
    norm1, q_w, q_b, k_w, k_b, v_w, v_b, o_w, norm2, gate_w, up_w, down_w = w
    b, s, _ = x.shape
    n_heads, n_kv = heads
    h = rms_norm(x, norm1)
    q = F.linear(h, q_w, q_b).view(b, s, n_heads, -1).transpose(1, 2)
    k = F.linear(h, k_w, k_b).view(b, s, n_kv, -1).transpose(1, 2)
    v = F.linear(h, v_w, v_b).view(b, s, n_kv, -1).transpose(1, 2)
    a = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, dropped, doc, is_av, first)
    x = x + F.linear(a.transpose(1, 2).reshape(b, s, -1), o_w)
    h = rms_norm(x, norm2)
    return x + F.linear(F.silu(F.linear(h, gate_w)) * F.linear(h, up_w), down_w)


def _pick(module: nn.Module, names: str) -> tuple[Tensor, ...]:
    return tuple(module.get_parameter(name) for name in names.split())


_VISION = (
    "norm1.weight attn.q.weight attn.q.bias attn.k.weight attn.k.bias attn.v.weight attn.v.bias "
    "attn.proj.weight attn.proj.bias norm2.weight mlp.gate_proj.weight mlp.gate_proj.bias "
    "mlp.up_proj.weight mlp.up_proj.bias mlp.down_proj.weight mlp.down_proj.bias"
)
_AUDIO = (
    "self_attn_layer_norm.weight self_attn_layer_norm.bias self_attn.q_proj.weight self_attn.q_proj.bias "
    "self_attn.k_proj.weight self_attn.v_proj.weight self_attn.v_proj.bias self_attn.out_proj.weight "
    "self_attn.out_proj.bias final_layer_norm.weight final_layer_norm.bias "
    "fc1.weight fc1.bias fc2.weight fc2.bias"
)
_DECODER = (
    "input_layernorm.weight self_attn.q_proj.weight self_attn.q_proj.bias self_attn.k_proj.weight "
    "self_attn.k_proj.bias self_attn.v_proj.weight self_attn.v_proj.bias self_attn.o_proj.weight "
    "post_attention_layernorm.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"
)


class TrainingForward:
    """Batched forward pass over the parameters of a stock thinker (see the module's docstring)."""

    def __init__(self, thinker: Any, compile_block: Compile = lambda function: function) -> None:
        config = thinker.config
        self.thinker = thinker
        self.visual = thinker.model.visual
        self.audio = thinker.model.audio_tower
        self.text = thinker.model.language_model
        self.vision_heads = config.vision_config.num_heads
        self.audio_heads = config.audio_config.encoder_attention_heads
        self.text_heads = (config.text_config.num_attention_heads, config.text_config.num_key_value_heads)
        self.merge_unit = config.vision_config.spatial_merge_size**2
        self.vision_block = compile_block(_vision_block)
        self.audio_block = compile_block(_audio_block)
        self.decoder_block = compile_block(_decoder_block)

    def encode_video(
        self, patches: Tensor, window_index: Tensor, cos: Tensor, sin: Tensor, window: int
    ) -> Tensor:
        """(N, p, 1176) patches of N grids in merge-block order -> (N, p/4, D) tokens.

        window_index: (p/4,) the order of merged tokens by attention window; cos, sin: (p, head_dim) in
        that order; window: patches in an attention window (p must be a multiple).
        """
        n, p, _ = patches.shape
        weight = self.visual.patch_embed.proj.weight
        x = F.linear(patches, weight.flatten(1))
        x = x.view(n, p // self.merge_unit, self.merge_unit, -1)[:, window_index].reshape(n, p, -1)
        d = x.shape[-1]
        cos_w, sin_w = (t.view(-1, 1, window, t.shape[-1]).repeat(n, 1, 1, 1) for t in (cos, sin))
        for index, block in enumerate(self.visual.blocks):
            if index in self.visual.fullatt_block_indexes:
                x = self.vision_block(x, cos, sin, self.vision_heads, _pick(block, _VISION))
            else:
                y = x.view(-1, window, d)
                y = self.vision_block(y, cos_w, sin_w, self.vision_heads, _pick(block, _VISION))
                x = y.view(n, p, d)
        merger = self.visual.merger
        x = rms_norm(x, merger.ln_q.weight).reshape(n, p // self.merge_unit, -1)
        x = F.linear(x, merger.mlp[0].weight, merger.mlp[0].bias)
        x = F.linear(F.gelu(x), merger.mlp[2].weight, merger.mlp[2].bias)
        return x[:, torch.argsort(window_index)]

    def encode_audio(self, mel: Tensor) -> Tensor:
        """(N, 128, 2 * n_window) log-mel chunks -> (N, n_window / 2, D) tokens."""
        a = self.audio
        x = F.gelu(F.conv1d(mel, a.conv1.weight, a.conv1.bias, padding=1))
        x = F.gelu(F.conv1d(x, a.conv2.weight, a.conv2.bias, stride=2, padding=1)).transpose(1, 2)
        x = x + a.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
        for layer in a.layers:
            x = self.audio_block(x, self.audio_heads, _pick(layer, _AUDIO))
        x = (x[:, 0::2] + x[:, 1::2]) / 2
        x = F.layer_norm(x, x.shape[-1:], a.ln_post.weight, a.ln_post.bias)
        return F.linear(x, a.proj.weight, a.proj.bias)

    def decode(
        self,
        hidden: Tensor,
        position: Tensor,
        attend: Attend,
        mask: "PackedMask",
        dropped: Tensor,
        probe_after: int,
    ) -> tuple[Tensor, Tensor]:
        """All decoder layers and the final norm over hidden (B, S, D), position (3, B, S).

        dropped: (layers, B) bool, see `_decoder_block`. Also returns the hidden states after layer
        `probe_after`, which the auxiliary loss reads.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            cos, sin = self.text.rotary_emb(hidden.float(), position)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        probe = hidden
        for index, layer in enumerate(self.text.layers):
            weights = _pick(layer, _DECODER)
            hidden = self.decoder_block(
                hidden,
                cos,
                sin,
                dropped[index],
                attend,
                mask.doc,
                mask.is_av,
                mask.first,
                self.text_heads,
                weights,
            )
            if index + 1 == probe_after:
                probe = hidden
        return rms_norm(hidden, self.text.norm.weight), probe


@dataclass(frozen=True)
class PackedMask:
    """Who sees whom: (B, S) doc, -1 in the prefix, else the question block; (S,) is_av.

    first: the first token after the last audio-visual one.
    """

    doc: Tensor
    is_av: Tensor
    first: int


def dense_attend(
    q: Tensor, k: Tensor, v: Tensor, dropped: Tensor, doc: Tensor, is_av: Tensor, blocks: Any
) -> Tensor:
    """Packed attention with a mask tensor, the reference: a block sees the prefix and itself, causally."""
    s = doc.shape[1]
    causal = torch.ones(s, s, dtype=torch.bool, device=doc.device).tril()
    same = (doc[:, None, :] < 0) | (doc[:, None, :] == doc[:, :, None])
    late = is_av[None, :] & ~is_av[:, None]
    mask = causal & same & ~(dropped[:, None, None] & late)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)


def split_attend(
    q: Tensor, k: Tensor, v: Tensor, dropped: Tensor, doc: Tensor, is_av: Tensor, first: int
) -> Tensor:
    """The same attention in two parts: plain causal up to `first`, where the audio-visual tokens end, and a
    mask for the short rest alone. (With flex_attention a whole step took five times as long on an H200.)
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    media = F.scaled_dot_product_attention(q[:, :, :first], k[:, :, :first], v[:, :, :first], is_causal=True)
    s = doc.shape[1]
    index = torch.arange(s, device=doc.device)
    causal = index[first:, None] >= index[None, :]
    same = (doc[:, None, :] < 0) | (doc[:, None, :] == doc[:, first:, None])
    mask = causal & same & ~(dropped[:, None, None] & is_av[None, None, :])
    rest = F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=mask[:, None])
    return torch.cat([media, rest], dim=2)
