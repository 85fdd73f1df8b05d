"""A checkpoint becomes an `Adapter`: choose device and precision, read the weights, check every key.

Only the thinker is materialised; the talker and token2wav are neither fetched nor opened. Weights come from
safetensors alone and no code from a checkpoint ever runs. Every automatic choice says why through `log`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from seats_cli.errors import DeviceError, ModelError, UsageError
from seats_cli.model.adapter import Adapter
from seats_cli.model.checkpoint import (
    Checkpoint,
    Log,
    eos_ids,
    is_offline,
    locate,
    open_safetensors,
    read_preprocessor,
    thinker_weights,
)
from seats_cli.model.families import SUPPORTED, Family, family_of, find_family
from seats_cli.model.preprocess import MelSpec, PixelStats

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
SMALL_MODEL = 1_000_000_000  # parameters below which float32 on a CPU is affordable, and faster than bfloat16
WORKING_MEMORY = 1.1  # weights need this much of their size on a GPU before anything has run
HARMLESS_KEYS = ("inv_freq", "positional_embedding")  # computed buffers that some checkpoints carry along


def load_model(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    fuse: bool = True,
    log: Log | None = None,
) -> Adapter:
    """Load a Qwen-Omni checkpoint.

    model: "tiny" (the embedded model), a folder, or a hub id; full or thinker-only
    device: "auto" (one GPU if the model fits, several through accelerate if not, else MPS, else the CPU) or a
        torch device such as "cuda:1" or "cpu"
    dtype: "auto", or one of float32, float16, bfloat16
    load_format: "auto" reads weights; "dummy" makes random ones in the geometry of the folder's config.json
        or of the preset that goes with the name, and downloads nothing
    offline: use only what is on disk, as HF_HUB_OFFLINE=1 does
    fuse: switch to the fast paths where they can run (`Adapter.fuse`); else transformers' own modules run
    log: receives one line per automatic choice

    Raises ModelError (missing, foreign, incomplete), DeviceError (absent, full), UsageError (bad option).
    """
    notes: list[str] = []

    def tell(line: str) -> None:
        notes.append(line)
        if log is not None:
            log(line)

    if load_format not in ("auto", "dummy"):
        raise UsageError(f"unknown load format {load_format!r}", hint="use auto or dummy")
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint="use auto, float32, float16 or bfloat16")
    _parse_device(device)
    if load_format == "dummy":
        from seats_cli.model.dummy import load_dummy

        return _fused(load_dummy(model, device=device, dtype=dtype, log=tell, notes=notes), fuse, tell)
    checkpoint = locate(model, revision=revision, offline=is_offline(offline), log=tell)
    thinker = read_thinker_config(checkpoint)
    stats, mel = read_preprocessor(checkpoint)
    require_tokenizer(checkpoint)
    weights = thinker_weights(checkpoint, tell)
    with ExitStack() as files:
        tensors = _lazy_tensors(weights, files)
        n_parameters = sum(_size(tensor) for tensor in tensors.values())
        stored = next(iter(tensors.values())).get_dtype() if tensors else "F32"
        placed = choose_device(device, n_parameters, dtype, tell)
        precision = choose_dtype(dtype, placed, n_parameters, stored, tell)
        network = _build(checkpoint, thinker, tensors, placed, precision)
    tokenizer = read_tokenizer(checkpoint)
    adapter = assemble(
        network,
        tokenizer,
        stats,
        mel,
        name=checkpoint.name,
        revision=checkpoint.revision,
        eos=_stated_eos(checkpoint),
        notes=notes,
    )
    return _fused(adapter, fuse, tell)


def _fused(adapter: Adapter, fuse: bool, log: Log) -> Adapter:
    line = adapter.fuse() if fuse else "reference paths: asked for"
    log(line)
    adapter.notes = (*adapter.notes, line)
    return adapter


def assemble(
    network: Any,
    tokenizer: Any,
    stats: PixelStats,
    mel: MelSpec,
    *,
    name: str,
    revision: str | None,
    eos: set[int],
    notes: list[str],
    random_weights: bool = False,
) -> Adapter:
    """The adapter of a built network, after checking that its parts agree with each other."""
    config = network.config
    if mel.bins != config.audio_config.num_mel_bins:
        raise ModelError(
            f"{name} disagrees with itself: {mel.bins} mel bins in its preprocessor config, "
            f"{config.audio_config.num_mel_bins} in its audio encoder"
        )
    vocab = tokenizer.get_vocab()
    ids = eos | {vocab[token] for token in ("<|im_end|>", "<|endoftext|>") if token in vocab}
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    adapter: Adapter = family_of(config).adapter_class()(
        network.requires_grad_(False).eval(),
        tokenizer,
        pixel_stats=stats,
        mel_spec=mel,
        eos_token_ids=tuple(sorted(ids)),
        name=name,
        revision=revision,
        random_weights=random_weights,
        notes=notes,
    )
    return adapter


# ---- what the files say --------------------------------------------------------------------------


def read_thinker_config(checkpoint: Checkpoint) -> Any:
    """The thinker's config object; ModelError for other families and for a config that lacks a part."""
    raw = checkpoint.read_json("config.json") or {}
    kind = raw.get("model_type")
    family = find_family(kind)
    if family is None:
        raise ModelError(
            f"{checkpoint.name} is of a family that is not supported: model_type {kind!r}",
            hint="supported: " + "; ".join(SUPPORTED),
        )
    thinker = raw.get("thinker_config") if kind == family.model_type else raw
    if raw.get("quantization_config") or (thinker or {}).get("quantization_config"):
        raise ModelError(
            f"{checkpoint.name} is quantised, which is not supported yet",
            hint="use the checkpoint that it was made from",
        )
    if not isinstance(thinker, Mapping):
        raise ModelError(f"{checkpoint.folder / 'config.json'} lacks `thinker_config`")
    family.check_stated(thinker, checkpoint.name)
    return thinker_config(thinker, family)


