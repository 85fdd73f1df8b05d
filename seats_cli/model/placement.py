"""Where a network's weights go, and in which precision they compute. Each choice says why."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from seats_cli.errors import DeviceError, UsageError
from seats_cli.model.checkpoint import Log

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
DEVICE_MAPS = ("none", "auto", "balanced", "sequential")
SMALL_MODEL = 1_000_000_000  # parameters below which float32 on a CPU is affordable, and faster than bfloat16
WORKING_MEMORY = 1.1  # weights need this much of their size on a GPU before anything has run
SPREAD_MULTI_GPU = 'pip install "seats-cli[multi-gpu]"'
RESERVE_BYTES = 3 * 2**30  # of a GPU that shares a spread network, for the activations of what runs there
SMALL_GPU = 40 * 2**30  # bytes below which much that runs beside each other wants more than there is
ROOMY_GPU = 100 * 2**30  # bytes from which PyTorch's own way with memory was measured, and is left alone
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
HOST_SHARE = 0.9  # of the free host memory, that offloaded weights may take


@dataclass(frozen=True)
class Placement:
    """device: where the network lies, whole, or where it begins. spread: transformers' device_map, and
    max_memory (device -> bytes) within which it places parts; None for a network on one device."""

    device: torch.device
    spread: str | None = None
    max_memory: Mapping[Any, int] | None = None


def parse_device(device: str) -> torch.device | None:
    """The named torch device, None for auto; UsageError for nonsense, DeviceError for an absent one."""
    if device == "auto":
        return None
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}", hint="use auto, cpu, cuda, cuda:1 or mps") from error
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                "no CUDA device is usable here", hint="use --device cpu, or check `seats doctor`"
            )
        if (parsed.index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", parsed.index or 0)
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("no MPS device is usable here", hint="use --device cpu")
    if parsed.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {device!r} is not supported", hint="use auto, cpu, cuda or mps")
    return parsed


def choose_placement(
    device: str, device_map: str, weight_bytes: float, log: Log, *, offload: bool = True
) -> Placement:
    """Room for `weight_bytes` of weights.

    device_map: "none" puts them on one device, and on several GPUs only where no single one has room;
    others are transformers' names for spreading them over all GPUs and, for what is left and with `offload`,
    the host's memory: quantised weights cannot wait there.
    Raises DeviceError where there is no room, UsageError for contradictions.
    """
    check_device_map(device, device_map)
    if device_map == "none":
        return _on_one(parse_device(device), weight_bytes * WORKING_MEMORY, log)
    return _spread(device_map, weight_bytes, log, "asked for", offload=offload)


def check_device_map(device: str, device_map: str) -> None:
    """Raises what `choose_placement` does, whatever is to be placed."""
    if device_map not in DEVICE_MAPS:
        raise UsageError(f"unknown device map {device_map!r}", hint=f"use {', '.join(DEVICE_MAPS)}")
    if device_map == "none":
        return
    if parse_device(device) is not None:
        raise UsageError(
            f"--device {device} and --device-map {device_map} contradict each other",
            hint="leave out one of them; CUDA_VISIBLE_DEVICES chooses among the GPUs",
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"--device-map {device_map} spreads a model over GPUs, and none is usable here",
            hint="leave it out to run on the CPU, or check `seats doctor`",
        )


def _on_one(asked: torch.device | None, needed: float, log: Log) -> Placement:
    if asked is not None and asked.type == "cuda":
        free = torch.cuda.mem_get_info(asked)[0]
        if free < needed:
            raise DeviceError(
                f"the model needs about {gib(needed)}, but {asked} has {gib(free)} free",
                hint="free the GPU, use --dtype bfloat16, --quantize 4bit, --device auto or a smaller model",
            )
    if asked is not None:
        return Placement(asked)
    if torch.cuda.is_available():
        return _choose_gpu(needed, log)
    if torch.backends.mps.is_available():
        log("device mps: no CUDA device, but Apple's GPU")
        return Placement(torch.device("mps"))
    log("device cpu: no usable GPU")
    return Placement(torch.device("cpu"))


def _choose_gpu(needed: float, log: Log) -> Placement:
    """The first GPU with room for `needed` bytes, else all of them together."""
    free = gpus_free()
    for index, room in enumerate(free):
        if room >= needed:
            log(f"device cuda:{index}: the first GPU with room for about {gib(needed)}")
            return Placement(torch.device("cuda", index))
    if len(free) < 2 or sum(free) < needed:
        raise DeviceError(
            f"the model needs about {gib(needed)}, but {gib(sum(free))} are free on all GPUs together",
            hint="free the GPU, use --quantize 4bit, a smaller model, or --device cpu; --device-map auto "
            "leaves to the CPU what no GPU has room for",
        )
    return _spread("auto", needed / WORKING_MEMORY, log, f"no single GPU has {gib(needed)} free")


def _spread(device_map: str, weight_bytes: float, log: Log, why: str, *, offload: bool = False) -> Placement:
    """Over all GPUs, and where `offload` over the host's memory for the rest."""
    if find_spec("accelerate") is None:
        raise DeviceError(
            f"spreading a model of {gib(weight_bytes)} over devices needs accelerate", hint=SPREAD_MULTI_GPU
        )
    free = gpus_free()
    room: dict[Any, int] = {index: max(0, int(n - RESERVE_BYTES)) for index, n in enumerate(free)}
    on_gpus, room["cpu"] = sum(room.values()), 0
    if offload:
        host = host_memory_free()
        room["cpu"] = int(weight_bytes if host is None else HOST_SHARE * host)
    if sum(room.values()) < weight_bytes:
        raise DeviceError(
            f"the model needs about {gib(weight_bytes)}, but there is room for {gib(on_gpus)} on the GPUs "
            f"(less {gib(RESERVE_BYTES)} each to work in)"
            + (f" and {gib(room['cpu'])} in the host's memory" if offload else ""),
            hint="use --quantize 4bit, or a smaller model",
        )
    left = weight_bytes - on_gpus
    rest = f", about {gib(left)} of it in the host's memory, which is slow" if left > 0 else ""
    log(f"device: spread over {len(free)} GPU{'s' * (len(free) > 1)} ({why}){rest}")
    return Placement(torch.device("cuda", 0), device_map, room)


