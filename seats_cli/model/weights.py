"""From files to a network: every weight on the device where it computes, none of them twice on the host.

The network is first laid out on the meta device, which costs no memory; then each weight goes from its file
to its device, through the renaming and regrouping that transformers has for checkpoints whose layout is not
its modules'. `from_pretrained` does the same, but asks for accelerate even where there is one device; so on
one device its parts are called here, in its order (transformers 5.22 to 5.23; a test holds the two equal,
buffers included). Quantised networks and those spread over devices need accelerate anyway and take
`from_pretrained`.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from seats_cli.errors import DeviceError, ModelError
from seats_cli.model.checkpoint import Checkpoint, open_safetensors
from seats_cli.model.placement import Placement

ATTENTION = "sdpa"
HARMLESS_KEYS = ("inv_freq", "positional_embedding")  # computed buffers that some checkpoints carry along


def on_meta(
    network_class: Any, config: Any, dtype: torch.dtype, loading: Mapping[str, Any] | None = None
) -> Any:
    """The network without weights: every parameter has its shape and dtype and takes no memory.

    loading: further choices of implementations, by the names of `from_pretrained`'s arguments
    """
    config = copy.deepcopy(config)
    for name, value in {"attn_implementation": ATTENTION, **(loading or {})}.items():
        setattr(config, f"_{name}", value)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with ExitStack() as contexts:
        for context in network_class.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        return network_class(config)


def load_weights(
    checkpoint: Checkpoint,
    network: Any,
    tensors: Mapping[str, Any],
    placement: Placement,
    dtype: torch.dtype,
    quantization: Any | None = None,
    loading: Mapping[str, Any] | None = None,
) -> Any:
    """A network with the checkpoint's weights, every one accounted for.

    network: on the meta device (`on_meta`); it is the one returned, unless it is to be quantised or spread
    tensors: the weights by their names in the files, as `lazy_tensors` gives them
    quantization: transformers' config of a quantisation to come; one that the checkpoint has stands in the
        network's own config
    loading: as `on_meta` has it

    Raises ModelError for weights that are missing, left over, of another shape, or unreadable; DeviceError
    where memory runs out.
    """
    stored = getattr(network.config, "quantization_config", None)
    plain = placement.spread is None and quantization is None and stored is None
    try:
        with quiet_transformers():
            if plain:
                info = _straight(network, tensors, placement.device, dtype)
            else:
                network, info = _by_transformers(
                    network, tensors, placement, dtype, quantization, loading or {}
                )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"out of memory while loading {checkpoint.name}: {error}") from error
    except ImportError as error:
        raise ModelError(f"{checkpoint.name} needs a package to be read: {error}") from error
    except (RuntimeError, ValueError) as error:
        if "out of memory" in str(error):
            raise DeviceError(f"out of memory while loading {checkpoint.name}: {error}") from error
        if "disk" in str(error):  # what transformers would do with weights for which there is no room
            raise DeviceError(
                f"{checkpoint.name} does not fit into the GPUs and the host's memory",
                hint="use --quantize 4bit, or a smaller model",
            ) from error
        raise ModelError(f"loading {checkpoint.name} failed: {error}") from error
    check_keys(checkpoint, info)
    return network


def _straight(
    network: Any, tensors: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Mapping[str, Any]:
    """Fill a network on one device; what `from_pretrained` reports of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    how = LoadStateDictConfig(
        ignore_mismatched_sizes=True,  # reported by check_keys, with names
        device_map={"": device},
        dtype=dtype,
        dtype_plan=network._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(network),
    )
    found, _ = network._load_pretrained_model(network, dict(tensors), None, how)
    if found.conversion_errors:
        raise _conversion_error(found.conversion_errors)
    info: Mapping[str, Any] = network._finalize_model_loading(network, how, found).to_dict()
    return info


def _conversion_error(noted: Mapping[str, str]) -> Exception:
    """What transformers noted while it went on (weight -> traceback and words), as the error it was."""
    name, words = next(iter(noted.items()))
    lines = words.strip().splitlines()
    full = next((line for line in lines if "out of memory" in line), None)
    return RuntimeError(f"{name}: {lines[-1]}") if full is None else torch.OutOfMemoryError(full)


def _by_transformers(
    network: Any,
    tensors: Mapping[str, Any],
    placement: Placement,
    dtype: torch.dtype,
    quantization: Any,
    loading: Mapping[str, Any],
) -> tuple[Any, Mapping[str, Any]]:
    """`from_pretrained` with a device map: needs accelerate."""
    device_map: Any = placement.spread or {"": placement.device}
    spread = {} if placement.max_memory is None else {"max_memory": dict(placement.max_memory)}
    quantized = {} if quantization is None else {"quantization_config": quantization}
    loaded: tuple[Any, Mapping[str, Any]] = type(network).from_pretrained(
        None,
        config=network.config,
        state_dict=dict(tensors),
        dtype=dtype,
        **{"attn_implementation": ATTENTION, **loading},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        device_map=device_map,
        **spread,
        **quantized,
    )
    return loaded


def lazy_tensors(weights: Mapping[str, Path], files: ExitStack) -> dict[str, Any]:
    """Weight name -> safetensors slice, read from disk only when the loader asks for it."""
    opened: dict[Path, Any] = {}
    tensors = {}
    for name, path in weights.items():
        if path not in opened:
            opened[path] = files.enter_context(open_safetensors(path))
        try:
            tensors[name] = opened[path].get_slice(name)
        except Exception as error:  # SafetensorError has changed its base class between releases
            raise ModelError(
                f"{path.name} lacks {name}, which the index says it holds: {error}",
                hint="download the checkpoint again",
            ) from error
    return tensors


def check_keys(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """ModelError unless the checkpoint held exactly the network's weights, in their shapes."""
    mismatched = sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith(HARMLESS_KEYS))
    for keys, words in (
        (sorted(info["missing_keys"]), "lacks {} weights of its thinker"),
        (mismatched, "has {} weights whose shape is not what its config says"),
        (unexpected, "has {} weights that its config has no place for"),
    ):
        if keys:
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise ModelError(
                f"{checkpoint.name} {words.format(len(keys))}: {shown}",
                hint="the weights and config.json do not belong together, or the download is damaged",
            )
    if info.get("error_msgs"):
        raise ModelError(f"loading {checkpoint.name} failed: {info['error_msgs'][0]}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own loading report and progress bars off stderr; its settings are restored after."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    restore: Callable[[], None] = hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        restore()
