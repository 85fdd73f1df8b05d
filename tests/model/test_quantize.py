"""Quantised and offloaded weights: the adapter works through modules, so it works with them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seats_cli.cli import options
from seats_cli.errors import DeviceError, ModelError, UsageError
from seats_cli.model import quantize
from seats_cli.model.footprint import weight_bytes
from seats_cli.model.load import assemble, load_model
from seats_cli.model.placement import DEVICE_MAPS, Placement
from seats_cli.model.quantize import SCHEMES, for_thinker, is_quantised_part, stored_quantization
from tiny_checkpoint import TinySpec

MakeCheckpoint = Callable[..., Path]
ON_CPU = ["int8", "fp8", "8bit", "4bit"]  # int4's kernels are CUDA's


@pytest.fixture(scope="module")
def path(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(TinySpec())


def quantised(path: Path, name: str) -> Any:
    """The tiny checkpoint under `--quantize name`, or a skip where its packages are not installed."""
    pytest.importorskip("accelerate")
    pytest.importorskip(SCHEMES[name].package)
    return load_model(str(path), device="cpu", dtype="float32", quantize=name)


def outcome(adapter: Any) -> dict[str, torch.Tensor]:
    """What selection and the answer rest on: embeddings, saliency, scores, logits."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 56, 56, 3), dtype=torch.uint8, generator=generator)
    shape = adapter.media_shape(n_frames=4, height=56, width=56, sample_fps=2.0, n_samples=32000)
    prompt = adapter.prompt("what is said?", shape)
    seen = adapter.encode_video(frames, shape.video_grid)
    heard = adapter.encode_audio(torch.randn(128, shape.audio_frames, generator=generator))
    hidden = adapter.embed_text(prompt.input_ids)
    hidden[prompt.layout.kind == 1] = seen.embeddings[: shape.n_video]
    hidden[prompt.layout.kind == 2] = heard.embeddings
    hidden, rotary = hidden[None], adapter.rotary(prompt.layout.position)
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, rotary, None)
    return {
        "saliency": torch.cat([seen.saliency, heard.saliency]),
        "embeddings": torch.cat([seen.embeddings, heard.embeddings]),
        "scores": adapter.last_token_attention(2, hidden, rotary),
        "logits": adapter.final_logits(hidden)[0],
    }


def dequantised(module: nn.Linear) -> torch.Tensor:
    """The weight (rows, columns) that a quantised linear layer stands for, found by what it does."""
    columns = torch.eye(module.in_features)
    bias = 0 if module.bias is None else module.bias.detach()
    return (module(columns) - bias).detach().T


# ---- quantised while loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_CPU)
def test_only_the_decoder_s_linear_layers_are_quantised(name: str, path: Path) -> None:
    adapter = quantised(path, name)
    assert adapter.quantization == name
    plain = load_model(str(path), device="cpu", dtype="float32").network
    for part, module in adapter.network.named_modules():
        if not hasattr(module, "weight") or not part:
            continue
        old = plain.get_submodule(part)
        changed = type(module) is not type(old) or type(module.weight) is not nn.Parameter
        assert changed == is_quantised_part(part, old), part
        if not changed:
            assert torch.equal(module.weight, old.weight), part
    n_quantised = sum(is_quantised_part(part, module) for part, module in plain.named_modules())
    assert n_quantised == 7 * adapter.n_layers


@pytest.mark.parametrize("name", ON_CPU)
def test_fast_paths_stay_where_weights_are_plain_and_the_reason_is_told(name: str, path: Path) -> None:
    adapter = quantised(path, name)
    assert "reference paths (decoder: the weights are quantised)" in adapter.notes[-1]
    assert adapter._fast_text is None
    assert adapter._fast_vision is not None
    assert not adapter.decodes_in_graph


