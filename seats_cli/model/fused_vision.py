"""Qwen2.5-Omni's vision encoder with few passes over its activations; equal to transformers' by test.

What differs from the reference (`model.visual`) is the order of work, never the mathematics: query, key and
value are one product, gate and up another, zero-padded to a width that the matrix units like; residuals are
added by the products themselves; and all attention windows of one size are one batch. Nothing waits for the
device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from seats_cli.model.fused_modules import ALIGNMENT, pack_rows, pad_columns
from seats_cli.model.kept import Kept
from seats_cli.model.kernels import attention, rms_norm, rotate_pairs, silu_mul


@dataclass(frozen=True)
class Block:
    """One block's packed weights. `attention_offset` and `mlp_offset` (D,) float32 are the sums of all output
    biases before its two norms: the residual stream is carried without them and the norms add them."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    norm2: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    attention_offset: torch.Tensor
    mlp_offset: torch.Tensor


@dataclass(frozen=True)
class GridPlan:
    """What all grids of h x w patches share, on the device.

    order, back: (tokens,) int64, row-major tokens to the order of attention windows, and back
    cos, sin:    (patches, d) float32 in that order
    sizes:       patches of each attention window, in order
    """

    order: torch.Tensor
    back: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    sizes: tuple[int, ...]


class FusedVision:
    """A vision tower that was packed; call it with patches of whole grids."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self._full = frozenset(tower.fullatt_block_indexes)
        self._unit = tower.spatial_merge_unit
        first = tower.blocks[0].attn
        self.n_heads, self.head_dim = first.num_heads, first.head_dim
        self._eps = tower.blocks[0].norm1.variance_epsilon
        self._patch = tower.patch_embed.proj.weight.flatten(1)
        offset = torch.zeros(first.dim, dtype=torch.float32, device=self._patch.device)
        self._blocks = []
        for block in tower.blocks:
            packed, offset = _pack(block, offset)
            self._blocks.append(packed)
        self._last_offset = offset
        self._plans: Kept[tuple[int, int], GridPlan] = Kept(self._patch.device)
        self._ends: Kept[tuple[Any, int], torch.Tensor] = Kept(self._patch.device)
        self._rows: Kept[tuple[Any, int], list[torch.Tensor]] = Kept(self._patch.device)

    def __call__(
        self, patches: torch.Tensor, height: int, width: int, *, last: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (tokens, D) of patches (n, 3 * 2 * 14 * 14), grid by grid in row-major order.

        With `last` also the last block's rotated queries, keys and values (n, 3 H d), in the order of
        attention windows within each grid, as `GridPlan.order` has it.
        """
        plan = self.plan(height, width)
        per_grid = height * width
        grids = patches.shape[0] // per_grid
        x = functional.linear(patches, self._patch)
        x = self._reorder(x, grids, plan.order)
        qkv = None
        for index, block in enumerate(self._blocks):
            normed = rms_norm(x, block.norm1, self._eps, block.attention_offset)
            qkv = functional.linear(normed, block.qkv, block.qkv_bias)
            qkv = rotate_pairs(qkv, plan.cos, plan.sin, self.n_heads, self.head_dim)
            sizes = (per_grid,) if index in self._full else plan.sizes
            seen = self._attend(qkv, sizes, grids)
            x.addmm_(seen, block.out.t())
            normed = rms_norm(x, block.norm2, self._eps, block.mlp_offset)
            gate_up = functional.linear(normed, block.gate_up, block.gate_up_bias)
            x.addmm_(silu_mul(gate_up), block.down.t())
        merger = self._tower.merger
        merged = rms_norm(x, merger.ln_q.weight, merger.ln_q.variance_epsilon, self._last_offset)
        tokens = merger.mlp(merged.view(-1, merger.hidden_size))
        tokens = tokens.view(grids, -1, tokens.shape[1])[:, plan.back].flatten(0, 1)
        return tokens, qkv if last else None

    def plan(self, height: int, width: int) -> GridPlan:
        """What grids of this size share."""
        return self._plans.get((height, width), lambda: self._make_plan(height, width))

    def _make_plan(self, height: int, width: int) -> GridPlan:
        tower, device = self._tower, self._patch.device
        grid = torch.tensor([[1, height, width]])
        order, ends = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        places = get_vision_position_ids(grid, tower.spatial_merge_size).to(device)
        order = order.to(device)
        like = torch.empty(0, dtype=torch.float32, device=device)
        cos, sin = (
            table.unflatten(0, (-1, self._unit))[order].flatten(0, 1).float().contiguous()
            for table in tower.rotary_pos_emb(like, places)
        )
        return GridPlan(order, order.argsort(), cos, sin, tuple(ends.diff().tolist()))

    def _reorder(self, x: torch.Tensor, grids: int, order: torch.Tensor) -> torch.Tensor:
        return x.view(grids, -1, self._unit, x.shape[1])[:, order].view(x.shape)

    def _attend(self, qkv: torch.Tensor, sizes: tuple[int, ...], grids: int) -> torch.Tensor:
        """Attention within consecutive windows of `sizes` rows, the same in every grid: (n, H d)."""
        n_rows = qkv.shape[0]
        if len(set(sizes)) == 1:
            heads = qkv.view(-1, sizes[0], 3, self.n_heads, self.head_dim)
            query, key, value = heads.permute(2, 0, 3, 1, 4)
            seen = attention(query, key, value)
            return seen.transpose(1, 2).reshape(n_rows, -1)
        query, key, value = qkv.view(n_rows, 3, self.n_heads, self.head_dim).unbind(1)
        if qkv.is_cuda and qkv.dtype != torch.float32:
            ends = self._ends.get((sizes, grids), lambda: _window_ends(sizes, grids, qkv.device))
            found = varlen_attn(query, key, value, ends, ends, max(sizes), max(sizes))
            assert isinstance(found, torch.Tensor)  # nothing else was asked for
            return found.reshape(n_rows, -1)
        seen = torch.empty_like(query, memory_format=torch.contiguous_format)
        by_size = self._rows.get((sizes, grids), lambda: _rows_by_size(sizes, grids, qkv.device))
        for rows in by_size:
            q, k, v = (part[rows].transpose(1, 2) for part in (query, key, value))
            seen[rows] = attention(q, k, v).transpose(1, 2)
        return seen.view(n_rows, -1)


