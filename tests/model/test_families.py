"""What tells the families apart on disk: layouts, fields that must be stated, geometry of the presets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omni_inputs import CLIPS, make_inputs
from seats_cli.errors import ModelError, PlanError
from seats_cli.model.adapter import Adapter
from seats_cli.model.checkpoint import Checkpoint
from seats_cli.model.dummy import _preset_config
from seats_cli.model.families import FAMILIES, Family, family_of
from seats_cli.model.load import load_model, read_thinker_config
from seats_cli.model.stock import StockRun
from tiny_checkpoint import QWEN3, TinySpec

STATED = [
    (family, section, field)
    for family in FAMILIES
    for section, fields in family.required.items()
    for field in fields
]


@pytest.mark.parametrize(
    ("family", "section", "field"), STATED, ids=[f"{f.title}-{s}-{field}" for f, s, field in STATED]
)
def test_a_field_that_is_read_must_be_stated(
    family: Family, section: str, field: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The config classes have defaults for all of them, which would be another checkpoint's."""
    source = make_checkpoint(TinySpec(family=family.model_type))
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_thinker_config(Checkpoint("whole", tmp_path))
    thinker = config["thinker_config"]
    del (thinker[section] if section else thinker)[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = f"{section}.{field}" if section else field
    with pytest.raises(ModelError, match=f"the thinker config of lacking lacks `{where}`"):
        read_thinker_config(Checkpoint("lacking", tmp_path))


@pytest.mark.parametrize(("field", "value"), [("n_window", 40), ("n_window_infer", 450)])
def test_audio_chunks_that_nobody_can_count_are_refused(
    field: str, value: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(make_checkpoint(QWEN3), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["thinker_config"]["audio_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"blocks of {450 if value == 450 else 400}, are not known"):
        load_model(str(tmp_path), device="cpu", dtype="float32")


@pytest.mark.parametrize("token", ["vision_end_token_id", "audio_end_token_id"])
def test_qwen3s_end_marks_may_come_from_the_tokenizer(
    token: str, make_checkpoint: Callable[..., Path], tmp_path: Path, qwen3_adapter: Adapter
) -> None:
    shutil.copytree(make_checkpoint(QWEN3), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["thinker_config"][token]
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = load_model(str(tmp_path), device="cpu", dtype="float32")
    shape = adapter.media_shape(n_frames=2, height=64, width=64, sample_fps=2.0, n_samples=16000)
    assert torch.equal(adapter.prompt("x", shape).input_ids, qwen3_adapter.prompt("x", shape).input_ids)


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES])
@pytest.mark.parametrize(
    "kind",
    [
        {"layout": "full", "sharded": False},
        {"layout": "thinking"},
        {"layout": "thinker"},
        {"layout": "thinker", "sharded": False},
    ],
    ids=str,
)
def test_every_layout_holds_the_same_network(
    family: str, kind: dict[str, object], make_checkpoint: Callable[..., Path]
) -> None:
    """Instruct, Thinking and Captioner, and bare thinkers: one file or shards, experts one by one."""
    whole = load_model(
        str(make_checkpoint(TinySpec(family=family))), device="cpu", dtype="float32", fuse=False
    )
    other = make_checkpoint(TinySpec(family=family, **kind))  # type: ignore[arg-type]
    adapter = load_model(str(other), device="cpu", dtype="float32", fuse=False)
    theirs = adapter.network.state_dict()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    assert adapter.eos_token_ids == whole.eos_token_ids
    assert adapter.geometry == whole.geometry


def test_each_family_has_its_own_means_rate_and_factor(tiny_adapter: Adapter, qwen3_adapter: Adapter) -> None:
    assert qwen3_adapter.pixel_stats.mean == (0.5, 0.5, 0.5)
    assert tiny_adapter.pixel_stats.mean != qwen3_adapter.pixel_stats.mean
    clip = {"n_frames": 120, "height": 720, "width": 1280, "sample_fps": 1.967}
    ours = qwen3_adapter.media_shape(**clip)
    assert ours.video_grid == (60, 18, 32), "the same tokens as 14-pixel patches, of larger frames"
    assert ours == tiny_adapter.media_shape(**clip)
    assert ours.seconds_per_grid == 2 / 1.967, "the rate at which frames were really sampled"
    assert (tiny_adapter.geometry.pixel_factor, qwen3_adapter.geometry.pixel_factor) == (28, 32)
    assert (tiny_adapter.audio_block.tokens, qwen3_adapter.audio_block.tokens) == (50, 52)


def test_sound_is_never_cut(family_adapter: Adapter) -> None:
    """Preprocessor configs name 30 or 300 s as the longest clip; 400 s are all heard."""
    per_s = {"qwen2_5_omni": 25, "qwen3_omni_moe": 13}[family_adapter.geometry.family]
    assert family_adapter.geometry.audio_tokens_per_s == per_s
    shape = family_adapter.media_shape(n_samples=400 * 16000)
    assert (shape.n_audio, shape.audio_frames) == (400 * per_s, 40000)
    assert len(family_adapter.encode_audio(torch.randn(128, 40000), saliency=False)) == 400 * per_s


def test_experts_run_as_grouped_products(qwen3_adapter: Adapter) -> None:
    """Never an expert at a time: transformers' loop over experts is what its default forward does."""
    text = qwen3_adapter.network.config.text_config
    assert text._experts_implementation == "grouped_mm"
    experts = qwen3_adapter.network.model.language_model.layers[0].mlp.experts
    one_by_one = type(experts).forward.__wrapped__
    hidden = torch.randn(9, 64)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(9)])
    weights = torch.rand(9, 3)
    torch.testing.assert_close(
        experts(hidden, index, weights), one_by_one(experts, hidden, index, weights), atol=1e-5, rtol=1e-4
    )


def test_a_cut_before_the_deepstack_ends_is_an_error_that_says_so(qwen3_adapter: Adapter) -> None:
    assert qwen3_adapter.geometry.deepstack_layers == 2
    qwen3_adapter.check_cuts((2, 3))
    with pytest.raises(PlanError, match=r"after layer 1: .* first 2 layers") as raised:
        qwen3_adapter.check_cuts((1, 3))
    assert "2 or more" in (raised.value.hint or "")


@pytest.mark.parametrize(("name", "billions"), [("omni-3b", 4.7), ("omni-7b", 8.9), ("omni-30b", 31.7)])
def test_presets_build_on_meta(name: str, billions: float) -> None:
    """The thinker's size is the published one, the encoders with it; no weight is made."""
    config = _preset_config(name)
    with torch.device("meta"):
        network = family_of(config).network_class()(config)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert total / 1e9 == pytest.approx(billions, abs=0.05)


def test_the_stock_prefill_has_the_deepstack(qwen3_adapter: Adapter) -> None:
    """Encoded first and read then, as the benchmark times it, or all in one forward."""
    shape, frames, mel, _ = make_inputs(qwen3_adapter, **CLIPS["video and audio"])
    run = StockRun(qwen3_adapter, qwen3_adapter.prompt("x", shape), shape, frames=frames, mel=mel)
    with torch.no_grad():
        whole = qwen3_adapter.network(**run.inputs).logits[0, -1]
        parts = run.prefill(run.embed(run.encode_video(), run.encode_audio()))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_the_30b_is_what_its_config_says() -> None:
    config = _preset_config("omni-30b")
    assert config.text_config.num_experts == 128
    assert config.text_config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert config.vision_config.deepstack_visual_indexes == [8, 16, 24]
    with torch.device("meta"):
        network = family_of(config).network_class()(config)
    assert len(network.model.visual.merger_list) == 3
    assert network.model.language_model.layers[0].mlp.experts.gate_up_proj.shape == (128, 1536, 2048)
