"""What tells the families' checkpoints apart, in tiny: tokens, chat template, preprocessor, configs.

Written as the published checkpoints write it, fields that nobody reads included where they could mislead.
"""

from collections.abc import Mapping
from typing import Any

VOCAB_SIZE = 384

QWEN2_5_TOKENS = (
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
QWEN3_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
    "<think>",
    "</think>",
)

# role of a token -> its text, as tokenizer_config.json names them
QWEN2_5_ROLES = {
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "audio_token": "<|AUDIO|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}
QWEN3_ROLES = {
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
    "audio_token": "<|audio_pad|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}

QWEN2_5_TEMPLATE = (
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

QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'audio' or 'audio' in content %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN2_5_PREPROCESSOR = {
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


QWEN3_PREPROCESSOR = {
    **QWEN2_5_PREPROCESSOR,
    "chunk_length": 30,  # what was published first; nothing may be cut after 30 s all the same
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "patch_size": 16,
    "processor_class": "Qwen3OmniMoeProcessor",
}


def qwen2_5_thinker(ids: Mapping[str, int], n_layers: int, context_length: int) -> dict[str, Any]:
    """The thinker_config of Qwen2.5-Omni."""
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
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context_length,
            "max_window_layers": n_layers,
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


def qwen3_thinker(ids: Mapping[str, int], n_layers: int, context_length: int) -> dict[str, Any]:
    """The thinker_config of Qwen3-Omni: queries wider than hidden states, a dense layer between mixtures."""
    return {
        "model_type": "qwen3_omni_moe_thinker",
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "activation_function": "gelu",
            "conv_chunksize": 500,
            "d_model": 32,
            "downsample_hidden_size": 8,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "encoder_layers": 2,
            "max_source_positions": 1500,
            "n_window": 50,
            "n_window_infer": 400,
            "num_hidden_layers": 2,
            "num_mel_bins": 128,
            "output_dim": 64,
            "scale_embedding": False,
        },
        "vision_config": {
            "model_type": "qwen3_omni_moe_vision_encoder",
            "apply_vit_abs_pos_embed": True,
            "deepstack_visual_indexes": [0, 2],
            "depth": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 52,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        "text_config": {
            "model_type": "qwen3_omni_moe_text",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 144,  # as much arithmetic as three experts
            "max_position_embeddings": context_length,
            "mlp_only_layers": [1],
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "num_attention_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_hidden_layers": n_layers,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "interleaved": True,
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
                "rope_type": "default",
                "type": "default",
            },
            "rope_theta": 1000000,
            "shared_expert_intermediate_size": 0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_qk_norm": True,
            "vocab_size": VOCAB_SIZE,
        },
        "audio_end_token_id": ids["<|audio_end|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_token_id": ids["<|audio_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
        "user_token_id": 872,
    }


def qwen2_5_parts() -> dict[str, Any]:
    """What stands beside thinker_config in a full checkpoint of Qwen2.5-Omni."""
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "enable_audio_output": True,
        "enable_talker": True,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 64, "num_hidden_layers": 2},
        "token2wav_config": {
            "model_type": "qwen2_5_omni_token2wav",
            "dit_config": {"model_type": "qwen2_5_omni_dit", "dim": 64},
            "bigvgan_config": {"model_type": "qwen2_5_omni_bigvgan"},
        },
    }


def qwen3_parts(speaks: bool) -> dict[str, Any]:
    """The same of Qwen3-Omni: Instruct speaks, Thinking and Captioner have a thinker alone."""
    parts: dict[str, Any] = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "enable_audio_output": speaks,
        "im_start_token_id": 1,
    }
    if speaks:
        parts["talker_config"] = {"model_type": "qwen3_omni_moe_talker", "accept_hidden_layer": 2}
        parts["code2wav_config"] = {"model_type": "qwen3_omni_moe_code2wav", "hidden_size": 64}
    return parts
