"""What a run really multiplied, counted by PyTorch while it runs: the check on measure/compute.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Counted:
    """`flops`: 1 multiply-add = 1 FLOP, as this package counts; 0 until the block has ended."""

    flops: int = 0


@contextmanager
def counting() -> Iterator[Counted]:
    """Count the matrix products, convolutions and attention of the block; slow, so time nothing inside.

    PyTorch counts a multiply-add as two; attention is counted whole, causal or not, as
    `measure.compute.layer_flops` does. Norms, softmax and other elementwise work count as nothing in both.
    """
    found = Counted()
    uncounted: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
        torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
        torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
        torch.ops.aten.addmm_: _product_flops,
        torch.ops.aten._grouped_mm: _grouped_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        yield found
    found.flops = counter.get_total_flops() // 2


def _product_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """A product added in place, which PyTorch counts only where it makes a new tensor."""
    return 2 * left[0] * left[1] * right[1]


def _grouped_flops(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Rows (S, K) of several groups, each by its own of weights (groups, K, N)."""
    return 2 * rows[0] * weights[1] * weights[2]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Attention from shapes (batch, heads, S, width). PyTorch has no count for the CPU's kernel, and on CUDA
    none for keys with fewer heads than queries."""
    batch, heads, n_queries, width = query
    return 2 * batch * heads * n_queries * key[2] * (width + value[3])
