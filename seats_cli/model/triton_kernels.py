"""Kernels for CUDA devices in Triton, launched by kernels.py, which has each one's reference in PyTorch.

Every kernel reads its inputs once, computes in float32 and rounds once, to the type that it writes. Rows are
contiguous unless a stride says otherwise. Numbers that follow from a clip's or a prompt's length are not
specialised on, or Triton would compile a kernel anew for some lengths. Importing this needs Triton, which
PyTorch's CUDA builds bring.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x_ptr, weight_ptr, offset_ptr, out_ptr, width, eps, HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program: (x + offset) / rms * weight, rounded before the weight as transformers does."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < width
    x = tl.load(x_ptr + row * width + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        x += tl.load(offset_ptr + col, mask=inside, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + col, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, offset_ptr, out_ptr, width, eps, BLOCK: tl.constexpr):
    """One row a program: (x + offset - mean) / deviation * weight + bias."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < width
    x = tl.load(x_ptr + row * width + col, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(offset_ptr + col, mask=inside, other=0.0)
    x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    x = x / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + col, (x * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """silu(x[:, :width]) * x[:, width:], a block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate = tl.load(x_ptr + row * 2 * width + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + col, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + col, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_head(low, high, is_query, turned, q_norm_ptr, k_norm_ptr, col, eps, DIM: tl.constexpr):
    """Both halves of heads (HEADS, HALF) float32 after their root-mean-square norm, rounded to the weight's
    type before and after it, as transformers does; values (not `turned`) as they are."""
    inside = col < DIM // 2
    scale = 1.0 / tl.sqrt(tl.sum(low * low + high * high, axis=1) / DIM + eps)[:, None]
    q_low = tl.load(q_norm_ptr + col, mask=inside, other=0.0).to(tl.float32)
    k_low = tl.load(k_norm_ptr + col, mask=inside, other=0.0).to(tl.float32)
    q_high = tl.load(q_norm_ptr + DIM // 2 + col, mask=inside, other=0.0).to(tl.float32)
    k_high = tl.load(k_norm_ptr + DIM // 2 + col, mask=inside, other=0.0).to(tl.float32)
    normed_low = (low * scale).to(q_norm_ptr.dtype.element_ty).to(tl.float32)
    normed_high = (high * scale).to(q_norm_ptr.dtype.element_ty).to(tl.float32)
    normed_low = (normed_low * tl.where(is_query, q_low, k_low)).to(q_norm_ptr.dtype.element_ty)
    normed_high = (normed_high * tl.where(is_query, q_high, k_high)).to(q_norm_ptr.dtype.element_ty)
    normed_low, normed_high = normed_low.to(tl.float32), normed_high.to(tl.float32)
    return tl.where(turned, normed_low, low), tl.where(turned, normed_high, high)


@triton.jit(do_not_specialize=["n_rows", "period"])
def rotate(
    qkv_ptr, cos_ptr, sin_ptr, kv_ptr, q_norm_ptr, k_norm_ptr, n_rows, period, row_stride, eps,
    N_QUERY: tl.constexpr, N_KEY: tl.constexpr, N_HEADS: tl.constexpr, DIM: tl.constexpr,
    SPLIT: tl.constexpr, HAS_NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of one row's heads: queries in place; keys in place too, or with SPLIT, they and the
    values go to kv (2 N_KEY, n_rows, DIM). cos and sin repeat after `period` rows. With HAS_NORM every query
    and key head is normed first."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, HALF)[None, :]
    half = DIM // 2
    inside = (head < N_HEADS) & (col < half)
    at = qkv_ptr + row * row_stride + head * DIM + col
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    turned = head < N_QUERY + N_KEY
    if HAS_NORM:
        is_query = head < N_QUERY
        low, high = norm_head(low, high, is_query, turned, q_norm_ptr, k_norm_ptr, col, eps, DIM)
    place = (row % period) * DIM + col
    cos = tl.load(cos_ptr + place, mask=col < half, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=col < half, other=0.0).to(tl.float32)
    cos = tl.where(turned, cos, 1.0)
    sin = tl.where(turned, sin, 0.0)
    new_low = (low * cos - high * sin).to(qkv_ptr.dtype.element_ty)
    new_high = (high * cos + low * sin).to(qkv_ptr.dtype.element_ty)
    if SPLIT:
        query = inside & (head < N_QUERY)
        tl.store(at, new_low, mask=query)
        tl.store(at + half, new_high, mask=query)
        key = inside & (head >= N_QUERY)
        to = kv_ptr + ((head - N_QUERY).to(tl.int64) * n_rows + row) * DIM + col
        tl.store(to, new_low, mask=key)
        tl.store(to + half, new_high, mask=key)
    else:
        tl.store(at, new_low, mask=inside & turned)
        tl.store(at + half, new_high, mask=inside & turned)


@triton.jit(do_not_specialize=["n_rows", "window"])
def attention_lse(
    q_ptr, k_ptr, lse_ptr, n_rows, window, row_stride, scale,
    N_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log sum exp of each query's scores within its window, to lse (N_HEADS, n_rows) float32."""
    start = tl.program_id(2).to(tl.int64) * window
    head = tl.program_id(1)
    size = tl.minimum(window, n_rows - start)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_PAD)
    in_row = row < size
    q = tl.load(
        q_ptr + (start + row)[:, None] * row_stride + head * DIM + dim[None, :],
        mask=in_row[:, None] & (dim < DIM)[None, :], other=0.0,
    )  # fmt: skip
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        other = first + tl.arange(0, BLOCK)
        k = tl.load(
            k_ptr + (start + other)[:, None] * row_stride + head * DIM + dim[None, :],
            mask=(other < size)[:, None] & (dim < DIM)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((other < size)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(scores - higher[:, None]), axis=1)
        most = higher
    tl.store(lse_ptr + head * n_rows + start + row, most + tl.log(total), mask=in_row)


@triton.jit(do_not_specialize=["n_rows", "window"])
def attention_received(
    q_ptr, k_ptr, lse_ptr, out_ptr, n_rows, window, row_stride, scale,
    N_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention that each key receives from its window, mean over heads: out (n_rows,) float32."""
    start = tl.program_id(1).to(tl.int64) * window
    size = tl.minimum(window, n_rows - start)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_PAD)
    received = tl.zeros([BLOCK], tl.float32)
    for head in range(N_HEADS):
        k = tl.load(
            k_ptr + (start + key)[:, None] * row_stride + head * DIM + dim[None, :],
            mask=(key < size)[:, None] & (dim < DIM)[None, :], other=0.0,
        )  # fmt: skip
        for first in range(0, size, BLOCK):
            row = first + tl.arange(0, BLOCK)
            q = tl.load(
                q_ptr + (start + row)[:, None] * row_stride + head * DIM + dim[None, :],
                mask=(row < size)[:, None] & (dim < DIM)[None, :], other=0.0,
            )  # fmt: skip
            lse = tl.load(lse_ptr + head * n_rows + start + row, mask=row < size, other=float("inf"))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            received += tl.sum(tl.exp(scores - lse[:, None]), axis=0)
    tl.store(out_ptr + start + key, received / N_HEADS, mask=key < size)


@triton.jit
def matvec(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, expert_ptr, out_ptr, n_out, width, eps,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TOP: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out = weight @ rms_norm(x) + bias + residual, or with GATED silu(first half) * (second half of rows).

    With TOP above 0 the second program index counts the experts of all tokens, TOP a token: each has a weight
    of its own, which expert_ptr names, and a row of its own in out. Bound by reading `weight` once;
    everything else stays in cache.
    """
    dtype = weight_ptr.dtype.element_ty
    if TOP > 0:
        n_rows = n_out * 2 if GATED else n_out
        expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
        weight_ptr += expert * n_rows * width
        out_ptr += tl.program_id(1) * n_out
        x_ptr += tl.program_id(1) // TOP * width
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = row < n_out
    at = weight_ptr + row.to(tl.int64)[:, None] * width
    scale = 1.0
    if HAS_NORM:
        whole = tl.arange(0, WHOLE)
        x_all = tl.load(x_ptr + whole, mask=whole < width, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x_all * x_all, axis=0) / width + eps)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    total_up = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        col = first + tl.arange(0, BLOCK)
        in_col = col < width
        x = tl.load(x_ptr + col, mask=in_col, other=0.0).to(tl.float32)
        if HAS_NORM:
            x = (x * scale).to(dtype).to(tl.float32)
            x = (x * tl.load(norm_ptr + col, mask=in_col, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        both = in_row[:, None] & in_col[None, :]
        weight = tl.load(at + col[None, :], mask=both, other=0.0, eviction_policy="evict_first")
        total += weight.to(tl.float32) * x[None, :]
        if GATED:
            up = tl.load(
                at + n_out.to(tl.int64) * width + col[None, :], mask=both, other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            total_up += up.to(tl.float32) * x[None, :]
    out = tl.sum(total, axis=1)
    if GATED:
        out = out / (1.0 + tl.exp(-out)) * tl.sum(total_up, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["capacity"])
def append_token(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, key_ptr, value_ptr, length_ptr, capacity, eps,
    N_QUERY: tl.constexpr, N_KEY: tl.constexpr, DIM: tl.constexpr, HAS_NORM: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """One new token a sequence: rotate its queries in place, put key and value at `length` of its cache; with
    HAS_NORM norm every query and key head first."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    qkv_ptr += row * (N_QUERY + 2 * N_KEY) * DIM
    cos_ptr += row * DIM
    sin_ptr += row * DIM
    key_ptr += row * N_KEY * capacity * DIM
    value_ptr += row * N_KEY * capacity * DIM
    col = tl.arange(0, HALF)
    half = DIM // 2
    inside = col < half
    low = tl.load(qkv_ptr + head * DIM + col, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + head * DIM + half + col, mask=inside, other=0.0).to(tl.float32)
    turned = head < N_QUERY + N_KEY
    if HAS_NORM:
        wide_low, wide_high = norm_head(
            low[None, :],
            high[None, :],
            head < N_QUERY,
            turned,
            q_norm_ptr,
            k_norm_ptr,
            col[None, :],
            eps,
            DIM,
        )
        low = tl.reshape(wide_low, [HALF])
        high = tl.reshape(wide_high, [HALF])
    cos = tl.load(cos_ptr + col, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + col, mask=inside, other=0.0).to(tl.float32)
    cos = tl.where(turned, cos, 1.0)
    sin = tl.where(turned, sin, 0.0)
    new_low = (low * cos - high * sin).to(qkv_ptr.dtype.element_ty)
    new_high = (high * cos + low * sin).to(qkv_ptr.dtype.element_ty)
    length = tl.load(length_ptr + row).to(tl.int64)
    if head < N_QUERY:
        tl.store(qkv_ptr + head * DIM + col, new_low, mask=inside)
        tl.store(qkv_ptr + head * DIM + half + col, new_high, mask=inside)
    elif head < N_QUERY + N_KEY:
        to = key_ptr + ((head - N_QUERY) * capacity + length) * DIM + col
        tl.store(to, new_low, mask=inside)
        tl.store(to + half, new_high, mask=inside)
    else:
        to = value_ptr + ((head - N_QUERY - N_KEY) * capacity + length) * DIM + col
        tl.store(to, new_low, mask=inside)
        tl.store(to + half, new_high, mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def attend_part(
    q_ptr, key_ptr, value_ptr, length_ptr, part_ptr, lse_ptr, capacity, scale,
    N_QUERY: tl.constexpr, N_KEY: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One key head's queries over one of SPLITS stretches of a sequence's cache (the new token's slot is
    filled)."""
    key_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    q_ptr += row * (N_QUERY + 2 * N_KEY) * DIM
    key_ptr += row * N_KEY * capacity * DIM
    value_ptr += row * N_KEY * capacity * DIM
    part_ptr += row * N_QUERY * SPLITS * DIM
    lse_ptr += row * N_QUERY * SPLITS
    GROUP: tl.constexpr = N_QUERY // N_KEY
    length = tl.load(length_ptr + row) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * span
    end = tl.minimum(begin + span, length)
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    in_dim = (dim < DIM)[None, :]
    head = key_head * GROUP + member
    q = tl.load(
        q_ptr + head[:, None] * DIM + dim[None, :], mask=(member < GROUP)[:, None] & in_dim, other=0.0
    )
    most = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    out = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        at = (key_head.to(tl.int64) * capacity + place)[:, None] * DIM + dim[None, :]
        valid = (place < end)[:, None] & in_dim
        k = tl.load(key_ptr + at, mask=valid, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((place < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(value_ptr + at, mask=valid, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = higher
    found = total > 0
    out = out / tl.where(found, total, 1.0)[:, None]
    lse = tl.where(found, most + tl.log(tl.where(found, total, 1.0)), float("-inf"))
    member_ok = member < GROUP
    tl.store(
        part_ptr + (head * SPLITS + split)[:, None] * DIM + dim[None, :],
        out,
        mask=member_ok[:, None] & in_dim,
    )
    tl.store(lse_ptr + head * SPLITS + split, lse, mask=member_ok)


@triton.jit
def attend_join(part_ptr, lse_ptr, out_ptr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS: tl.constexpr):
    """One head of one sequence: its stretches, weighted by how much of the softmax each holds."""
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_PAD)
    lse = tl.load(lse_ptr + head * SPLITS + split)
    weight = tl.exp(lse - tl.max(lse, axis=0))
    part = tl.load(
        part_ptr + (head * SPLITS + split)[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0
    )
    out = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + head * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)
