"""Tiny random checkpoints of both families in the layouts that the hub has, built in about a second.

Full layout: thinker, talker and vocoder keys with their prefixes, nested configs, sharded safetensors with
an index, preprocessor and generation configs, chat template and a byte-level BPE tokenizer. The talker's and
vocoder's shard is not a safetensors file at all, so that a loader which opens it fails.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from seats_cli.model.families import find_family
from tiny_families import (
    QWEN2_5_PREPROCESSOR,
    QWEN2_5_ROLES,
    QWEN2_5_TEMPLATE,
    QWEN2_5_TOKENS,
    QWEN3_PREPROCESSOR,
    QWEN3_ROLES,
    QWEN3_TEMPLATE,
    QWEN3_TOKENS,
    qwen2_5_parts,
    qwen2_5_thinker,
    qwen3_parts,
    qwen3_thinker,
)

WORDS = (
    "system",
    "user",
    "assistant",
    "You",
    " are",
    " a",
    " helpful",
    " what",
    " is",
    " the",
    " said",
    "ing",
)


@dataclass(frozen=True)
class TinySpec:
    """What kind of checkpoint to build.

    layout: full (with talker and vocoder), thinking (`thinker.` keys and nested config, but nothing that
            speaks: Qwen3-Omni's Thinking and Captioner) or thinker (bare)
    """

    layout: str = "full"
    family: str = "qwen2_5_omni"
    sharded: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    n_layers: int = 6
    context_length: int = 32768

    @property
    def is_qwen3(self) -> bool:
        return self.family == "qwen3_omni_moe"

    @property
    def speech(self) -> tuple[str, ...]:
        """Weights of what speaks, beside the thinker's."""
        if self.layout != "full":
            return ()
        vocoder = "code2wav.x.weight" if self.is_qwen3 else "token2wav.x.weight"
        return ("talker.codec_head.weight", vocoder)


QWEN3 = TinySpec(family="qwen3_omni_moe")
TOKENS = {"qwen2_5_omni": QWEN2_5_TOKENS, "qwen3_omni_moe": QWEN3_TOKENS}
TEMPLATES = {"qwen2_5_omni": QWEN2_5_TEMPLATE, "qwen3_omni_moe": QWEN3_TEMPLATE}


def token_ids(family: str = "qwen2_5_omni") -> dict[str, int]:
    """Special token -> id in the family's tiny tokenizer."""
    vocab = _tokenizer(family).get_vocab()
    return {token: vocab[token] for token in TOKENS[family]}


def thinker_config(spec: TinySpec = TinySpec()) -> dict[str, Any]:
    """The nested thinker_config as the real checkpoint writes it, in tiny."""
    make = qwen3_thinker if spec.is_qwen3 else qwen2_5_thinker
    return make(token_ids(spec.family), spec.n_layers, spec.context_length)


def build_tiny_checkpoint(folder: Path, spec: TinySpec = TinySpec()) -> Path:
    """Write a checkpoint of this kind into `folder` and return it; the same spec gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    thinker = thinker_config(spec)
    dtype_name = str(spec.dtype).removeprefix("torch.")
    if spec.layout == "thinker":
        config = {**thinker, "torch_dtype": dtype_name}
    else:
        parts = qwen3_parts(spec.layout == "full") if spec.is_qwen3 else qwen2_5_parts()
        config = {
            "model_type": spec.family,
            **parts,
            "thinker_config": thinker,
            "torch_dtype": dtype_name,
        }
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "preprocessor_config.json", QWEN3_PREPROCESSOR if spec.is_qwen3 else QWEN2_5_PREPROCESSOR
    )
    ids = token_ids(spec.family)
    generation = {"eos_token_id": [ids["<|im_end|>"]], "pad_token_id": ids["<|endoftext|>"]}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "chat_template.json", {"chat_template": TEMPLATES[spec.family]})
    _write_tokenizer(folder, spec)
    _write_weights(folder, spec, _random_weights(spec))
    return folder


def _random_weights(spec: TinySpec) -> dict[str, torch.Tensor]:
    """Seeded weights under the names of transformers' module tree, scaled so that every part matters."""
    family = find_family(spec.family)
    assert family is not None
    config = family.config_class()(**{k: v for k, v in thinker_config(spec).items() if k != "model_type"})
    with torch.device("meta"):
        model = family.network_class()(config)
    generator = torch.Generator().manual_seed(spec.seed)
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            scale = 1.0 if "embed_tokens" in name else 1.5 * tensor[0].numel() ** -0.5
            noise = noise * scale
        elif "norm" in name and name.endswith("weight"):
            noise = 1.0 + 0.1 * noise
        else:
            noise = 0.1 * noise
        weights[name] = noise.to(spec.dtype)
    return weights


def _hub_name(name: str, prefix: str) -> str:
    """The name that the published checkpoint gives to a weight of transformers' module tree."""
    for part in ("visual.", "audio_tower."):
        if name.startswith("model." + part):
            return prefix + name.removeprefix("model.")
    return prefix + name.replace("model.language_model.", "model.", 1)


def _separate_experts(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As published, each expert's matrices on their own; transformers stacks them as it loads."""
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        if name.endswith("experts.gate_up_proj"):
            for index, expert in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    apart[name.replace("gate_up_proj", f"{index}.{part}.weight")] = half.clone()
        elif name.endswith("experts.down_proj"):
            for index, expert in enumerate(tensor):
                apart[name.replace("down_proj", f"{index}.down_proj.weight")] = expert.clone()
        else:
            apart[name] = tensor
    return apart


def _write_weights(folder: Path, spec: TinySpec, weights: dict[str, torch.Tensor]) -> None:
    prefix = "" if spec.layout == "thinker" else "thinker."
    named = _separate_experts({_hub_name(name, prefix): tensor for name, tensor in weights.items()})
    if not spec.sharded:
        named |= {name: torch.zeros(2, 2) for name in spec.speech}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return
    speaks = bool(spec.speech)
    n_shards, names = 4 if speaks else 2, sorted(named)
    shards = [names[0::3], names[1::3], names[2::3]] if speaks else [names[0::2], names[1::2]]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: named[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if speaks:
        file = f"model-{n_shards:05d}-of-{n_shards:05d}.safetensors"
        (folder / file).write_bytes(b"not safetensors: whoever opens this shard reads what it should not")
        weight_map |= dict.fromkeys(spec.speech, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _tokenizer(family: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        letters = list(word.replace(" ", "Ġ"))
        left = letters[0]
        for right in letters[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            vocab.setdefault(left, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TOKENS[family]])
    return tokenizer


def _write_tokenizer(folder: Path, spec: TinySpec) -> None:
    tokenizer = _tokenizer(spec.family)
    roles = QWEN3_ROLES if spec.is_qwen3 else QWEN2_5_ROLES
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in TOKENS[spec.family]
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(TOKENS[spec.family]),
            **roles,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": roles,
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen3OmniMoeProcessor" if spec.is_qwen3 else "Qwen2_5OmniProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
