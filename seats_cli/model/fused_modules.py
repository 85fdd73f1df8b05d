"""Weights laid side by side, so that products that share an input are one product.

The modules that the weights came from keep working: their parameters become views of the packed tensors, with
the same values, and no memory is held twice.
"""

from collections.abc import Sequence

import torch
from torch import nn

ALIGNMENT = 64  # elements; a matrix product whose inner size is no multiple of this runs up to 3 times slower


def can_pack(*modules: nn.Module) -> bool:
    """Whether every linear layer below is an ordinary one (not quantised, not offloaded) on one device."""
    linears = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
    plain = all(type(part) is nn.Linear and not hasattr(part, "_hf_hook") for part in linears)
    return plain and len({(part.weight.device, part.weight.dtype) for part in linears}) == 1


def pack_rows(linears: Sequence[nn.Linear], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (sum of rows + pads, D) one below the other, and biases likewise; None if none has one.

    Each part is followed by `pad` rows of zeros. A part without a bias counts as one of zeros.
    """
    first = linears[0].weight
    sizes = [linear.weight.shape[0] for linear in linears]
    total = sum(sizes) + pad * len(linears)
    weight = first.new_zeros(total, first.shape[1])
    bias = first.new_zeros(total) if any(linear.bias is not None for linear in linears) else None
    start = 0
    for linear, size in zip(linears, sizes, strict=True):
        part = weight[start : start + size]
        part.copy_(linear.weight)
        linear.weight = nn.Parameter(part, requires_grad=False)
        if linear.bias is not None and bias is not None:
            bias[start : start + size] = linear.bias
            linear.bias = nn.Parameter(bias[start : start + size], requires_grad=False)
        start += size + pad
    return weight, bias


def pad_columns(linear: nn.Linear, pad: int) -> torch.Tensor:
    """The weight (N, D + pad) with columns of zeros behind it."""
    if not pad:
        return linear.weight
    weight = linear.weight.new_zeros(linear.weight.shape[0], linear.weight.shape[1] + pad)
    weight[:, : linear.weight.shape[1]] = linear.weight
    linear.weight = nn.Parameter(weight[:, : linear.weight.shape[1]], requires_grad=False)
    return weight
