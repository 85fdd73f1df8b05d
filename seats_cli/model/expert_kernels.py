"""A mixture's experts: on CUDA Triton kernels, elsewhere the PyTorch that says what they do.

On a prompt these are the steps around two grouped products; on one token of each sequence, products that
read the weights of its own experts and no others.
"""

from typing import Any

import torch

from seats_cli.model import kernels
from seats_cli.model.kernels import launch, matvec_kernel, power, rms_norm, silu_mul


def _experts() -> Any:
    from seats_cli.model import triton_experts

    return triton_experts


def route(logits: torch.Tensor, top: int, renormalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` likeliest experts of each token, and their weights in the sum: logits (S, E), to (S, top) in
    the logits' dtype and (S, top) int64, likeliest first.

    Weights are probabilities over all experts, or `renormalised` over the chosen ones.
    """
    if not kernels.is_fused(logits):
        likely, experts = logits.float().softmax(-1).topk(top, dim=-1)
        if renormalised:
            likely = likely / likely.sum(-1, keepdim=True)
        return likely.to(logits.dtype), experts
    n_rows, n_experts = logits.shape
    shares = logits.new_empty(n_rows, top)
    experts = torch.empty(n_rows, top, dtype=torch.int64, device=logits.device)
    launch(
        _experts().route, (n_rows,),
        logits, shares, experts, n_experts, TOP=top, TOP_PAD=power(top), RENORMALISED=renormalised,
        BLOCK=power(n_experts), num_warps=1,
    )  # fmt: skip
    return shares, experts


def rows_by_expert(
    x: torch.Tensor, experts: torch.Tensor, n_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's row once for each of its experts, those of one expert together: x (S, D), experts (S, top)
    int64, to rows (S * top, D), places (S, top) int64 of each token's among them, and ends (n_experts,) int32
    of each expert's. On CUDA the order within an expert may differ from run to run, and nothing else."""
    (n_rows, top), width = experts.shape, x.shape[1]
    if not kernels.is_fused(x):
        of_expert, order = experts.flatten().sort(stable=True)
        numbers = torch.arange(n_experts, device=x.device)
        ends = torch.searchsorted(of_expert, numbers, right=True).to(torch.int32)
        return x[order // top], order.argsort().view_as(experts), ends
    counts = torch.zeros(n_experts, dtype=torch.int32, device=x.device)
    ranks, places, ends = torch.empty_like(experts), torch.empty_like(experts), torch.empty_like(counts)
    rows = x.new_empty(n_rows * top, width)
    experts_of, block = _experts(), 256
    launch(
        experts_of.rank_in_expert, (-(-experts.numel() // block),),
        experts, counts, ranks, experts.numel(), BLOCK=block, num_warps=4,
    )  # fmt: skip
    launch(
        experts_of.rows_by_expert, (n_rows,),
        x, experts, counts, ranks, places, ends, rows, width, n_experts, TOP=top, EXPERTS=power(n_experts),
        BLOCK=min(power(width), 2048), num_warps=4,
    )  # fmt: skip
    return rows, places, ends


def combine_experts(
    x: torch.Tensor, outputs: torch.Tensor, places: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """x (S, D) + the sum over a token's experts of share * output: outputs (S * top, D) in any order, of
    which row places[s, i] is token s's i-th; shares (S, top)."""
    if not kernels.is_fused(x):
        return x + (outputs[places].float() * shares[..., None].float()).sum(1).to(x.dtype)
    out, width = torch.empty_like(x), x.shape[1]
    block = min(power(width), 2048)
    launch(
        _experts().combine_experts, (len(x), -(-width // block)),
        x, outputs, places, shares, out, width, TOP=shares.shape[1], BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def expert_gate_up(
    x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, norm: tuple[torch.Tensor, float]
) -> torch.Tensor:
    """silu(gate) * up of each of B tokens, x (B, D), in each of its experts (B, top): weight (E, 2 I, D), to
    (B * top, I).

    norm: as in `matvec`. Only these experts' weights are read.
    """
    top, width, inner = experts.shape[1], x.shape[1], weight.shape[1] // 2
    if not kernels.is_fused(x):
        return silu_mul((weight[experts] @ rms_norm(x, *norm)[:, None, :, None])[..., 0].flatten(0, 1))
    out = x.new_empty(len(x) * top, inner)
    rows, block = 16, 512
    launch(
        matvec_kernel(), (-(-inner // rows), len(out)),
        x, norm[0], weight, None, None, experts, out, inner, width, norm[1], HAS_NORM=True, HAS_BIAS=False,
        HAS_RESIDUAL=False, TOP=top, GATED=True, ROWS=rows, BLOCK=block, WHOLE=power(width),
        num_warps=4,
    )  # fmt: skip
    return out


def expert_down(
    inner: torch.Tensor,
    weight: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """residual (B, D) + the sum over each token's experts (B, top) of share * weight @ inner: weight
    (E, D, I), inner (B * top, I), shares (B, top). Only these experts' weights are read."""
    if not kernels.is_fused(inner):
        outputs = (weight[experts] @ inner.view(*experts.shape, -1, 1))[..., 0]
        return residual + (outputs.float() * shares[..., None].float()).sum(1).to(residual.dtype)
    out, n_out = torch.empty_like(residual), weight.shape[1]
    rows = 4
    launch(
        _experts().expert_down, (-(-n_out // rows), len(residual)),
        inner, weight, experts, shares, residual, out, n_out, inner.shape[1], TOP=experts.shape[1], ROWS=rows,
        BLOCK=min(256, power(inner.shape[1])), num_warps=4,
    )  # fmt: skip
    return out
