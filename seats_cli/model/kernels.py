"""Fused steps of the networks: on CUDA one Triton kernel each, elsewhere the PyTorch that says what they do.

The encoders and the prefill are arithmetic between large matrix products; unfused, it reads and writes every
activation several times over. A decoded token is bound by reading the weights once, so there each product
carries the norm before it and the sum behind it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from seats_cli.selection.diversity import has_triton

SALIENCY_BLOCK = 64
DECODE_SPLITS = (
    16  # stretches of the cache that a decoded token attends to at once, for each key head of one sequence
)
DECODE_BLOCK = 64
SHORT_ATTENTION = 4096  # tokens up to which the attention kernel that starts fastest is the fastest


@dataclass(frozen=True)
class HeadNorms:
    """Root-mean-square norms of every query head and every key head, (head_dim,) each, before rotation."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


def is_fused(x: torch.Tensor) -> bool:
    """Whether a tensor's device runs the Triton kernels."""
    return x.is_cuda and has_triton()


def power(n: int, least: int = 1) -> int:
    """The smallest power of two from n up, and from `least` up: the sizes of Triton's blocks."""
    return max(least, 1 << (n - 1).bit_length())


def _kernels() -> Any:
    from seats_cli.model import triton_kernels

    return triton_kernels


def matvec_kernel() -> Any:
    """The Triton kernel behind `matvec`, which also multiplies by weights that the device chooses."""
    return _kernels().matvec


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run a Triton kernel on its first tensor's device; `constants` in the order of its parameters.

    Triton looks every argument over at each launch, which takes longer than most of these kernels run. What
    it compiles depends on the traits of the arguments alone, so with the same traits it is not asked again.
    """
    device = args[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, num_warps=num_warps, **constants)
    key = (kernel, device.index, num_warps, *constants.values(), *map(_trait, args))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, num_warps=num_warps, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *constants.values())
    return None


def _trait(arg: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    return arg if arg is None else type(arg)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: query (B, H, S, d), key and value (B, K, S, d), to (B, H, S, d).

    On CUDA, short sequences run PyTorch's flash kernel. cuDNN's, which PyTorch prefers on Hopper, builds a
    plan for each length that it has not met: 37 ms on an H200, more than a whole pruned prefill, and pruned
    prompts have a new length after every cut. Asked for by name, since the switch that PyTorch has for this
    is the process's, and clips are encoded by one thread while another decodes.
    """
    if _runs_flash(query):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        seen: torch.Tensor = flash(query, key, value, 0.0, causal)[0]
        return seen
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def _runs_flash(query: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] <= SHORT_ATTENTION
        and query.shape[3] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def finished(device: torch.device) -> None:
    """Wait for what this thread has asked of the device: before its result is kept where other threads, which
    launch on other streams, will find it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def quick_attention(device: torch.device, n_tokens: int = 0) -> AbstractContextManager[Any]:
    """Inside the block, all attention of the process on CUDA uses kernels that need no plan made for a new
    length: what `attention` does for the fast paths, for transformers' own modules. Nothing changes where
    `n_tokens` says that sequences are longer than `SHORT_ATTENTION`.

    PyTorch's switch is the process's, and kernels round differently: where several threads run such modules,
    one block around all of them keeps what a clip becomes from depending on what another thread does.
    """
    if device.type != "cuda" or n_tokens > SHORT_ATTENTION:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# ---- rows of many tokens -------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """Root-mean-square norm of x (S, D) + offset (D,) float32, rounded to x's dtype before `weight` (D,).

    The order of rounding is that of transformers' Qwen2_5OmniRMSNorm. The reference takes any leading shape.
    """
    if not is_fused(x):
        wide = x.float() if offset is None else x.float() + offset
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)
    out = torch.empty_like(x)
    width = x.shape[1]
    launch(
        _kernels().rms_norm, (x.shape[0],),
        x, weight, offset, out, width, eps, HAS_OFFSET=offset is not None, BLOCK=power(width),
        num_warps=8 if width > 2048 else 4,
    )  # fmt: skip
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, offset: torch.Tensor
) -> torch.Tensor:
    """Layer norm of x (S, D) + offset (D,) float32, in x's dtype."""
    if not is_fused(x):
        wide = functional.layer_norm(x.float() + offset, weight.shape, weight.float(), bias.float(), eps)
        return wide.to(x.dtype)
    out = torch.empty_like(x)
    width = x.shape[1]
    launch(_kernels().layer_norm, (len(x),), x, weight, bias, offset, out, width, eps, BLOCK=power(width))
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the columns times the second: (S, 2 I) to (S, I)."""
    width = gate_up.shape[1] // 2
    if not is_fused(gate_up):
        return functional.silu(gate_up[:, :width]) * gate_up[:, width:]
    out = gate_up.new_empty(gate_up.shape[0], width)
    block = min(power(width), 2048)
    launch(
        _kernels().silu_mul, (out.shape[0], -(-width // block)), gate_up, out, width, BLOCK=block, num_warps=4
    )
    return out


def rotate_pairs(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_heads: int, head_dim: int
) -> torch.Tensor:
    """Rotary embedding of queries and keys in place: qkv (S, 3 H d), q then k then v; returns it.

    cos, sin: (P, d) float32, both halves alike, for rows 0..P-1, P..2P-1 and so on.
    """
    if is_fused(qkv):
        _rotate(qkv, cos, sin, None, n_heads, n_heads, head_dim)
        return qkv
    n_rows, period = len(qkv), len(cos)
    pairs = qkv[:, : 2 * n_heads * head_dim].view(n_rows // period, period, 2 * n_heads, head_dim)
    wide = pairs.float()
    low, high = wide.chunk(2, dim=-1)
    turned = wide * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
    pairs.copy_(turned)
    return qkv


def rotate_and_split(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    norms: HeadNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries (H, S, d), rotated keys and values (K, S, d) of qkv (S, (H + 2 K) d).

    cos, sin: (S, d), both halves alike. `norms` come before the rotation. The queries are a view of `qkv`,
    which they overwrite; keys and values are new, so that a cache of them does not keep the queries alive.
    """
    n_rows = len(qkv)
    if is_fused(qkv):
        kv = qkv.new_empty(2 * n_kv_heads, n_rows, head_dim)
        _rotate(qkv, cos, sin, kv, n_heads, n_kv_heads, head_dim, norms)
    else:
        heads = qkv.view(n_rows, n_heads + 2 * n_kv_heads, head_dim)
        turned = heads[:, : n_heads + n_kv_heads]
        if norms is not None:
            query, key = turned[:, :n_heads], turned[:, n_heads:]
            turned = torch.cat(
                (rms_norm(query, norms.query, norms.eps), rms_norm(key, norms.key, norms.eps)), dim=1
            )
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
        heads[:, :n_heads] = turned[:, :n_heads]
        kv = torch.cat((turned[:, n_heads:], heads[:, n_heads + n_kv_heads :]), dim=1).transpose(0, 1)
        kv = kv.contiguous()
    query = qkv.view(n_rows, -1, head_dim)[:, :n_heads].transpose(0, 1)
    return query, kv[:n_kv_heads], kv[n_kv_heads:]


