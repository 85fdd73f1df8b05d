"""Weights in fewer bits: which schemes there are, what each needs, and which weights it touches.

Only the linear layers of the decoder are quantised. The encoders, whose saliency decides what is kept, the
embeddings and the head stay as they are: they are a small part of the weights, and their fast paths stay.
Weights are quantised while they are read (`--quantize`), or were quantised by whoever made the checkpoint
(GPTQ, AWQ and others: its config.json says so). Either way transformers puts modules in place that dequantise
themselves, and the rest of this package calls those.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from seats_cli.errors import DeviceError, ModelError, UsageError

NONE = "none"
GROUP = 128  # weights that share a scale in torchao's int4
ENCODERS = ("visual", "audio_tower")  # as transformers names them in every Qwen-Omni thinker
HEAD = "lm_head"


@dataclass(frozen=True)
class Scheme:
    """One value of `--quantize`.

    package: what quantises, by its import name; `extra` is this project's extra that brings it
    bits:    of a weight, without scales
    scale_bits, group: a scale (and what goes with it) of so many bits for each `group` weights of a row;
             group 0: one for each row
    """

    package: str
    extra: str
    bits: int
    scale_bits: int
    group: int = 0

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a linear layer's weight (rows, columns), scales included."""
        n_scales = rows if not self.group else -(-rows * columns // self.group)
        return (rows * columns * self.bits + n_scales * self.scale_bits) // 8


# Sources: bitsandbytes' Linear8bitLt (float32 scale a row) and Linear4bit (NF4, blocks of 64, whose scales
# are 8-bit themselves with a float32 for each 256); torchao's Int8/Float8/Int4WeightOnlyConfig.
SCHEMES: Mapping[str, Scheme] = {
    "8bit": Scheme("bitsandbytes", "bitsandbytes", 8, 32),
    "4bit": Scheme("bitsandbytes", "bitsandbytes", 4, 8, 64),
    "int8": Scheme("torchao", "torchao", 8, 16),
    "int4": Scheme("torchao", "torchao", 4, 32, GROUP),
    "fp8": Scheme("torchao", "torchao", 8, 32),
}

# Packages that transformers wants for a checkpoint that was quantised beforehand, by its quant_method.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
}
# Where a stored config lists the modules that were left alone; other methods find them by themselves.
SKIP_LISTS = {
    "awq": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
    "torchao": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
}
STORED_MARKS = (".qweight", ".quant_state.", ".SCB", ".weight_packed", ".weight_scale")


def scheme_of(name: str) -> Scheme | None:
    """The scheme behind `--quantize`; None for "none". Raises UsageError for other names."""
    if name == NONE:
        return None
    if name not in SCHEMES:
        raise UsageError(f"unknown quantisation {name!r}", hint=f"use {NONE}, {', '.join(SCHEMES)}")
    return SCHEMES[name]


def require_scheme(name: str) -> None:
    """Raise UsageError where what the scheme needs is not installed; before anything is downloaded for it."""
    scheme = SCHEMES[name]
    missing = [package for package in (scheme.package, "accelerate") if find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--quantize {name} needs {' and '.join(missing)}",
            hint=f'pip install "seats-cli[{scheme.extra}]"',
        )


