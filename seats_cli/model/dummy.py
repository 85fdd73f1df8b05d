"""Random weights in a real geometry: what a checkpoint costs, without its download.

Everything around the weights is as real as it can be: a folder's own config, tokenizer and preprocessor
files where it has them, else the geometry of a preset and a byte-level tokenizer. Answers are noise, and
every report must say so (`Adapter.random_weights`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seats_cli.errors import DeviceError, ModelError, UsageError
from seats_cli.model.adapter import Adapter
from seats_cli.model.checkpoint import (
    EMBEDDED,
    Checkpoint,
    Log,
    eos_ids,
    is_offline,
    locate,
    read_preprocessor,
)
from seats_cli.model.families import family_of, find_family
from seats_cli.model.footprint import weight_bytes
from seats_cli.model.load import (
    assemble,
    has_tokenizer,
    raw_configs,
    read_thinker_config,
    read_tokenizer,
    thinker_config,
)
from seats_cli.model.placement import DTYPES, choose_dtype, choose_placement, gib
from seats_cli.model.preprocess import MelSpec, PixelStats
from seats_cli.model.quantize import label, stored_quantization
from seats_cli.model.weights import ATTENTION, on_meta, quiet_transformers
from seats_cli.presets import load_preset

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEED = 0


def load_dummy(model: str, *, device: str, dtype: str, log: Log, notes: list[str]) -> Adapter:
    """`load_model(..., load_format="dummy")`: `model` is a folder with a config.json, or names a preset."""
    parts = _read_parts(_source(model, log), model)
    network = _random_network(parts.config, device, dtype, log)
    log(f"random weights in the geometry of {model}: answers are noise, costs are real")
    return _assembled(network, parts, model, notes, random_weights=True)


def load_outline(
    model: str, *, dtype: str, revision: str | None = None, offline: bool = False, log: Log
) -> Adapter:
    """An adapter whose weights are on the meta device: it lays out prompts, counts tokens and knows every
    size, and can run nothing.

    Of a folder or of what the hub's cache holds, the small files are read; of a model that a preset knows,
    nothing more is needed; of others the small files are fetched. Raises as `load_model` does.
    """
    quiet: Log = lambda _: None  # noqa: E731 - where it is looked for in vain is nobody's interest
    checkpoint = None
    if Path(model).expanduser().is_dir() or model == EMBEDDED:
        checkpoint = locate(model, revision=revision, offline=True, log=log)
    else:
        try:
            checkpoint = locate(model, revision=revision, offline=True, log=quiet)
            log(f"config of {model}: from the Hugging Face cache")
        except ModelError:
            try:
                _preset_config(model)
                log(f"config of {model}: its preset's, since it is not in the cache")
            except ModelError:
                checkpoint = locate(model, revision=revision, offline=is_offline(offline), log=log)
    parts = _read_parts(checkpoint, model)
    family = family_of(parts.config)
    kind = DTYPES.get(dtype, torch.bfloat16)
    network = on_meta(family.network_class(), parts.config, kind, family.loading)
    adapter = _assembled(network, parts, model, [], random_weights=False)
    stored = parts.stored
    adapter.quantization = None if stored is None else label(stored)
    return adapter


@dataclass(frozen=True)
class Parts:
    """All of a model but its weights. `stored`: how these are quantised in its files, if they are."""

    config: Any
    tokenizer: Any
    stats: PixelStats
    mel: MelSpec
    eos: set[int]
    stored: Mapping[str, Any] | None


def _source(model: str, log: Log) -> Checkpoint | None:
    """The folder that the name stands for; None for a preset's name."""
    folder = Path(model).expanduser()
    if model == EMBEDDED:
        folder = locate(model, revision=None, offline=True, log=log).folder
    return Checkpoint(model, folder) if (folder / "config.json").is_file() else None


