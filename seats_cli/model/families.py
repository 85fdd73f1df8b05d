"""The model families that can be loaded: what their config.json says, and which classes stand behind it.

Importing this imports neither torch nor transformers; the classes come when they are asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from seats_cli.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One model family.

    model_type: of a full checkpoint's config.json; a bare thinker's has `_thinker` behind it
    title:      as people know it
    config, network: transformers' classes, as "module:name" below transformers.models
    adapter:    ours, as "module:name" below seats_cli.model
    dummy_ids:  config field -> token text, for a config without a tokenizer of its own
    required:   section of the thinker's config ("" is the thinker itself) -> fields that must be stated. The
                config classes would fill them with defaults that may be another checkpoint's.
    loading:    further arguments of transformers' from_pretrained and _from_config
    pixels:     name in transformers.image_utils of the means and deviations of pixels, for random weights
                alone: a checkpoint's preprocessor_config.json states its own
    """

    model_type: str
    title: str
    config: str
    network: str
    adapter: str
    dummy_ids: Mapping[str, str]
    required: Mapping[str, tuple[str, ...]]
    loading: Mapping[str, Any]
    pixels: str

    @property
    def model_types(self) -> tuple[str, str]:
        """What config.json may state: a full checkpoint, a bare thinker."""
        return self.model_type, f"{self.model_type}_thinker"

    def config_class(self) -> Any:
        """transformers' config class of the thinker."""
        return _find("transformers.models", self.config)

    def network_class(self) -> Any:
        """transformers' class of the thinker."""
        return _find("transformers.models", self.network)

    def adapter_class(self) -> Any:
        """Our adapter of it."""
        return _find("seats_cli.model", self.adapter)

    def check_stated(self, thinker: Mapping[str, Any], name: str) -> None:
        """Raise ModelError for a thinker config (parsed JSON) that lacks a field which is read."""
        for section, fields in self.required.items():
            values = thinker.get(section) if section else thinker
            if not isinstance(values, Mapping):
                raise ModelError(f"the thinker config of {name} lacks `{section}`")
            for field in fields:
                if values.get(field) is None:
                    where = f"{section}.{field}" if section else field
                    raise ModelError(
                        f"the thinker config of {name} lacks `{where}`",
                        hint="copy config.json from the checkpoint that this one was made from",
                    )


_TEXT = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_VISION = (
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "depth",
    "hidden_size",
    "num_heads",
    "intermediate_size",
)
_AUDIO = (
    "encoder_layers",
    "d_model",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "n_window",
    "num_mel_bins",
)

FAMILIES = (
    Family(
        model_type="qwen2_5_omni",
        title="Qwen2.5-Omni",
        config="qwen2_5_omni.configuration_qwen2_5_omni:Qwen2_5OmniThinkerConfig",
        network="qwen2_5_omni.modeling_qwen2_5_omni:Qwen2_5OmniThinkerForConditionalGeneration",
        adapter="qwen2_5_omni:Qwen25OmniAdapter",
        dummy_ids={
            "audio_token_index": "<|AUDIO|>",
            "image_token_index": "<|IMAGE|>",
            "video_token_index": "<|VIDEO|>",
            "audio_start_token_id": "<|audio_bos|>",
            "audio_end_token_id": "<|audio_eos|>",
            "vision_start_token_id": "<|vision_bos|>",
            "vision_end_token_id": "<|vision_eos|>",
        },
        required={
            "": (
                "position_id_per_seconds",
                "seconds_per_chunk",
                "audio_token_index",
                "image_token_index",
                "video_token_index",
                "audio_start_token_id",
                "audio_end_token_id",
                "vision_start_token_id",
                "vision_end_token_id",
            ),
            "text_config": (*_TEXT, "intermediate_size"),
            "vision_config": (*_VISION, "window_size", "fullatt_block_indexes"),
            "audio_config": _AUDIO,
        },
        loading={},
        pixels="OPENAI_CLIP",
    ),
    Family(
        model_type="qwen3_omni_moe",
        title="Qwen3-Omni",
        config="qwen3_omni_moe.configuration_qwen3_omni_moe:Qwen3OmniMoeThinkerConfig",
        network="qwen3_omni_moe.modeling_qwen3_omni_moe:Qwen3OmniMoeThinkerForConditionalGeneration",
        adapter="qwen3_omni:Qwen3OmniAdapter",
        dummy_ids={
            "audio_token_id": "<|audio_pad|>",
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "audio_start_token_id": "<|audio_start|>",
            "audio_end_token_id": "<|audio_end|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        required={
            "": (
                "position_id_per_seconds",
                "audio_token_id",
                "image_token_id",
                "video_token_id",
                "audio_start_token_id",
                "vision_start_token_id",
            ),
            "text_config": (
                *_TEXT,
                "head_dim",
                "moe_intermediate_size",
                "num_experts",
                "num_experts_per_tok",
            ),
            "vision_config": (*_VISION, "deepstack_visual_indexes"),
            "audio_config": (*_AUDIO, "n_window_infer", "downsample_hidden_size"),
        },
        # all tokens of all experts in two grouped products, on any device; never an expert at a time
        loading={"experts_implementation": "grouped_mm"},
        pixels="IMAGENET_STANDARD",
    ),
)
SUPPORTED = tuple(f"{family.title} (model_type {' or '.join(family.model_types)})" for family in FAMILIES)


def find_family(model_type: object) -> Family | None:
    """The family of a config.json's model_type, full or thinker; None for another."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(config: Any) -> Family:
    """The family of a thinker's config object."""
    family = find_family(config.model_type)
    assert family is not None  # it was made by one
    return family


def _find(package: str, path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(f"{package}.{module}"), name)
