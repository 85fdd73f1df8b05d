"""Stage II, from relevance to tokens: a budget for every window, its split by kind, the best tokens within
it.

All tensors stay on their device and no loop runs over windows or tokens. Two ways to budget: as published,
where the floors may overshoot the total, and exact, where nothing may. Source: docs/method.md, "Stage II".
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from seats_cli.selection.diversity import has_triton
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import keep_total
from seats_cli.selection.relevance import WindowShares, WindowTokens, sort_into_windows, window_shares

MOST_WINDOWS_FUSED = 2048  # an hour of two-second windows; one program of the kernel holds them all


@dataclass(frozen=True)
class Budgets:
    """Tokens that each window may keep of each kind, (T,) int64 each."""

    video: torch.Tensor
    audio: torch.Tensor


def choose_in_layer(
    scores: torch.Tensor,
    layout: TokenLayout,
    keep_video: float,
    keep_audio: float,
    n_windows: int,
    options: SelectionOptions,
) -> torch.Tensor:
    """Stage II at one drop: (S,) bool, True for what stays; all text stays.

    scores: (S,) float32, attention received from the last text token. keep_video, keep_audio: fractions of
    the layout's tokens of that kind; a kind of which 0 is kept goes whole and counts as absent. n_windows:
    more than any window id of the layout. Ties go to the lowest index.
    """
    total_video = keep_total(keep_video, layout.n_video)
    total_audio = keep_total(keep_audio, layout.n_audio)
    if not divides_by_window(total_video, total_audio, n_windows):
        group = layout.kind.to(torch.int64)
        # filled on the device: a list would be copied from the host, and waited for
        quota = torch.cat([group.new_full((1,), n) for n in (len(layout), total_video, total_audio)])
        return keep_best(scores, group, quota)
    tokens = sort_into_windows(layout, n_windows)
    shares = window_shares(scores, tokens, options)
    if options.budgets == "published":
        budgets = published_budgets(shares, tokens, total_video, total_audio)
    elif scores.is_cuda and has_triton() and n_windows <= MOST_WINDOWS_FUSED:
        budgets = fused_budgets(shares, tokens, total_video, total_audio)
    else:
        budgets = exact_budgets(shares, tokens, total_video, total_audio)
    quota = torch.stack((budgets.video, budgets.audio), dim=1).view(-1)
    everything = torch.full_like(quota[:1], len(layout))
    return keep_best(scores, tokens.group, torch.cat((quota, everything)))


def divides_by_window(total_video: int, total_audio: int, n_windows: int) -> bool:
    """Whether windows get budgets, when so many of each kind are to stay; else the choice is the top ones of
    each kind, no more, no less."""
    return bool(total_video and total_audio) and n_windows > 1


def counts_are_known(total_video: int, total_audio: int, n_windows: int, options: SelectionOptions) -> bool:
    """Whether exactly these totals stay, so that nobody has to ask the device how many did.

    Published floors may overshoot them; exact budgets only shift some from one kind to the other, and only
    where a kind cannot pay for a token a window.
    """
    if not divides_by_window(total_video, total_audio, n_windows):
        return True
    return options.budgets == "exact" and min(total_video, total_audio) >= n_windows


def keep_best(scores: torch.Tensor, group: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """(S,) bool, True for the `quota[g]` highest-scored tokens of each group g; ties: the lowest index.

    scores: (S,) float32; group: (S,) int64; quota: (G,) int64.
    """
    # One sort by both: float bits order like integers once those of negative numbers are turned over, and
    # adding 0 makes the two zeros one.
    bits = (scores + 0.0).view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = ((group << 32) - rising).argsort(stable=True)
    sizes = torch.zeros_like(quota).scatter_add_(0, group, torch.ones_like(group))
    start = sizes.cumsum(0) - sizes
    ordered = group[order]
    rank = torch.arange(len(order), device=order.device) - start[ordered]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, rank < quota[ordered])


def published_budgets(
    shares: WindowShares, tokens: WindowTokens, total_video: int, total_audio: int
) -> Budgets:
    """The paper's budgets: at least one token of each kind that a window has, even past the total."""
    size = tokens.size
    total = total_video + total_audio
    wanted = ((shares.video + shares.audio) / 2 * total).round().to(torch.int64)
    budget = torch.minimum(wanted.clamp(min=1), size)
    budget = meet_total(budget, torch.ones_like(size), size, total)
    wish_video, wish_audio = shares.video * total_video, shares.audio * total_audio
    part = wish_video / (wish_video + wish_audio + 1e-12)  # f_t, the part that is video's
    video = torch.minimum((budget * part).round().to(torch.int64), tokens.n_video)
    audio = torch.minimum(budget - video, tokens.n_audio)
    video = video + torch.minimum(budget - video - audio, tokens.n_video - video)
    audio = audio + torch.minimum(budget - video - audio, tokens.n_audio - audio)
    video, audio = _floor_published(video, audio, tokens.n_video, tokens.n_audio, budget)
    audio, video = _floor_published(audio, video, tokens.n_audio, tokens.n_video, budget)
    return Budgets(video, audio)