def gpus_free() -> list[int]:
    """Free bytes of every visible GPU."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def host_memory_free() -> int | None:
    """Bytes of the host's memory that a process can still take; half of all of it where the platform tells
    no more, None where it tells nothing."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device, what its allocator holds unused among them; None
    where the platform does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_memory_free() if device.type == "cpu" else None


def is_small_gpu(device: str, below: int = SMALL_GPU) -> bool:
    """Whether a device, "auto" perhaps, is an NVIDIA GPU of fewer bytes; not if there is none such."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda") or not torch.cuda.is_available():
        return False
    gpu = int(index) if index.isdecimal() else 0
    return gpu < torch.cuda.device_count() and torch.cuda.get_device_properties(gpu).total_memory < below


def save_gpu_memory(device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Unless a GPU is roomy or the environment sets PyTorch's allocator, that maps memory into segments which
    grow: those of a size, which several streams cannot share, leave 3 of 23 GiB unused."""
    if is_small_gpu(device, ROOMY_GPU) and not any(environment.get(name) for name in ALLOCATOR_SETTINGS):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def gib(n_bytes: float) -> str:
    """Bytes in GiB, in words."""
    return f"{n_bytes / 2**30:.1f} GiB"


def choose_dtype(dtype: str, device: torch.device, n_parameters: int, stored: str, log: Log) -> torch.dtype:
    """The precision to compute in. `stored` is safetensors' name of the checkpoint's own (BF16, F16, F32)."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        if n_parameters < SMALL_MODEL:
            log(f"dtype float32: a small model ({n_parameters / 1e6:.0f} M parameters) on the CPU")
            return torch.float32
        log(f"dtype bfloat16: {n_parameters / 1e9:.1f} B parameters would be twice as large in float32")
        return torch.bfloat16
    if stored == "F16":
        log("dtype float16: the checkpoint's own")
        return torch.float16
    log("dtype bfloat16: " + ("the checkpoint's own" if stored == "BF16" else "half the memory of float32"))
    return torch.bfloat16


def computing_device(module: torch.nn.Module) -> torch.device:
    """Where a module computes: its weights' device, or where weights that are offloaded are brought to."""
    for part in module.modules():
        where = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if where is not None:
            return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
    return next(module.parameters()).device


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether some weight below lies elsewhere than where it is used, until it is."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())