def _window_ends(sizes: tuple[int, ...], grids: int, device: torch.device) -> torch.Tensor:
    """Where each window begins, and the last ends: (windows + 1,) int32."""
    return torch.tensor([0, *sizes * grids]).cumsum(0).to(device, torch.int32)


def _rows_by_size(sizes: tuple[int, ...], grids: int, device: torch.device) -> list[torch.Tensor]:
    """For each size, the rows of its windows: (windows, size) int64."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    per_grid, found = int(starts[-1]), []
    for size in sorted(set(sizes)):
        first = torch.tensor([int(start) for start, own in zip(starts, sizes, strict=False) if own == size])
        first = (torch.arange(grids)[:, None] * per_grid + first).flatten()
        found.append((first[:, None] + torch.arange(size)).to(device))
    return found


def _pack(block: Any, offset: torch.Tensor) -> tuple[Block, torch.Tensor]:
    """A block's packed weights, given the biases so far; and the biases after it."""
    heads, mlp = block.attn, block.mlp
    pad = -mlp.intermediate_size % ALIGNMENT
    qkv, qkv_bias = pack_rows([heads.q, heads.k, heads.v])
    gate_up, gate_up_bias = pack_rows([mlp.gate_proj, mlp.up_proj], pad)
    between = offset if heads.proj.bias is None else offset + heads.proj.bias.float()
    after = between if mlp.down_proj.bias is None else between + mlp.down_proj.bias.float()
    packed = Block(
        block.norm1.weight, qkv, qkv_bias, heads.proj.weight, block.norm2.weight, gate_up, gate_up_bias,
        pad_columns(mlp.down_proj, pad), offset, between,
    )  # fmt: skip
    return packed, after