def exact_budgets(
    shares: WindowShares,
    tokens: WindowTokens,
    total_video: int | torch.Tensor,
    total_audio: int | torch.Tensor,
) -> Budgets:
    """Budgets in which each kind meets its own total and never exceeds a window's tokens of that kind.

    A kind present in a window keeps a token there while its total allows, else its least relevant windows
    lose theirs. Only where one kind cannot pay for these floors, the other lends it what it has above its
    own; the sum is total_video + total_audio all the same.
    """
    short_video = (tokens.n_video > 0).sum() - total_video  # () int64 each: tokens missing for the floors
    short_audio = (tokens.n_audio > 0).sum() - total_audio
    lent_to_video = torch.minimum(short_video, -short_audio).clamp(min=0)
    lent_to_audio = torch.minimum(short_audio, -short_video).clamp(min=0)
    lent = lent_to_video - lent_to_audio
    video, audio = divide_exactly(  # both at once: on a GPU the number of steps is what costs
        torch.stack((shares.video, shares.audio)),
        torch.stack((tokens.n_video, tokens.n_audio)),
        torch.stack((total_video + lent, total_audio - lent))[:, None],
    )
    return Budgets(video, audio)


def fused_budgets(shares: WindowShares, tokens: WindowTokens, total_video: int, total_audio: int) -> Budgets:
    """`exact_budgets` on CUDA in one launch: a hundred and fifty steps on a few numbers cost their launches,
    not their work. Where a share falls on half a token to the last bit, it may be rounded the other way."""
    from seats_cli.selection.kernels import divide

    share, counts = (
        torch.stack(pair, dim=1) for pair in ((shares.video, shares.audio), (tokens.n_video, tokens.n_audio))
    )
    budgets = divide(share, counts, total_video, total_audio)
    return Budgets(budgets[:, 0], budgets[:, 1])


