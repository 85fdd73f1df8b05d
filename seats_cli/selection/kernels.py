"""The two steps of the method that are long chains of tiny ones, as a Triton kernel each.

Stage I's greedy choice: `diversity.greedy_max_min` is the reference. Stage II's budgets:
`budget.exact_budgets` is. Importing this needs Triton.
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


@triton.jit(do_not_specialize=["n_windows", "total_video", "total_audio"])
def _divide(
    share_ptr, count_ptr, out_ptr, n_windows, total_video, total_audio,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a kind. share, count: (T, 2) contiguous, video then audio; out likewise."""
    kind = tl.program_id(0)
    window = tl.arange(0, BLOCK)
    inside = window < n_windows
    share = tl.load(share_ptr + 2 * window + kind, mask=inside, other=0.0)
    most = tl.load(count_ptr + 2 * window + kind, mask=inside, other=0)
    others = tl.load(count_ptr + 2 * window + 1 - kind, mask=inside, other=0)
    own_total = tl.where(kind == 0, total_video, total_audio).to(tl.int64)
    other_total = tl.where(kind == 0, total_audio, total_video).to(tl.int64)
    # where one kind cannot pay for a token a window, the other lends it what it has above its own
    floors = (most > 0).to(tl.int64)
    n_floors = tl.sum(floors, axis=0)
    short = n_floors - own_total
    other_short = tl.sum((others > 0).to(tl.int64), axis=0) - other_total
    zero = short - short
    total = own_total + tl.maximum(tl.minimum(short, -other_short), zero)
    total -= tl.maximum(tl.minimum(other_short, -short), zero)

    if n_floors > total:  # the largest shares get the tokens that there are
        before = floors - floors
        for start in range(0, n_windows, TILE):
            at = start + tl.arange(0, TILE)
            rival = tl.load(share_ptr + 2 * at + kind, mask=at < n_windows, other=0.0)[:, None]
            counts = tl.load(count_ptr + 2 * at + kind, mask=at < n_windows, other=0)[:, None] > 0
            first = (rival > share[None]) | ((rival == share[None]) & (at[:, None] < window[None]))
            before += tl.sum((first & counts).to(tl.int64), axis=0)
        budget = tl.where(before < total, floors, 0)
    else:
        budget = _share_out(share, most, floors, total, share_ptr, count_ptr, kind, n_windows, BLOCK, TILE)
    tl.store(out_ptr + 2 * window + kind, budget, mask=inside)


@triton.jit
def _share_out(
    share, most, floors, total, share_ptr, count_ptr, kind, n_windows, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """`scale_to_total` rounded, and `meet_total`, for floors that `total` can pay for."""
    inside = tl.arange(0, BLOCK) < n_windows
    least, roof = floors.to(tl.float64), most.to(tl.float64)
    weight = tl.where(most > 0, tl.maximum(share.to(tl.float64), 1e-9), 0.0)
    wanted = total.to(tl.float64)
    # The sum of clamp(c weight, least, most) bends where c meets a bound of one window. Summed at each bend:
    # the last one that does not exceed the total, and the slope behind it, give c.
    corner = tl.min(weight, axis=0) * 0.0 - 1.0
    reached = corner
    for start in range(0, n_windows, TILE):
        at = start + tl.arange(0, TILE)
        bound = tl.load(count_ptr + 2 * at + kind, mask=at < n_windows, other=0)
        slant = tl.load(share_ptr + 2 * at + kind, mask=at < n_windows, other=0.0).to(tl.float64)
        slant = tl.maximum(slant, 1e-9)
        for side in range(2):
            bend = tl.where(side == 0, 1.0, bound.to(tl.float64)) / slant
            sums = tl.sum(
                tl.minimum(tl.maximum(bend[:, None] * weight[None], least[None]), roof[None]), axis=1
            )
            below = (bound > 0) & (sums <= wanted)
            corner = tl.maximum(corner, tl.max(tl.where(below, bend, -1.0), axis=0))
            reached = tl.maximum(reached, tl.max(tl.where(below, sums, -1.0), axis=0))
    slant = tl.where(most > 0, weight, 1.0)  # compared as quotients, which are the bends to the bit
    rising = (least / slant <= corner) & (corner < roof / slant)
    slope = tl.sum(tl.where(rising, weight, 0.0), axis=0)
    slope = tl.maximum(slope, tl.min(tl.where(most > 0, weight, float("inf")), axis=0))
    scale = corner + tl.maximum((wanted - reached) / slope, 0.0)
    scaled = tl.minimum(tl.maximum(scale * weight, least), roof)
    values = ((scaled + 4503599627370496.0) - 4503599627370496.0).to(tl.int64)  # 2^52: rounds half to even

    # one each to the smallest below their most, or from the largest above their least (negated)
    missing = total - tl.sum(values, axis=0)
    sign = tl.where(missing < 0, -1, 1).to(tl.int64)
    values = sign * values
    top = tl.maximum(values, tl.where(missing < 0, -floors, most))
    amount = sign * missing
    low = tl.min(tl.where(inside, values, 1 << 62), axis=0)
    high = tl.max(tl.where(inside, top, -(1 << 62)), axis=0)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum(tl.maximum(values, tl.minimum(top, middle)) - values, axis=0) <= amount
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    raised = tl.maximum(values, tl.minimum(top, low))
    left = amount - tl.sum(raised - values, axis=0)
    can_rise = ((values <= low) & (top > low) & inside).to(tl.int64)
    return sign * (raised + tl.where(tl.cumsum(can_rise, axis=0) <= left, can_rise, 0))


def divide(shares: torch.Tensor, counts: torch.Tensor, total_video: int, total_audio: int) -> torch.Tensor:
    """The reference's budgets: shares (T, 2) float32, counts (T, 2) int64, on CUDA, to (T, 2) int64."""
    n_windows = len(shares)
    budgets = torch.empty_like(counts)
    block = max(16, 1 << (n_windows - 1).bit_length())
    with torch.cuda.device(shares.device):
        _divide[(2,)](
            shares, counts, budgets, n_windows, total_video, total_audio,
            BLOCK=block, TILE=16, num_warps=4 if block > 64 else 2,
        )  # fmt: skip
    return budgets
