"""A checkpoint becomes an `Adapter`: read its files, choose device and precision, load the weights.

Only the thinker is materialised; the talker and token2wav are neither fetched nor opened. Weights come from
safetensors alone and no code from a checkpoint ever runs. Every automatic choice says why through `log`.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from seats_cli.errors import ModelError, UsageError
from seats_cli.model.adapter import Adapter
from seats_cli.model.checkpoint import (
    Checkpoint,
    Log,
    eos_ids,
    is_offline,
    locate,
    read_preprocessor,
    thinker_weights,
)
from seats_cli.model.families import SUPPORTED, Family, family_of, find_family
from seats_cli.model.footprint import stored_bytes, weight_bytes
from seats_cli.model.placement import DTYPES, choose_dtype, choose_placement, parse_device, save_gpu_memory
from seats_cli.model.preprocess import MelSpec, PixelStats
from seats_cli.model.quantize import (
    NONE,
    check_device,
    for_thinker,
    label,
    quantization_config,
    require_packages,
    require_scheme,
    scheme_of,
    stored_quantization,
)
from seats_cli.model.weights import lazy_tensors, load_weights, on_meta, quiet_transformers

FLOATS = ("F16", "BF16", "F32")  # safetensors' types in which a checkpoint's own precision shows


def load_model(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    fuse: bool = True,
    quantize: str = NONE,
    device_map: str = "none",
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
    quantize: "none", or the decoder's linear layers in fewer bits: 8bit or 4bit (bitsandbytes), int8, int4 or
        fp8 (torchao); a checkpoint that is quantised already is loaded as it is
    device_map: "none" for one device, "auto", "balanced" or "sequential" to spread the weights over all GPUs
        and what is left over the host's memory (accelerate)
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
    parse_device(device)
    save_gpu_memory(device)
    scheme_of(quantize)
    if load_format == "dummy":
        from seats_cli.model.dummy import load_dummy

        refuse_for_dummy(quantize, device_map)
        return _fused(load_dummy(model, device=device, dtype=dtype, log=tell, notes=notes), fuse, tell)
    checkpoint = locate(model, revision=revision, offline=is_offline(offline), log=tell)
    thinker = read_thinker_config(checkpoint)
    stored = stored_quantization(*raw_configs(checkpoint))
    if stored is not None:
        refuse_twice(stored, quantize, checkpoint.name)
        require_packages(stored, checkpoint.name)
    elif quantize != NONE:
        require_scheme(quantize)  # before weights are fetched for it
    stats, mel = read_preprocessor(checkpoint)
    require_tokenizer(checkpoint)
    weights = thinker_weights(checkpoint, tell)
    if stored is not None:
        thinker.quantization_config = for_thinker(stored, weights)
        tell(f"weights: {label(stored)}, as the checkpoint has them")
    with ExitStack() as files:
        network = _load_network(
            checkpoint,
            thinker,
            lazy_tensors(weights, files),
            Asked(device, dtype, quantize, device_map),
            tell,
        )
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
    adapter.quantization = label(stored) if stored is not None else None if quantize == NONE else quantize
    return _fused(adapter, fuse, tell)


@dataclass(frozen=True)
class Asked:
    """What was asked of loading, as `load_model` describes it."""

    device: str
    dtype: str
    quantize: str
    device_map: str


def _load_network(
    checkpoint: Checkpoint, config: Any, tensors: Mapping[str, Any], asked: Asked, log: Log
) -> Any:
    """Choose where the weights go and load them there. `tensors`: safetensors slices by name."""
    family, is_stored = family_of(config), getattr(config, "quantization_config", None) is not None
    floats = (kind for kind in (tensor.get_dtype() for tensor in tensors.values()) if kind in FLOATS)
    expected = DTYPES.get(asked.dtype, torch.bfloat16)
    network = on_meta(family.network_class(), config, expected, family.loading)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    needed = stored_bytes(tensors) if is_stored else weight_bytes(network, expected, asked.quantize).total
    offload = not is_stored and asked.quantize == NONE
    placement = choose_placement(asked.device, asked.device_map, needed, log, offload=offload)
    precision = choose_dtype(asked.dtype, placement.device, n_parameters, next(floats, "F32"), log)
    if precision != expected:
        network = on_meta(family.network_class(), config, precision, family.loading)
    how = None
    if asked.quantize != NONE:
        check_device(asked.quantize, placement.device.type, precision)
        how = quantization_config(asked.quantize, network, precision)
        log(f"weights: the decoder's linear layers in {asked.quantize}, the rest in {str(precision)[6:]}")
    return load_weights(checkpoint, network, tensors, placement, precision, how, family.loading)


def refuse_for_dummy(quantize: str, device_map: str) -> None:
    """Raise UsageError for options of loading that random weights, made on one device, do not have."""
    for option, value in (("--quantize", quantize), ("--device-map", device_map)):
        if value != NONE:
            raise UsageError(
                f"{option} {value} is for a checkpoint's weights, not for --load-format dummy",
                hint="`seats plan` says what it would take",
            )


def refuse_twice(stored: Mapping[str, Any], quantize: str, name: str) -> None:
    """Raise UsageError for `--quantize` on a checkpoint that is quantised already."""
    if quantize != NONE:
        raise UsageError(
            f"{name} is quantised already ({label(stored)}), so --quantize {quantize} cannot be",
            hint="leave --quantize out, or use the checkpoint that it was made from",
        )


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
    if not isinstance(thinker, Mapping):
        raise ModelError(f"{checkpoint.folder / 'config.json'} lacks `thinker_config`")
    family.check_stated(thinker, checkpoint.name)
    return thinker_config(thinker, family)


def raw_configs(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """config.json, and the thinker's part of it."""
    raw = checkpoint.read_json("config.json") or {}
    return raw, raw.get("thinker_config", raw)


def _stated_eos(checkpoint: Checkpoint) -> set[int]:
    raw, thinker = raw_configs(checkpoint)
    return eos_ids(checkpoint, [raw, thinker, thinker.get("text_config", {})])


def thinker_config(thinker: Mapping[str, Any], family: Family) -> Any:
    """A thinker's config object from its JSON."""
    from huggingface_hub.errors import StrictDataclassError

    ignored = {"model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
    ignored |= {"quantization_config"}  # told apart, as `for_thinker` has it
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