@pytest.mark.parametrize("name", ON_CPU)
def test_scores_and_logits_are_those_of_the_dequantised_weights(name: str, path: Path) -> None:
    """Selection sees through the quantised modules: as with their own weights in ordinary linear layers."""
    adapter = quantised(path, name)
    twin = load_model(str(path), device="cpu", dtype="float32", fuse=False)
    for part, module in adapter.network.named_modules():
        if is_quantised_part(part, module):
            twin.network.get_submodule(part).weight = nn.Parameter(dequantised(module), requires_grad=False)
    found, expected = outcome(adapter), outcome(twin)
    torch.testing.assert_close(found["saliency"], expected["saliency"], rtol=1e-4, atol=1e-6)
    # 8bit rounds the activations as well, so that its products are its own
    allowed = 0.15 if name == "8bit" else 1e-4
    for what in ("scores", "logits"):
        error = (found[what] - expected[what]).norm() / expected[what].norm()
        assert error < allowed, (what, float(error))
    plain = outcome(load_model(str(path), device="cpu", dtype="float32"))
    assert not torch.equal(found["logits"], plain["logits"]), "something was quantised"


@pytest.mark.parametrize("name", ["int8", "4bit"])
def test_the_footprint_is_what_the_loaded_weights_take(name: str, path: Path) -> None:
    adapter = quantised(path, name)
    plain = load_model(str(path), device="cpu", dtype="float32")
    expected = weight_bytes(plain.network.to("meta"), torch.float32, name)
    module = adapter.network.model.language_model.layers[0].mlp.up_proj
    rows, columns = module.out_features, module.in_features
    if name == "int8":
        taken = module.weight.qdata.nbytes + module.weight.scale.nbytes
        assert SCHEMES[name].bytes_of(rows, columns) == pytest.approx(taken, abs=2 * rows), (
            "float32 scales here"
        )
    else:
        state = module.weight.quant_state
        taken = module.weight.nbytes + state.absmax.nbytes
        assert SCHEMES[name].bytes_of(rows, columns) == taken
    assert expected.total < weight_bytes(plain.network, torch.float32).total
    assert adapter.parameter_count == sum(p.numel() for p in plain.network.parameters())


def test_ordinary_weights_are_counted_to_the_byte(path: Path) -> None:
    network = load_model(str(path), device="cpu", dtype="float32", fuse=False).network
    taken = sum(p.nbytes for p in network.parameters()) + sum(b.nbytes for b in network.buffers())
    assert weight_bytes(network.to("meta"), torch.float32).total == taken


# ---- what cannot be ----------------------------------------------------------------------------------------


def test_names_are_those_of_the_command_line() -> None:
    assert (quantize.NONE, *SCHEMES) == options.QUANTIZE_NAMES
    assert options.DEVICE_MAPS == DEVICE_MAPS


def test_what_cannot_be_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown quantisation '3bit'"):
        load_model(str(path), device="cpu", quantize="3bit")
    with pytest.raises(UsageError, match=r"--device-map auto is for .* not for --load-format dummy"):
        load_model(str(path), device="cpu", device_map="auto", load_format="dummy")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with monkeypatch.context() as patch:
        patch.setattr("seats_cli.model.load.thinker_weights", lambda *_: pytest.fail("weights are fetched"))
        with pytest.raises(UsageError, match="needs bitsandbytes"):
            load_model(str(path), device="cpu", quantize="8bit")
    with pytest.raises(UsageError, match="--quantize 4bit needs bitsandbytes") as raised:
        load_model(str(path), device="cpu", quantize="4bit")
    assert raised.value.hint == 'pip install "seats-cli[bitsandbytes]"'
    with pytest.raises(DeviceError, match="int4 runs on CUDA in bfloat16, not on cpu in float32"):
        load_model(str(path), device="cpu", dtype="float32", quantize="int4")
    with pytest.raises(DeviceError, match="MPS"):
        quantize.check_device("int8", "mps", torch.bfloat16)