def divide_exactly(share: torch.Tensor, size: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Each row's `total` tokens divided between windows by their shares: (..., T) int64 that sum to it.

    share: (..., T) float >= 0; size: (..., T) int64, a kind's tokens in each window; total: int64 of 0 to
    sum(size), () for one row or (..., 1). Windows that have tokens get one at least, the largest shares first
    where `total` is too small for that.
    """
    least = _affordable(share, (size > 0).long(), total)
    scaled = scale_to_total(share, least, size, total)
    return meet_total(scaled.round().to(torch.int64), least, size, total)


def meet_total(
    values: torch.Tensor, least: torch.Tensor, most: torch.Tensor, total: int | torch.Tensor
) -> torch.Tensor:
    """Take 1 from the largest while the sum is above `total`, give 1 to the smallest while it is below.

    values, least, most: (..., T) int64, least <= most where a value may change; a value at its bound is left
    alone, and ties go to the lowest index. Solved at once by levels, not step by step.
    """
    missing = total - values.sum(dim=-1, keepdim=True)
    sign = torch.where(missing < 0, -1, 1)
    # taking from the largest is giving to the smallest of the negated values
    return sign * raise_smallest(sign * values, torch.where(missing < 0, -least, most), missing.abs())


def raise_smallest(values: torch.Tensor, most: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Give 1 to the smallest value below its `most` (ties: lowest index), `amount` times while there is one.

    values, most: (..., T) int64; amount: (..., 1) int64 >= 0. As water that fills vessels: everything below
    some level rises to it, and the few units left over go to the first ones on that level.
    """
    roof = torch.maximum(values, most)
    corners, order = torch.cat((values, roof), dim=-1).sort(stable=True)
    rises = torch.where(order < values.shape[-1], 1, -1)
    rising = rises.cumsum(-1)  # how many values rise just above each corner
    steps = rising[..., :-1] * corners.diff()
    poured = functional.pad(steps.cumsum(-1), (1, 0))  # to lift the lowest to each corner
    corner = (poured <= amount).sum(dim=-1, keepdim=True) - 1
    free = rising.gather(-1, corner)
    beyond = (amount - poured.gather(-1, corner)).div(free.clamp(min=1), rounding_mode="floor")
    level = corners.gather(-1, corner) + torch.where(free > 0, beyond, 0)
    raised = torch.maximum(values, torch.minimum(roof, level))
    left = amount - (raised - values).sum(dim=-1, keepdim=True)
    can_rise = (values <= level) & (roof > level)
    return raised + (can_rise & (can_rise.cumsum(-1) <= left)).long()


def scale_to_total(
    share: torch.Tensor, least: torch.Tensor, most: torch.Tensor, total: int | torch.Tensor
) -> torch.Tensor:
    """clamp(c share, least, most) with the one c for which it sums to `total`, as nearly as floats go.

    share: (..., T) float, 0 to 1; least, most: (..., T) int64 with sum(least) <= total <= sum(most). Returns
    (..., T) float.
    """
    wide = torch.float32 if share.device.type == "mps" else torch.float64
    # a window of no relevance is filled last, but is filled; one without tokens has no say at all
    weight = share.to(wide).clamp(min=1e-9)
    low, high = least / weight, most.to(wide) / weight
    empty, top = most == 0, high.amax(dim=-1, keepdim=True)
    low, high = torch.where(empty, top, low), torch.where(empty, top, high)
    weight = torch.where(empty, 0.0, weight)
    corners, order = torch.cat((low, high), dim=-1).sort(stable=True)
    slope = torch.cat((weight, -weight), dim=-1).gather(-1, order).cumsum(-1)
    poured = functional.pad((slope[..., :-1] * corners.diff()).cumsum(-1), (1, 0))
    sums = least.sum(dim=-1, keepdim=True) + poured
    at = (sums <= total).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    least_slope = torch.where(empty, float("inf"), weight).amin(dim=-1, keepdim=True)
    beyond = (total - sums.gather(-1, at)) / torch.maximum(slope.gather(-1, at), least_slope)
    scale = corners.gather(-1, at) + beyond.clamp(min=0)
    return torch.minimum(torch.maximum(scale * weight, least.to(wide)), most.to(wide))


def _floor_published(
    kept: torch.Tensor,
    other: torch.Tensor,
    size: torch.Tensor,
    other_size: torch.Tensor,
    budget: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A non-empty kind with nothing gets 1; the other, where it had more than 1, makes room down to 1."""
    starved = (size > 0) & (kept == 0)
    kept = torch.where(starved, 1, kept)
    room = torch.minimum(other_size, budget - kept).clamp(min=1)
    return kept, torch.where(starved & (other > 1), room, other)


def _affordable(share: torch.Tensor, floors: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The floors that `total` can pay for, the windows of the largest share first."""
    order = share.argsort(dim=-1, descending=True, stable=True)
    ordered = floors.gather(-1, order)
    paid_before = ordered.cumsum(-1) - ordered
    granted = torch.minimum((total - paid_before).clamp(min=0), ordered)
    return torch.zeros_like(floors).scatter_(-1, order, granted)
