"""How many processes answer at once, and on which device each."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seats_cli.errors import UsageError

MOST_ON_A_CPU = 8
SMALL_MODEL = 512 * 2**20  # bytes of weights that every core may hold a copy of


def choose_workers(asked: int | None, n_clips: int, model: Mapping[str, Any]) -> list[str]:
    """The device of each worker: as many as were asked for, else one a GPU or one a core; at most one a clip.

    model: keywords of ModelOptions. On a CPU at most 8, and a single one for a model that is not small: each
    would hold its own copy. A model that is spread over the devices has one worker; UsageError for more.
    """
    device, spread = model.get("device", "auto"), model.get("device_map", "none")
    if spread != "none":
        if asked is not None and asked > 1:
            raise UsageError(
                f"--workers {asked} and --device-map {spread} contradict each other: a model that is spread "
                "over the devices leaves none for another worker",
                hint="leave out one of them",
            )
        return [device]
    n_gpus = _gpus() if device in ("auto", "cuda") else 0
    if n_gpus:
        n = asked or n_gpus
        devices = [f"cuda:{index % n_gpus}" for index in range(n)]
    else:
        one_a_core = (device == "cpu" or (device == "auto" and not _has_mps())) and _is_small(
            model.get("model", "tiny")
        )
        n = asked or (min(cores(), MOST_ON_A_CPU) if one_a_core else 1)
        devices = [device] * n
    devices = devices[: max(1, n_clips)]
    return devices if len(devices) > 1 else [device]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_gpu(device: str) -> bool:
    """Whether a model that is loaded on a device, auto perhaps, will be on an NVIDIA GPU. Imports torch."""
    return device.startswith("cuda") or (device == "auto" and _gpus() > 0)


def on_small_gpu(device: str) -> bool:
    """Whether that GPU has little memory (`model.placement.SMALL_GPU`). Imports torch."""
    from seats_cli.model.placement import is_small_gpu

    return is_small_gpu(device)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def shared_gpu(devices: Sequence[str]) -> dict[str, bool]:
    """Keywords of ModelOptions where several workers share a GPU: no fast paths, since each process would
    compile its kernels and record its graphs first, which takes longer than most sweeps."""
    on_gpu = [device for device in devices if device.startswith("cuda")]
    return {"compile": False, "graphs": False} if len(set(on_gpu)) < len(on_gpu) else {}


def _is_small(model: str) -> bool:
    from seats_cli.presets import resolve_model

    folder = Path(resolve_model(model)).expanduser()
    if resolve_model(model) == "tiny":
        return True
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    return bool(sizes) and sum(sizes) <= SMALL_MODEL