def test_a_mixture_s_experts_are_no_linear_layers() -> None:
    mixture = nn.Module()
    mixture.mlp = nn.Module()
    mixture.mlp.experts = nn.Module()
    mixture.mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(8, 4, 4))
    mixture.head = nn.Linear(4, 4)
    network = nn.ModuleDict({"layer": mixture})
    with pytest.raises(UsageError, match="86% of this model's weights are tensors of its experts"):
        quantize.quantization_config("int8", network, torch.bfloat16)


# ---- quantised beforehand ----------------------------------------------------------------------------------


def edit(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.mark.parametrize(
    ("stored", "said", "hint"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4bit", "gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq 4bit", "gptqmodel accelerate"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "compressed_tensors"),
    ],
)
def test_a_missing_backend_is_named(
    stored: dict[str, Any],
    said: str,
    hint: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    edit(copy, quantization_config=stored)
    monkeypatch.setattr(quantize, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=rf"is quantised \({said}\), and reading it needs") as raised:
        load_model(str(copy), device="cpu")
    assert raised.value.hint == f"pip install {hint}"
    with pytest.raises(UsageError, match=rf"is quantised already \({said}\)"):
        load_model(str(copy), device="cpu", quantize="int8")


@pytest.mark.parametrize("place", ["raw", "thinker", "text"])
def test_a_stored_quantisation_is_found_wherever_it_stands(place: str) -> None:
    stored = {"quant_method": "awq", "bits": 4}
    thinker: dict[str, Any] = {"text_config": {"quantization_config": stored} if place == "text" else {}}
    if place == "thinker":
        thinker["quantization_config"] = stored
    raw = {"thinker_config": thinker, **({"quantization_config": stored} if place == "raw" else {})}
    assert stored_quantization(raw, thinker) == stored
    assert stored_quantization({}, {"text_config": {}}) is None


def test_parts_without_packed_weights_are_told_to_be_left_alone() -> None:
    names = [
        "thinker.model.layers.0.mlp.up_proj.qweight",
        "thinker.model.layers.0.mlp.up_proj.scales",
        "thinker.visual.blocks.0.attn.q.weight",
        "thinker.audio_tower.layers.0.fc1.weight",
        "thinker.lm_head.weight",
    ]
    told = for_thinker({"quant_method": "awq", "modules_to_not_convert": ["thinker.visual"]}, names)
    assert told["modules_to_not_convert"] == ["model.visual", "model.audio_tower", "lm_head", "visual"]
    both = for_thinker({"quant_method": "awq"}, [*names, "thinker.visual.blocks.0.attn.q.qweight"])
    assert both["modules_to_not_convert"] == ["model.audio_tower", "lm_head"]
    assert for_thinker({"quant_method": "gptq", "bits": 4}, names) == {"quant_method": "gptq", "bits": 4}


def test_a_checkpoint_that_was_quantised_beforehand_loads(path: Path, tmp_path: Path) -> None:
    """Saved by transformers in 4 bits, with the names of the thinker; read back to the same answers."""
    adapter = quantised(path, "4bit")
    adapter.network.save_pretrained(tmp_path)
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / file, tmp_path / file)
    again = load_model(str(tmp_path), device="cpu", dtype="float32")
    assert again.quantization == "bitsandbytes 4bit"
    assert any("bitsandbytes 4bit, as the checkpoint has them" in note for note in again.notes)
    found, expected = outcome(again), outcome(adapter)
    for what, tensor in expected.items():
        torch.testing.assert_close(found[what], tensor, rtol=1e-4, atol=1e-4, msg=what)


# ---- offloaded ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen3_omni_moe"])
def offloadable(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(TinySpec(family=request.param))


@pytest.fixture(scope="module")
def offloaded(offloadable: Path) -> Any:
    """An adapter whose weights all wait on the host and are brought where they compute, here a CPU too."""
    accelerate = pytest.importorskip("accelerate")
    plain = load_model(str(offloadable), device="cpu", dtype="float32", fuse=False)
    network = accelerate.cpu_offload(plain.network, execution_device=torch.device("cpu"))
    assert next(network.parameters()).device.type == "meta"
    adapter = assemble(
        network, plain.tokenizer, plain.pixel_stats, plain.mel_spec,
        name="offloaded", revision=None, eos=set(plain.eos_token_ids), notes=[],
    )  # fmt: skip
    assert adapter.fuse() == "reference paths (decoder and vision and audio: weights are offloaded)"
    return adapter


def test_offloaded_weights_give_the_same_embeddings_scores_and_logits(
    offloaded: Any, offloadable: Path
) -> None:
    plain = load_model(str(offloadable), device="cpu", dtype="float32", fuse=False)
    for what, expected in outcome(plain).items():
        assert torch.equal(outcome(offloaded)[what], expected), what
    assert offloaded.device == offloaded.layer_device(0) == torch.device("cpu")


def test_images_too(offloaded: Any, offloadable: Path) -> None:
    plain = load_model(str(offloadable), device="cpu", dtype="float32", fuse=False)
    image = torch.randint(0, 256, (84, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    grid = (1, 6, 4)
    found, expected = (adapter.encode_image(image, grid).embeddings for adapter in (offloaded, plain))
    assert torch.equal(found, expected)


# ---- whole answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "4bit"])
def test_an_answer_meets_the_same_budget(name: str, path: Path, tmp_path: Path) -> None:
    from make_clips import pictures, tone, write_clip
    from seats_cli.session import AskOptions, ModelOptions, Session

    quantised(path, name)  # skips where packages are missing
    write_clip(tmp_path / "clip.mp4", pictures(60), audio=tone(2.0))
    asked = AskOptions(ratio=0.3, max_new_tokens=3)
    options_ = ModelOptions(str(path), device="cpu", dtype="float32")
    full = Session(options_).ask(tmp_path / "clip.mp4", "what is said?", asked).report
    fewer = (
        Session(replace(options_, quantize=name)).ask(tmp_path / "clip.mp4", "what is said?", asked).report
    )
    assert [layer.total for layer in fewer.tokens.per_layer] == [
        layer.total for layer in full.tokens.per_layer
    ]
    assert fewer.environment.quantization == name
    assert full.environment.quantization is None
    assert fewer.options["quantize"] == name


def test_quantised_weights_do_not_wait_on_the_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seats_cli.model import load

    asked: list[bool] = []

    def choose(*_: Any, offload: bool) -> Placement:
        asked.append(offload)
        return Placement(torch.device("cpu"))

    monkeypatch.setattr(load, "choose_placement", choose)
    load_model(str(path), device="cpu", dtype="float32")
    monkeypatch.setattr(quantize, "find_spec", lambda _: object())
    with pytest.raises(DeviceError, match="int4"):
        load_model(str(path), device="cpu", dtype="float32", quantize="int4")
    assert asked == [True, False]


@pytest.mark.parametrize(("room", "fits"), [(10**9, True), (10**5, False)])
def test_spread_weights_that_do_not_fit_are_told(
    room: int, fits: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would put the rest on a disk; here that is an error."""
    from seats_cli.model import load

    pytest.importorskip("accelerate")
    spread = Placement(torch.device("cpu"), "sequential", {"cpu": room})
    monkeypatch.setattr(load, "choose_placement", lambda *_, **__: spread)
    if not fits:
        with pytest.raises(DeviceError, match="does not fit into the GPUs and the host's memory"):
            load_model(str(path), device="cpu", dtype="float32")
        return
    found = outcome(load_model(str(path), device="cpu", dtype="float32", fuse=False))
    monkeypatch.undo()
    expected = outcome(load_model(str(path), device="cpu", dtype="float32", fuse=False))
    assert all(torch.equal(found[what], expected[what]) for what in expected)