def _rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor | None,
    n_query: int,
    n_key: int,
    head_dim: int,
    norms: HeadNorms | None = None,
) -> None:
    n_heads = n_query + 2 * n_key
    heads = min(power(n_heads), 16)
    launch(
        _kernels().rotate, (len(qkv), -(-n_heads // heads)),
        qkv, cos, sin, kv, norms and norms.query, norms and norms.key, len(qkv), len(cos), qkv.stride(0),
        norms.eps if norms else 0.0, N_QUERY=n_query, N_KEY=n_key, N_HEADS=n_heads, DIM=head_dim,
        SPLIT=kv is not None, HAS_NORM=norms is not None, HEADS=heads, HALF=power(head_dim // 2),
        num_warps=4,
    )  # fmt: skip


def attention_received(qkv: torch.Tensor, n_heads: int, head_dim: int, window: int) -> torch.Tensor:
    """Attention that each of S keys receives from its window: qkv (S, 3 H d) rotated, to (S,) float32.

    Full softmax within consecutive windows of `window` rows (the last may be shorter), mean over heads, sum
    over queries (docs/method.md, "Stage I", step 1). Never more than one block of scores exists; CUDA only:
    elsewhere `saliency.attention_received` is the same in chunks.
    """
    n_rows, width = len(qkv), n_heads * head_dim
    lse = torch.empty(n_heads, n_rows, dtype=torch.float32, device=qkv.device)
    received = torch.empty(n_rows, dtype=torch.float32, device=qkv.device)
    n_windows, n_blocks = -(-n_rows // window), -(-min(window, n_rows) // SALIENCY_BLOCK)
    kernels, scale = _kernels(), head_dim**-0.5
    sizes = {
        "N_HEADS": n_heads, "DIM": head_dim, "DIM_PAD": power(head_dim, 16), "BLOCK": SALIENCY_BLOCK,
        "num_warps": 4,
    }  # fmt: skip
    rest = (n_rows, window, qkv.stride(0), scale)
    launch(kernels.attention_lse, (n_blocks, n_heads, n_windows), qkv, qkv[:, width:], lse, *rest, **sizes)
    launch(
        kernels.attention_received, (n_blocks, n_windows), qkv, qkv[:, width:], lse, received, *rest, **sizes
    )
    return received


# ---- one token a sequence ------------------------------------------------------------------------


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """weight @ rms_norm(x) + bias + residual for each of B tokens: x (B, D), weight (N, D), to (B, N).

    norm: weight and epsilon of the norm before the product, or None. gated: the first half of the rows is a
    gate and the second what it lets through, (B, N / 2): silu(gate) * up. dtype: of the result, x's unless
    given. One token is bound by reading the weights, which the kernel does faster than a library's product;
    several share that reading, and the library's is as good.
    """
    dtype = dtype or x.dtype
    if len(x) > 1 or not is_fused(x):
        normed = x if norm is None else rms_norm(x, *norm)
        if normed.is_cuda and dtype == torch.float32 != x.dtype and bias is None and not gated:
            out = torch.mm(normed, weight.t(), out_dtype=dtype)  # not rounded on the way
        else:
            out = functional.linear(normed, weight, bias)
        out = silu_mul(out) if gated else out
        return (out if residual is None else residual + out).to(dtype)
    width = x.shape[1]
    n_out = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(1, n_out, dtype=dtype, device=x.device)
    rows, block = (16, 512) if gated else (2, 4096) if width > 8192 else (4, 512)
    launch(
        _kernels().matvec, (-(-n_out // rows),),
        x, norm[0] if norm else None, weight, bias, residual, None, out, n_out, width,
        norm[1] if norm else 0.0, HAS_NORM=norm is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, TOP=0, GATED=gated, ROWS=rows, BLOCK=block,
        WHOLE=power(width), num_warps=4,
    )  # fmt: skip
    return out


def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    n_heads: int,
    *,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Attention of one new token of each of B sequences, whose lengths only the device knows: (B, H d).

    qkv: (B, (H + 2 K) d), overwritten; cos, sin: (B, d); keys, values: (B, K, capacity, d), which get the new
    tokens' at `length` (B,) int32. `length` itself is left as it is.
    """
    batch, n_kv_heads, capacity, head_dim = keys.shape
    group = n_heads // n_kv_heads
    if not is_fused(qkv):
        query, key, value = rotate_and_split(qkv, cos, sin, n_heads, n_kv_heads, head_dim, norms=norms)
        rows = torch.arange(batch, device=qkv.device)
        keys[rows, :, length.long()] = key.transpose(0, 1)
        values[rows, :, length.long()] = value.transpose(0, 1)
        seen = torch.arange(capacity, device=qkv.device) <= length[:, None]
        out = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )
        return out.reshape(batch, n_heads * head_dim)
    kernels, pad = _kernels(), power(head_dim, 16)
    launch(
        kernels.append_token, (n_heads + 2 * n_kv_heads, batch),
        qkv, cos, sin, norms and norms.query, norms and norms.key, keys, values, length, capacity,
        norms.eps if norms else 0.0, N_QUERY=n_heads, N_KEY=n_kv_heads, DIM=head_dim,
        HAS_NORM=norms is not None, HALF=power(head_dim // 2), num_warps=1,
    )  # fmt: skip
    splits = DECODE_SPLITS if batch < 4 else DECODE_SPLITS // 4  # several sequences fill the device sooner
    part = torch.empty(batch, n_heads, splits, head_dim, dtype=torch.float32, device=qkv.device)
    lse = torch.empty(batch, n_heads, splits, dtype=torch.float32, device=qkv.device)
    launch(
        kernels.attend_part, (n_kv_heads, splits, batch),
        qkv, keys, values, length, part, lse, capacity, head_dim**-0.5, N_QUERY=n_heads, N_KEY=n_kv_heads,
        GROUP_PAD=power(group, 16), DIM=head_dim, DIM_PAD=pad, SPLITS=splits, BLOCK=DECODE_BLOCK,
        num_warps=4,
    )  # fmt: skip
    out = torch.empty(batch, n_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(kernels.attend_join, (batch * n_heads,), part, lse, out, DIM=head_dim, DIM_PAD=pad, SPLITS=splits)
    return out
