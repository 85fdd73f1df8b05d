"""Stage I's greedy choice as one Triton kernel: a program a window, no launch a pick.

`diversity.greedy_max_min` is the reference. Importing this needs Triton.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens", "n_keep"])
def _pick(distance_ptr, keep_ptr, n_tokens, n_keep, BLOCK: tl.constexpr):
    window = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < n_tokens
    base = distance_ptr + window * n_tokens * n_tokens
    least = tl.full([BLOCK], float("inf"), tl.float32)
    second = tl.full([BLOCK], float("inf"), tl.float32)
    for row in range(n_tokens):
        value = tl.load(base + row * n_tokens + col, mask=inside, other=float("inf"))
        second = tl.minimum(second, tl.maximum(least, value))
        least = tl.minimum(least, value)
    pick = tl.argmax(tl.where(inside, second, float("-inf")), axis=0)
    tl.store(keep_ptr + window * n_keep, pick.to(tl.int64))
    to_kept = tl.load(base + pick * n_tokens + col, mask=inside, other=float("-inf"))
    for index in range(1, n_keep):
        to_kept = tl.where(col == pick, float("-inf"), to_kept)
        pick = tl.argmax(to_kept, axis=0)
        tl.store(keep_ptr + window * n_keep + index, pick.to(tl.int64))
        row_values = tl.load(base + pick * n_tokens + col, mask=inside, other=float("-inf"))
        to_kept = tl.minimum(to_kept, row_values)


def greedy_max_min(distances: torch.Tensor, n_keep: int) -> torch.Tensor:
    """The reference's choice for distances (B, N, N) float32 on a CUDA device: (B, n_keep) int64."""
    n_windows, n_tokens, _ = distances.shape
    keep = torch.empty(n_windows, n_keep, dtype=torch.int64, device=distances.device)
    block = max(16, 1 << (n_tokens - 1).bit_length())
    with torch.cuda.device(distances.device):
        _pick[(n_windows,)](distances.contiguous(), keep, n_tokens, n_keep, BLOCK=block, num_warps=4)
    return keep
