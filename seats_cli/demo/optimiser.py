"""Muon for the weight matrices, AdamW for everything else.

Muon (Keller Jordan, 2024): the momentum of a matrix is replaced by its nearest semi-orthogonal matrix,
found by five Newton-Schulz steps, batched here over all matrices of one shape.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """(n, r, c) matrices -> (n, r, c) bfloat16, singular values near 1 (Muon's quintic coefficients)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters; all of one shape are updated in one batch. `lr` in units of update norm."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients; returns the loss of `closure` where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = group["params"]
            grads = torch.stack([p.grad for p in params if p.grad is not None])
            if len(grads) != len(params):
                raise RuntimeError("every matrix needs a gradient")
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            momentum: Tensor = state["momentum"]
            momentum.lerp_(grads, 1 - group["momentum"])
            update = newton_schulz(grads.lerp(momentum, group["momentum"]))
            rows, columns = params[0].shape
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list((update.to(params[0].dtype) * -scale).unbind(0)))
        return loss