def check_device(name: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise DeviceError where the scheme's kernels do not run."""
    if device_type == "mps":
        raise DeviceError(f"--quantize {name} has no kernels for MPS", hint="use a GPU with CUDA, or a CPU")
    if name == "int4" and (device_type != "cuda" or dtype != torch.bfloat16):
        raise DeviceError(
            f"--quantize int4 runs on CUDA in bfloat16, not on {device_type} in {str(dtype)[6:]}",
            hint="use --quantize int8, or 4bit (bitsandbytes)",
        )


def quantization_config(name: str, network: nn.Module, dtype: torch.dtype) -> Any:
    """What transformers is told, so that `network`'s decoder layers alone are quantised.

    network: on the meta device. Raises UsageError where the scheme would leave most weights as they are.
    """
    refuse_expert_tensors(name, network)
    kept = kept_precise(network)
    if SCHEMES[name].package == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        if name == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if name == "int4":
        # The packing that PyTorch itself has kernels for; the others need further packages.
        how = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        how = Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(how, modules_to_not_convert=kept)


def kept_precise(network: nn.Module) -> list[str]:
    """Names of the modules that stay as they are, each standing for all below it: encoders and head."""
    return [
        name for name, _ in network.named_modules() if name.rpartition(".")[2] in ENCODERS or name == HEAD
    ]


def is_quantised_part(name: str, module: nn.Module) -> bool:
    """Whether `--quantize` would quantise this module: a linear layer of the decoder."""
    parts = name.split(".")
    return isinstance(module, nn.Linear) and HEAD not in parts and not any(e in parts for e in ENCODERS)


def refuse_expert_tensors(name: str, network: nn.Module) -> None:
    """Raise UsageError for a mixture, most of whose weights are expert tensors and no linear layers."""
    experts = sum(p.numel() for n, p in network.named_parameters() if ".experts." in n and p.ndim == 3)
    total = sum(p.numel() for p in network.parameters())
    if 2 * experts > total:
        raise UsageError(
            f"--quantize {name} reaches linear layers only, and {experts / total:.0%} of this model's "
            "weights are tensors of its experts",
            hint="use --device-map auto, which leaves to the CPU what no GPU has room for",
        )


# ---- checkpoints that were quantised beforehand ------------------------------------------------------------


def stored_quantization(raw: Mapping[str, Any], thinker: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a config.json, wherever in it; None for an ordinary checkpoint."""
    for place in (raw, thinker, thinker.get("text_config") or {}):
        found = place.get("quantization_config")
        if isinstance(found, Mapping):
            return dict(found)
    return None


def label(stored: Mapping[str, Any]) -> str:
    """A stored quantisation in two words, such as "gptq 4bit"."""
    method, bits = str(stored.get("quant_method", "unknown")), stored_bits(stored)
    return f"{method} {bits}bit" if bits else method


def stored_bits(stored: Mapping[str, Any]) -> int | None:
    """Bits of a weight as the config says; None where it does not."""
    for key, bits in (("load_in_4bit", 4), ("_load_in_4bit", 4), ("load_in_8bit", 8), ("_load_in_8bit", 8)):
        if stored.get(key):
            return bits
    value = stored.get("bits", stored.get("w_bit"))
    return value if isinstance(value, int) else 8 if stored.get("quant_method") == "fp8" else None


def require_packages(stored: Mapping[str, Any], name: str) -> None:
    """Raise ModelError where what reads this checkpoint is not installed."""
    missing = [p for p in NEEDED.get(str(stored.get("quant_method")), ()) if find_spec(p) is None]
    if missing:
        raise ModelError(
            f"{name} is quantised ({label(stored)}), and reading it needs {' and '.join(missing)}",
            hint=f"pip install {' '.join(missing)}",
        )


def for_thinker(stored: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any]:
    """A stored quantisation as the thinker alone has to be told it.

    Its own list of modules left alone has the names of the whole model; which they are is seen from the
    weights: a part none of whose weights is packed was left alone.
    """
    names = list(weights)
    packed = [name for name in names if any(mark in name for mark in STORED_MARKS)]
    alone = [
        part for part in (*ENCODERS, HEAD) if not any(re.search(rf"(^|\.){part}\.", name) for name in packed)
    ]
    kept = [part if part == HEAD else f"model.{part}" for part in alone]
    told = dict(stored)
    key = SKIP_LISTS.get(str(stored.get("quant_method")))
    if key is not None:
        before = told.get(key) or []
        told[key] = [*kept, *(entry.removeprefix("thinker.") for entry in before if entry not in kept)]
    return told
