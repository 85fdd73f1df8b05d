"""Tiny random checkpoints of Qwen2.5-Omni in the layout that the hub has, built in about a second.

Full layout: thinker, talker and token2wav keys with their prefixes, nested configs, sharded safetensors with
an index, preprocessor and generation configs, chat template and a byte-level BPE tokenizer. The talker's and
token2wav's shard is not a safetensors file at all, so that a loader which opens it fails.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
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
VOCAB_SIZE = 384

CHAT_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}"
    "{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PREPROCESSOR = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class TinySpec:
    """What kind of checkpoint to build. `layout`: full (with talker and token2wav) or thinker."""

    layout: str = "full"
    sharded: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    n_layers: int = 6
    context_length: int = 32768


def token_ids() -> dict[str, int]:
    """Special token -> id in the tiny tokenizer."""
    vocab = _tokenizer().get_vocab()
    return {token: vocab[token] for token in SPECIAL_TOKENS}


def thinker_config(spec: TinySpec = TinySpec()) -> dict[str, Any]:
    """The nested thinker_config as the real checkpoint writes it, in tiny."""
    ids = token_ids()
    return {
        "model_type": "qwen2_5_omni_thinker",
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "activation_function": "gelu",
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "max_source_positions": 1500,
            "n_window": 100,
            "num_mel_bins": 128,
            "output_dim": 64,
            "scale_embedding": False,
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 52,
            "fullatt_block_indexes": [1],
            "hidden_act": "silu",
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 25,
            "window_size": 112,
        },
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": spec.n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": spec.context_length,
            "max_window_layers": spec.n_layers,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "vocab_size": VOCAB_SIZE,
        },
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "user_token_id": 0,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "tie_word_embeddings": False,
    }


def build_tiny_checkpoint(folder: Path, spec: TinySpec = TinySpec()) -> Path:
    """Write a checkpoint of this kind into `folder` and return it; the same spec gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    thinker = thinker_config(spec)
    dtype_name = str(spec.dtype).removeprefix("torch.")
    if spec.layout == "full":
        config = {
            "model_type": "qwen2_5_omni",
            "architectures": ["Qwen2_5OmniModel"],
            "enable_audio_output": True,
            "enable_talker": True,
            "thinker_config": thinker,
            "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 64, "num_hidden_layers": 2},
            "token2wav_config": {
                "model_type": "qwen2_5_omni_token2wav",
                "dit_config": {"model_type": "qwen2_5_omni_dit", "dim": 64},
                "bigvgan_config": {"model_type": "qwen2_5_omni_bigvgan"},
            },
            "torch_dtype": dtype_name,
        }
    else:
        config = {**thinker, "torch_dtype": dtype_name}
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    ids = token_ids()
    generation = {"eos_token_id": [ids["<|im_end|>"]], "pad_token_id": ids["<|endoftext|>"]}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write_tokenizer(folder)
    _write_weights(folder, spec, _random_weights(spec))
    return folder


def _random_weights(spec: TinySpec) -> dict[str, torch.Tensor]:
    """Seeded weights under the names of transformers' module tree, scaled so that every part matters."""
    config = Qwen2_5OmniThinkerConfig(**thinker_config(spec))
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
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


def _write_weights(folder: Path, spec: TinySpec, weights: dict[str, torch.Tensor]) -> None:
    full = spec.layout == "full"
    named = {_hub_name(name, "thinker." if full else ""): tensor for name, tensor in weights.items()}
    if not spec.sharded:
        if full:
            named |= {name: torch.zeros(2, 2) for name in ("talker.codec_head.weight", "token2wav.x.weight")}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return
    n_shards = 4 if full else 2
    names = sorted(named)
    shards = [names[i::2] for i in range(2)] if not full else [names[0::3], names[1::3], names[2::3]]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: named[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if full:
        file = f"model-{n_shards:05d}-of-{n_shards:05d}.safetensors"
        (folder / file).write_bytes(b"not safetensors: whoever opens this shard reads what it should not")
        weight_map |= dict.fromkeys(("talker.codec_head.weight", "token2wav.x.weight"), file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _tokenizer() -> Tokenizer:
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
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _write_tokenizer(folder: Path) -> None:
    tokenizer = _tokenizer()
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
        for token in SPECIAL_TOKENS
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
            "audio_token": "<|AUDIO|>",
            "image_token": "<|IMAGE|>",
            "video_token": "<|VIDEO|>",
            "vision_bos_token": "<|vision_bos|>",
            "vision_eos_token": "<|vision_eos|>",
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": {
                "audio_bos_token": "<|audio_bos|>",
                "audio_eos_token": "<|audio_eos|>",
                "audio_token": "<|AUDIO|>",
                "image_token": "<|IMAGE|>",
                "video_token": "<|VIDEO|>",
                "vision_bos_token": "<|vision_bos|>",
                "vision_eos_token": "<|vision_eos|>",
            },
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2_5OmniProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
