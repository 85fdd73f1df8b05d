"""Kernels of a mixture's experts in Triton, launched by expert_kernels.py, which has each one's reference.

As in triton_kernels.py each reads its inputs once, computes in float32 and rounds once.
"""

import triton
import triton.language as tl


@triton.jit
def route(
    logits_ptr, share_ptr, expert_ptr, n_experts,
    TOP: tl.constexpr, TOP_PAD: tl.constexpr, RENORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's TOP likeliest experts and their weights, likeliest first; of equals the first."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * n_experts + col, mask=col < n_experts, other=float("-inf"))
    left = logits.to(tl.float32)
    most = tl.max(left, axis=0)
    everything = tl.sum(tl.exp(left - most), axis=0)
    place = tl.arange(0, TOP_PAD)
    chosen = tl.zeros([TOP_PAD], tl.int32)
    likely = tl.zeros([TOP_PAD], tl.float32)
    for i in tl.static_range(TOP):
        best = tl.max(left, axis=0)
        # a token whose logits are no numbers must not send its row anywhere
        expert = tl.minimum(tl.min(tl.where(left == best, col, BLOCK), axis=0), n_experts - 1)
        chosen = tl.where(place == i, expert, chosen)
        likely = tl.where(place == i, tl.exp(best - most), likely)
        left = tl.where(col == expert, float("-inf"), left)
    total = tl.sum(likely, axis=0) if RENORMALISED else everything
    to = row * TOP + place
    tl.store(share_ptr + to, (likely / total).to(share_ptr.dtype.element_ty), mask=place < TOP)
    tl.store(expert_ptr + to, chosen.to(tl.int64), mask=place < TOP)


@triton.jit(do_not_specialize=["n"])
def rank_in_expert(expert_ptr, count_ptr, rank_ptr, n, BLOCK: tl.constexpr):
    """How many before each of n (token, expert) pairs have the same expert, in whatever order they come;
    counts (zeroed) gets how many there are."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n
    expert = tl.load(expert_ptr + pair, mask=inside, other=0)
    rank = tl.atomic_add(count_ptr + expert, 1, mask=inside)
    tl.store(rank_ptr + pair, rank.to(tl.int64), mask=inside)


@triton.jit
def rows_by_expert(
    x_ptr, expert_ptr, count_ptr, rank_ptr, place_ptr, end_ptr, row_ptr, width, n_experts,
    TOP: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's row to each of its experts' stretches, by its rank there; place gets where it went."""
    token = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, EXPERTS)
    counts = tl.load(count_ptr + number, mask=number < n_experts, other=0)
    if token == 0:
        tl.store(end_ptr + number, tl.cumsum(counts, axis=0), mask=number < n_experts)
    for i in tl.static_range(TOP):
        expert = tl.load(expert_ptr + token * TOP + i)
        before = tl.sum(tl.where(number < expert, counts, 0), axis=0)
        place = before + tl.load(rank_ptr + token * TOP + i)
        tl.store(place_ptr + token * TOP + i, place)
        for first in range(0, width, BLOCK):
            col = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + token * width + col, mask=col < width)
            tl.store(row_ptr + place * width + col, x, mask=col < width)


@triton.jit
def combine_experts(
    x_ptr, output_ptr, place_ptr, share_ptr, out_ptr, width, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one token's row: x + sum of share * output over its experts, whose rows `place` names."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP):
        place = tl.load(place_ptr + row * TOP + i)
        share = tl.load(share_ptr + row * TOP + i).to(tl.float32)
        total += tl.load(output_ptr + place * width + col, mask=inside, other=0.0).to(tl.float32) * share
    x = tl.load(x_ptr + row * width + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + col, (x + total).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expert_down(
    inner_ptr, weight_ptr, expert_ptr, share_ptr, residual_ptr, out_ptr, n_out, width,
    TOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS of residual + sum over one token's experts of share * weight @ inner; bound by reading weights."""
    token = tl.program_id(1).to(tl.int64)
    inner_ptr += token * TOP * width
    expert_ptr += token * TOP
    share_ptr += token * TOP
    residual_ptr += token * n_out
    out_ptr += token * n_out
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = row < n_out
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(TOP):
        expert = tl.load(expert_ptr + i).to(tl.int64)
        share = tl.load(share_ptr + i).to(tl.float32)
        at = weight_ptr + (expert * n_out + row)[:, None] * width
        for first in range(0, width, BLOCK):
            col = first + tl.arange(0, BLOCK)
            in_col = col < width
            x = tl.load(inner_ptr + i * width + col, mask=in_col, other=0.0).to(tl.float32) * share
            weight = tl.load(
                at + col[None, :], mask=in_row[:, None] & in_col[None, :], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            total += weight.to(tl.float32) * x[None, :]
    out = tl.sum(total, axis=1) + tl.load(residual_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=in_row)
