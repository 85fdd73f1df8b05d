"""Weights laid side by side, so that products that share an input are one product.

The modules that the weights came from keep working: their parameters become views of the packed tensors, with
the same values, and no memory is held twice.
"""

from collections.abc import Sequence

import torch
from torch import nn

from seats_cli.model.kernels import has_triton

ALIGNMENT = 64  # elements; a matrix product whose inner size is no multiple of this runs up to 3 times slower


def why_not_packed(*modules: nn.Module) -> str | None:
    """Why the weights below cannot be packed; None where they can.

    Every linear layer must be an ordinary one with an ordinary weight, where it computes, all on one device
    in one dtype. Quantised weights are other modules, or tensors of other classes in the same modules;
    offloaded ones are brought to their device by hooks while their module runs, which packed ones would miss.
    """
    weights = [parameter for module in modules for parameter in module.parameters()]
    linears = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
    if not linears or any(type(part) is not nn.Linear for part in linears):
        return "the weights are quantised"
    packed = [buffer for module in modules for buffer in module.buffers() if not buffer.is_floating_point()]
    if packed or any(
        type(weight) is not nn.Parameter or not weight.is_floating_point() for weight in weights
    ):
        return "the weights are quantised"
    if any(weight.device.type == "meta" for weight in weights):
        return "weights are offloaded"
    if len({weight.device for weight in weights}) > 1:
        return "the weights are spread over devices"
    if len({linear.weight.dtype for linear in linears}) > 1:
        return "the weights are of several dtypes"
    return None


def said_of_paths(device: torch.device, **reasons: str | None) -> str:
    """In one line, which parts of a network run fast paths on `device`, and why the others do not.

    reasons: part -> why its weights cannot be packed, None where they are
    """
    slow: dict[str, list[str]] = {}
    for part, reason in reasons.items():
        if reason is not None:
            slow.setdefault(reason, []).append(part)
    why = "; ".join(f"{' and '.join(parts)}: {reason}" for reason, parts in slow.items())
    if len(slow) and all(reasons.values()):
        return f"reference paths ({why})"
    how = f"packed products and batched windows, on {device.type}"
    if device.type == "cuda":
        how = "packed products, batched windows, " + (
            "Triton kernels" if has_triton() else "without Triton's kernels, since it is not installed"
        )
    return f"fast paths: {how}" + (f"; reference paths ({why})" if why else "")


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
