"""The saliency of stage I: attention received within windows, in an encoder's last block.

An extra pass over what that block's attention was given, so the encoder's output cannot change.
"""

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from seats_cli.model.kernels import attention_received as attention_received_fused
from seats_cli.model.kernels import is_fused

SALIENCY_SCORES = 1 << 27  # attention scores held at once while saliency is computed (0.5 GB in float32)


def attention_received(query: torch.Tensor, key: torch.Tensor, window: int, scaling: float) -> torch.Tensor:
    """Attention that each position receives from its window: (P, heads, dim) each, to (P,) float32.

    Full softmax within consecutive windows of `window` positions (the last may be shorter), mean over heads,
    sum over queries (docs/method.md, "Stage I", step 1). Windows go in chunks, so memory stays bounded.
    """
    n, n_heads, _ = query.shape
    whole = n - n % window
    at_once = max(1, SALIENCY_SCORES // (n_heads * window * window))
    edges = [*range(0, whole, at_once * window), whole]
    spans = [(start, stop, window) for start, stop in itertools.pairwise(edges)]
    if n > whole:
        spans.append((whole, n, n - whole))
    received = torch.empty(n, dtype=torch.float32, device=query.device)
    for start, stop, width in spans:
        q, k = (x[start:stop].float().unflatten(0, (-1, width)).transpose(1, 2) for x in (query, key))
        weights = torch.softmax(torch.matmul(q, k.transpose(2, 3)) * scaling, dim=-1)
        received[start:stop] = weights.sum(dim=2).mean(dim=1).flatten()
    return received


def received_from_qkv(qkv: torch.Tensor, n_heads: int, window: int) -> torch.Tensor:
    """`attention_received` of packed queries, keys and values (P, 3 H d), rotated: (P,) float32."""
    head_dim = qkv.shape[1] // 3 // n_heads
    if is_fused(qkv):
        return attention_received_fused(qkv, n_heads, head_dim, window)
    query, key, _ = qkv.view(len(qkv), 3, n_heads, head_dim).unbind(1)
    return attention_received(query, key, window, head_dim**-0.5)


_hooked = threading.Lock()  # a module has one hook at a time


@contextmanager
def last_input(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """What `module` is called with inside the block, by argument name; the hook goes when the block ends.

    Other threads may call the module meanwhile, whose input is theirs; a block of theirs waits for this one.
    """
    seen: dict[str, Any] = {}
    owner = threading.get_ident()

    def remember(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> None:  # kwargs lack where the hook is removed while another thread is about to call it
        if threading.get_ident() != owner:
            return
        seen.update(kwargs or {})
        if args:
            seen["hidden_states"] = args[0]

    with _hooked:
        handle = module.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()
