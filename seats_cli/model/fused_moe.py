"""Qwen3-Omni's mixture of experts on a prompt and on one token; equal to transformers' by test.

On a prompt the tokens are sorted by expert, so that all experts are two grouped products. On one token a
sequence only the weights of the experts that it is routed to are read. Nothing waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from seats_cli.model.expert_kernels import (
    combine_experts,
    expert_down,
    expert_gate_up,
    route,
    rows_by_expert,
)
from seats_cli.model.kernels import matvec, silu_mul


@dataclass(frozen=True)
class ExpertMlp:
    """One layer's router and experts.

    router:  (E, D)
    gate_up: (E, 2 I, D), gate rows first
    down:    (E, D, I)
    top:     experts that a token runs through
    renormalised: whether their weights are made to sum to 1
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top: int
    renormalised: bool

    def added(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """x + experts(normed), both (S, D)."""
        shares, experts = route(functional.linear(normed, self.router), self.top, self.renormalised)
        rows, places, ends = rows_by_expert(normed, experts, len(self.router))
        inner = silu_mul(functional.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends))
        outputs = functional.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        return combine_experts(x, outputs, places, shares)

    def added_to_token(self, x: torch.Tensor, norm: tuple[torch.Tensor, float]) -> torch.Tensor:
        """x + experts(rms_norm(x)) for one token of each of B sequences, (B, D)."""
        shares, experts = route(matvec(x, self.router, norm=norm), self.top, self.renormalised)
        inner = expert_gate_up(x, self.gate_up, experts, norm)
        return expert_down(inner, self.down, experts, shares, x)


def is_mixture(mlp: Any) -> bool:
    """Whether a decoder layer's MLP is transformers' block of experts."""
    return hasattr(mlp, "experts")


def take_experts(mlp: Any) -> ExpertMlp:
    """The weights of a block of experts as they are; nothing is copied."""
    return ExpertMlp(
        mlp.gate.weight,
        mlp.experts.gate_up_proj,
        mlp.experts.down_proj,
        mlp.gate.top_k,
        mlp.gate.norm_topk_prob,
    )
