"""Bytes of a network's weights before there are any, by part: what fits is decided and shown from these."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seats_cli.model.quantize import ENCODERS, SCHEMES, is_quantised_part

BYTES_OF = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}  # safetensors' types; all others take one


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights and buffers.

    decoder: the language model's layers; outside: its embeddings, head and last norm; encoders: vision, audio
    """

    decoder: int
    outside: int
    encoders: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.decoder + self.outside + self.encoders


def weight_bytes(network: nn.Module, dtype: torch.dtype, quantize: str = "none") -> WeightBytes:
    """Of a network on the meta device, once it is loaded in `dtype` under `--quantize`.

    Linear layers of the decoder take what the scheme says, everything else its elements times the dtype's
    size; tied weights count once.
    """
    scheme = SCHEMES.get(quantize)
    found = {"decoder": 0, "outside": 0, "encoders": 0}
    seen: set[int] = set()
    for name, module in network.named_modules():
        parts = name.split(".")
        part = "decoder" if "layers" in parts else "outside"
        if any(encoder in parts for encoder in ENCODERS):
            part = "encoders"
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if scheme is not None and own == "weight" and is_quantised_part(name, module):
                found[part] += scheme.bytes_of(*parameter.shape)
            else:
                found[part] += parameter.numel() * dtype.itemsize
        found[part] += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    return WeightBytes(**found)


def stored_bytes(tensors: Mapping[str, Any]) -> int:
    """Of safetensors slices as they are stored: what a quantised checkpoint takes once it is loaded."""
    return sum(
        math.prod(tensor.get_shape()) * BYTES_OF.get(tensor.get_dtype(), 1) for tensor in tensors.values()
    )
