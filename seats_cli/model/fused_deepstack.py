"""Qwen3-Omni's vision encoder with few passes over its activations; equal to transformers' by test.

As in `fused_vision.py` the order of work differs from the reference (`model.visual`), never the mathematics:
the residual stream is carried without the output biases, which the norms add, products are padded to a width
that the matrix units like, and the grids, which attend to themselves alone, are one batch. Nothing waits for
the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from seats_cli.model.fused_modules import ALIGNMENT, pack_rows, pad_columns
from seats_cli.model.kept import Kept
from seats_cli.model.kernels import attention, layer_norm, rotate_pairs


@dataclass(frozen=True)
class Block:
    """One block's weights. `attention_offset` and `mlp_offset` (D,) float32 are the sums of all output biases
    before its two norms, `offset` those behind the block."""

    norm1: Any
    qkv: Any
    out: torch.Tensor
    norm2: Any
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    attention_offset: torch.Tensor
    mlp_offset: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True)
class GridPlan:
    """What all grids of h x w patches share, on the device: learned positions (patches, D) and rotary cos and
    sin (patches, d) float32."""

    position: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class FusedDeepstackVision:
    """A vision tower that was packed; call it with patches of whole grids."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        first = tower.blocks[0].attn
        self.n_heads, self.head_dim = first.num_heads, first.head_dim
        self._activation = tower.blocks[0].mlp.act_fn
        self._patch = tower.patch_embed.proj.weight.flatten(1)
        offset = torch.zeros(first.dim, dtype=torch.float32, device=self._patch.device)
        self._blocks = []
        for block in tower.blocks:
            packed = _pack(block, offset)
            self._blocks.append(packed)
            offset = packed.offset
        self._plans: Kept[tuple[int, int], GridPlan] = Kept(self._patch.device)

    def __call__(
        self, patches: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Embeddings (tokens, D) of patches (n, 3 * 2 * 16 * 16), grid by grid; the deepstack's features,
        each (tokens, D); and the last block's rotated queries, keys and values (n, 3 H d)."""
        tower, plan = self._tower, self.plan(height, width)
        per_grid = height * width
        x = functional.linear(patches, self._patch, tower.patch_embed.proj.bias)
        x = (x.view(-1, per_grid, x.shape[1]) + plan.position).flatten(0, 1)
        deepstack: list[torch.Tensor] = []
        for index, block in enumerate(self._blocks):
            qkv = block.qkv(_norm(x, block.norm1, block.attention_offset))
            qkv = rotate_pairs(qkv, plan.cos, plan.sin, self.n_heads, self.head_dim)
            x.addmm_(self._attend(qkv, per_grid), block.out.t())
            inner = functional.linear(_norm(x, block.norm2, block.mlp_offset), block.up, block.up_bias)
            x.addmm_(self._activation(inner), block.down.t())
            if index in tower.deepstack_visual_indexes:
                merger = tower.merger_list[len(deepstack)]
                unit = tower.spatial_merge_unit
                merged = _norm(x.view(-1, merger.hidden_size), merger.ln_q, block.offset.repeat(unit))
                deepstack.append(_through(merger.mlp, merged))
        merger = tower.merger
        merged = _norm(x, merger.ln_q, self._blocks[-1].offset).view(-1, merger.hidden_size)
        return _through(merger.mlp, merged), deepstack, qkv

    def plan(self, height: int, width: int) -> GridPlan:
        """What grids of this size share."""
        return self._plans.get((height, width), lambda: self._make_plan(height, width))

    def _make_plan(self, height: int, width: int) -> GridPlan:
        tower, device = self._tower, self._patch.device
        grid = torch.tensor([[1, height, width]])
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        position = (tower.pos_embed(indices.to(device)) * weights.to(device)[:, :, None]).sum(1)
        places = get_vision_position_ids(grid, tower.spatial_merge_size).to(device)
        like = torch.empty(0, dtype=torch.float32, device=device)
        cos, sin = (table.float().contiguous() for table in tower.rotary_pos_emb(like, places))
        return GridPlan(position.to(self._patch.dtype), cos, sin)

    def _attend(self, qkv: torch.Tensor, per_grid: int) -> torch.Tensor:
        """Attention within each grid: (n, H d)."""
        heads = qkv.view(-1, per_grid, 3, self.n_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = attention(query, key, value)
        return seen.transpose(1, 2).reshape(len(qkv), -1)


def _through(layers: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _norm(x: torch.Tensor, norm: Any, offset: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, offset)


def _pack(block: Any, offset: torch.Tensor) -> Block:
    """A block's weights, given the biases so far."""
    heads, mlp = block.attn, block.mlp
    pad = -mlp.intermediate_size % ALIGNMENT
    up, up_bias = pack_rows([mlp.linear_fc1], pad)
    between = offset + heads.proj.bias.float()
    return Block(
        block.norm1, heads.qkv, heads.proj.weight, block.norm2, up, up_bias,
        pad_columns(mlp.linear_fc2, pad), offset, between, between + mlp.linear_fc2.bias.float(),
    )  # fmt: skip