def _stated_eos(checkpoint: Checkpoint) -> set[int]:
    raw = checkpoint.read_json("config.json") or {}
    thinker = raw.get("thinker_config", raw)
    return eos_ids(checkpoint, [raw, thinker, thinker.get("text_config", {})])


def thinker_config(thinker: Mapping[str, Any], family: Family) -> Any:
    """A thinker's config object from its JSON."""
    from huggingface_hub.errors import StrictDataclassError

    ignored = {"model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
    try:
        return family.config_class()(**{k: v for k, v in thinker.items() if k not in ignored})
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"the checkpoint's thinker config is not valid: {error}") from error


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has tokenizer files."""
    present = {path.name for path in checkpoint.folder.iterdir()}
    return "tokenizer.json" in present or {"vocab.json", "merges.txt"} <= present


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """ModelError when the checkpoint has no tokenizer files."""
    if not has_tokenizer(checkpoint):
        raise ModelError(
            f"{checkpoint.name} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt",
            hint="copy the tokenizer files from the checkpoint that this one was made from",
        )


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer through transformers, from local files, without remote code."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exception for broken files
            raise ModelError(f"the tokenizer of {checkpoint.name} cannot be read: {error}") from error


def _lazy_tensors(weights: Mapping[str, "Path"], files: ExitStack) -> dict[str, Any]:
    """Weight name -> safetensors slice, read from disk only when the loader asks for it."""
    opened: dict[Path, Any] = {}
    tensors = {}
    for name, path in weights.items():
        if path not in opened:
            opened[path] = files.enter_context(open_safetensors(path))
        try:
            tensors[name] = opened[path].get_slice(name)
        except Exception as error:  # SafetensorError has changed its base class between releases
            raise ModelError(f"{path.name} lacks {name}, which the index says it holds: {error}") from error
    return tensors


def _size(tensor: Any) -> int:
    n = 1
    for side in tensor.get_shape():
        n *= side
    return n


# ---- choices -------------------------------------------------------------------------------------


def _parse_device(device: str) -> torch.device | None:
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


def choose_device(device: str, n_parameters: int, dtype: str, log: Log) -> torch.device | str:
    """A torch device with room for the weights, or "auto" when they must be spread over several GPUs."""
    asked = _parse_device(device)
    width = DTYPES[dtype].itemsize if dtype != "auto" else 2
    needed = n_parameters * width * WORKING_MEMORY
    if asked is not None and asked.type == "cuda":
        free = torch.cuda.mem_get_info(asked)[0]
        if free < needed:
            raise DeviceError(
                f"the model needs about {_gib(needed)}, but {asked} has {_gib(free)} free",
                hint="free the GPU, use --dtype bfloat16, --device auto or a smaller model",
            )
    if asked is not None:
        return asked
    if torch.cuda.is_available():
        return _choose_gpu(needed, log)
    if torch.backends.mps.is_available():
        log("device mps: no CUDA device, but Apple's GPU")
        return torch.device("mps")
    log("device cpu: no usable GPU")
    return torch.device("cpu")


def _choose_gpu(needed: float, log: Log) -> torch.device | str:
    """The first GPU with room for `needed` bytes, else all of them together."""
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    for index, room in enumerate(free):
        if room >= needed:
            log(f"device cuda:{index}: the first GPU with room for about {_gib(needed)}")
            return torch.device("cuda", index)
    if len(free) < 2 or sum(free) < needed:
        raise DeviceError(
            f"the model needs about {_gib(needed)}, but {_gib(sum(free))} are free on all GPUs together",
            hint="free the GPU, use a smaller model, or --device cpu",
        )
    if find_spec("accelerate") is None:
        raise DeviceError(
            f"the model needs about {_gib(needed)}, more than any one GPU has free",
            hint="`pip install accelerate` to spread it over the GPUs",
        )
    log(f"device: spread over {len(free)} GPUs, since no single one has {_gib(needed)} free")
    return "auto"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def choose_dtype(
    dtype: str, device: torch.device | str, n_parameters: int, stored: str, log: Log
) -> torch.dtype:
    """The precision to compute in. `stored` is safetensors' name of the checkpoint's own (BF16, F16, F32)."""
    if dtype != "auto":
        return DTYPES[dtype]
    if isinstance(device, torch.device) and device.type == "cpu":
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


# ---- building ------------------------------------------------------------------------------------


def _build(
    checkpoint: Checkpoint,
    config: Any,
    tensors: dict[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Any:
    """The thinker with the checkpoint's weights, every one accounted for."""
    family = family_of(config)
    # With accelerate, weights go from the file straight to their device.
    straight = find_spec("accelerate") is not None and device != torch.device("cpu")
    device_map = {} if not straight else {"device_map": device if device == "auto" else {"": device}}
    with quiet_transformers():
        try:
            network, info = family.network_class().from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # reported by _check_keys, with names
                output_loading_info=True,
                **device_map,
                **family.loading,
            )
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"out of memory while loading {checkpoint.name}: {error}") from error
    _check_keys(checkpoint, info)
    return network if straight else network.to(device)


def _check_keys(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
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
