"""The embedded model as a checkpoint folder in the ordinary Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from seats_cli.demo.tokenizer import build_tokenizer_files

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_TOKENS_A_GRID = 64


def thinker_config(geometry: dict[str, dict[str, Any]], token_id: dict[str, int]) -> Qwen2_5OmniThinkerConfig:
    """The config of a thinker of this geometry; `token_id` maps the tokenizer's words to ids."""
    text, vision, audio = (dict(geometry[part]) for part in ("text", "vision", "audio"))
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": text.pop("mrope_section"),
    }
    hidden = text["hidden_size"]
    end, pad = token_id["<|im_end|>"], token_id["<|endoftext|>"]
    return Qwen2_5OmniThinkerConfig(
        text_config=text | {"rope_parameters": rope, "vocab_size": len(token_id), "pad_token_id": pad},
        vision_config=vision | {"out_hidden_size": hidden},
        audio_config=audio | {"output_dim": hidden},
        audio_token_index=token_id["<|AUDIO|>"],
        image_token_index=token_id["<|IMAGE|>"],
        video_token_index=token_id["<|VIDEO|>"],
        audio_start_token_id=token_id["<|audio_bos|>"],
        audio_end_token_id=token_id["<|audio_eos|>"],
        vision_start_token_id=token_id["<|vision_bos|>"],
        vision_end_token_id=token_id["<|vision_eos|>"],
        vision_token_id=token_id["<|vision_pad|>"],
        user_token_id=token_id["user"],
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
    )


def new_thinker(config: Qwen2_5OmniThinkerConfig, seed: int) -> nn.Module:
    """A thinker with fresh weights: matrices by fan-in, residual outputs scaled down by depth."""
    torch.manual_seed(seed)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=torch.float32)
    depth = config.text_config.num_hidden_layers
    for name, p in thinker.named_parameters():
        if p.ndim < 2:
            continue
        if name.endswith(
            ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")
        ):
            nn.init.normal_(p, std=(p[0].numel() * 2 * depth) ** -0.5)
        elif "embed_tokens" in name:
            nn.init.normal_(p, std=0.5)
        elif "lm_head" in name:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return thinker


def write_checkpoint(folder: Path, thinker: Any, frame_size: int) -> None:
    """Weights in bfloat16 safetensors, config, tokenizer and processor files.

    `seats ask --model FOLDER` loads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {name: p.dtype for name, p in thinker.named_parameters()}
    state = {name: value.to(torch.bfloat16) for name, value in thinker.state_dict().items() if name in dtypes}
    thinker.config.dtype = "bfloat16"
    thinker.save_pretrained(folder, state_dict=state, safe_serialization=True)
    build_tokenizer_files(folder)
    pixels = _TOKENS_A_GRID * (frame_size // 8) ** 2
    processor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 300,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5OmniProcessor",
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": pixels,
        "max_pixels": pixels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