def _read_parts(source: Checkpoint | None, model: str) -> Parts:
    """From a checkpoint's own files where it has them, else from the preset, a byte-level tokenizer and what
    the library has."""
    config = read_thinker_config(source) if source else _preset_config(model)
    if source and has_tokenizer(source):
        tokenizer = read_tokenizer(source)
    else:
        of_config = family_of(config).dummy_ids
        tokenizer = _byte_tokenizer((*CHAT_TOKENS, *of_config.values()))
        for field, token in of_config.items():
            setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    has_preprocessor = source and any(
        (source.folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    )
    stats, mel = read_preprocessor(source) if source and has_preprocessor else _library_preprocessor(config)
    stored = stored_quantization(*raw_configs(source)) if source else None
    return Parts(config, tokenizer, stats, mel, eos_ids(source, []) if source else set(), stored)


def _assembled(network: Any, parts: Parts, name: str, notes: list[str], *, random_weights: bool) -> Adapter:
    return assemble(
        network,
        parts.tokenizer,
        parts.stats,
        parts.mel,
        name=name,
        revision=None,
        eos=parts.eos,
        notes=notes,
        random_weights=random_weights,
    )


def _preset_config(model: str) -> Any:
    try:
        preset = load_preset(model)
    except UsageError as error:
        raise ModelError(
            f"no geometry is known for {model!r}, so no random weights can be made",
            hint=f"give a folder with a config.json; {error.hint}",
        ) from error
    family = find_family(preset.match.model_types[0])
    if family is None:
        raise ModelError(f"{model} is of a family that is not supported yet: {preset.match.model_types[0]}")
    parts = preset.geometry
    missing = [part for part in ("text", "vision", "audio") if part not in parts]
    if missing:
        raise ModelError(f"the preset of {model} states no geometry for: {', '.join(missing)}")
    return thinker_config(
        {
            **parts.get("thinker", {}),
            "text_config": dict(parts["text"]),
            "vision_config": dict(parts["vision"]),
            "audio_config": dict(parts["audio"]),
        },
        family,
    )


def _random_network(config: Any, device: str, dtype: str, log: Log) -> Any:
    family = family_of(config)
    sizes = on_meta(family.network_class(), config, DTYPES.get(dtype, torch.bfloat16), family.loading)
    placement = choose_placement(device, "none", weight_bytes(sizes, sizes.dtype).total, log)
    if placement.spread is not None:
        raise DeviceError(
            f"{gib(weight_bytes(sizes, sizes.dtype).total)} of random weights do not fit on one GPU",
            hint="random weights are made on one device; use --dtype bfloat16 or --device cpu",
        )
    placed = placement.device
    n_parameters = sum(p.numel() for p in sizes.parameters())
    precision = choose_dtype(dtype, placed, n_parameters, "BF16", log)
    cuda = [placed.index or 0] if placed.type == "cuda" else []
    with quiet_transformers(), torch.random.fork_rng(devices=cuda), torch.device(placed):
        torch.manual_seed(SEED)
        return family.network_class()._from_config(
            config, dtype=precision, **{"attn_implementation": ATTENTION, **family.loading}
        )


def _byte_tokenizer(tokens: Sequence[str]) -> Any:
    """One token a byte and special `tokens`: real enough to lay out any prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def _library_preprocessor(config: Any) -> tuple[PixelStats, MelSpec]:
    """The constants that a family shares with older models and with Whisper, as transformers has them."""
    from transformers import WhisperFeatureExtractor, image_utils

    pixels = family_of(config).pixels
    token_area = (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2
    whisper = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins)
    stats = PixelStats(
        mean=tuple(getattr(image_utils, f"{pixels}_MEAN")),
        std=tuple(getattr(image_utils, f"{pixels}_STD")),
        rescale=1 / 255,
        image_min_pixels=4 * token_area,  # 4 and 16384 tokens, as the published checkpoints have it
        image_max_pixels=16384 * token_area,
    )
    mel = MelSpec(config.audio_config.num_mel_bins, whisper.sampling_rate, whisper.n_fft, whisper.hop_length)
    return stats, mel
