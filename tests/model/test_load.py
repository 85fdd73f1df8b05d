"""Every kind of checkpoint loads to the same network, and every broken one says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from seats_cli.errors import DeviceError, ModelError, UsageError
from seats_cli.model import load, placement
from seats_cli.model.load import load_model
from seats_cli.model.placement import Placement, choose_dtype, choose_placement, save_gpu_memory
from tiny_checkpoint import TinySpec

MakeCheckpoint = Callable[..., Path]


def logits(adapter: Any) -> torch.Tensor:
    shape = adapter.media_shape(n_samples=16000)
    prompt = adapter.prompt("what is the said?", shape)
    hidden = adapter.embed_text(prompt.input_ids)
    hidden[prompt.layout.kind == 2] = adapter.encode_audio(torch.ones(128, 100)).embeddings
    hidden, rotary = hidden[None], adapter.rotary(prompt.layout.position)
    for index in range(adapter.n_layers):
        hidden = adapter.run_layer(index, hidden, rotary, None)
    return adapter.final_logits(hidden, last_only=True).float()


@pytest.mark.parametrize("layout", ["full", "thinker"])
@pytest.mark.parametrize("sharded", [True, False])
def test_every_layout_is_the_same_network(
    layout: str, sharded: bool, make_checkpoint: MakeCheckpoint, tiny_adapter: Any
) -> None:
    path = make_checkpoint(TinySpec(layout=layout, sharded=sharded))
    adapter = load_model(str(path), device="cpu", dtype="float32")
    loaded, expected = (one._model.state_dict() for one in (adapter, tiny_adapter))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    # the same bits, but where they lie in memory can change how kernels round
    torch.testing.assert_close(logits(adapter), logits(tiny_adapter), rtol=0, atol=1e-6)
    assert adapter.parameter_count == tiny_adapter.parameter_count
    assert not hasattr(adapter._model, "talker")


def test_every_weight_is_the_file_s(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(TinySpec(layout="thinker", sharded=False, seed=5))
    stored = load_file(path / "model.safetensors")
    loaded = load_model(str(path), device="cpu", dtype="float32")._model.state_dict()
    assert len(loaded) == len(stored)
    for name, tensor in stored.items():
        name = name.replace("visual.", "model.visual.").replace("audio_tower.", "model.audio_tower.")
        if name.startswith(("model.layers", "model.embed", "model.norm")):
            name = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(loaded[name], tensor), name


def test_a_checkpoint_saved_by_transformers_loads(
    tiny_adapter: Any, tiny_checkpoint_path: Path, tmp_path: Path
) -> None:
    """transformers 5 has its own names for a thinker's weights, and processor_config.json."""
    tiny_adapter._model.save_pretrained(tmp_path)
    tiny_adapter.tokenizer.save_pretrained(tmp_path)
    old = json.loads((tiny_checkpoint_path / "preprocessor_config.json").read_text())
    image = {key: old[key] for key in ("image_mean", "image_std")}
    image["size"] = {"shortest_edge": old["min_pixels"], "longest_edge": old["max_pixels"]}
    audio = {key: old[key] for key in ("feature_size", "sampling_rate", "n_fft", "hop_length")}
    nested = {"image_processor": image, "feature_extractor": audio}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    adapter = load_model(str(tmp_path), device="cpu", dtype="float32")
    assert torch.equal(logits(adapter), logits(tiny_adapter))
    assert adapter.pixel_stats == tiny_adapter.pixel_stats


def test_dtypes(make_checkpoint: MakeCheckpoint) -> None:
    path = str(make_checkpoint(TinySpec(dtype=torch.bfloat16)))
    said: list[str] = []
    adapter = load_model(path, device="cpu", log=said.append)
    assert adapter.dtype == torch.float32
    assert any("float32: a small model" in line for line in said)
    assert list(adapter.notes) == said
    half = load_model(path, device="cpu", dtype="bf16")
    assert half.dtype == torch.bfloat16
    assert half.encode_audio(torch.ones(128, 200)).embeddings.dtype == torch.bfloat16
    assert half._text.rotary_emb.inv_freq.dtype == torch.float32, "frequencies never lose precision"
    torch.testing.assert_close(logits(half), logits(adapter), atol=0.5, rtol=0.1)


def test_what_a_loaded_model_says_of_itself(tiny_adapter: Any, tiny_checkpoint_path: Path) -> None:
    token = tiny_adapter.tokenizer.convert_tokens_to_ids
    assert set(tiny_adapter.eos_token_ids) == {token("<|im_end|>"), token("<|endoftext|>")}
    assert tiny_adapter.name == str(tiny_checkpoint_path)
    assert not tiny_adapter.random_weights
    assert tiny_adapter.geometry.n_layers == 6
    assert tiny_adapter.geometry.key_width == 32
    assert tiny_adapter.geometry.audio_tokens_per_s == 25
    assert not any(parameter.requires_grad for parameter in tiny_adapter._model.parameters())
    assert tiny_adapter.layer_device(0) == tiny_adapter.device == torch.device("cpu")


def test_loading_leaves_transformers_settings_alone(tiny_checkpoint_path: Path) -> None:
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load_model(str(tiny_checkpoint_path), device="cpu")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


# ---- broken checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def copy(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of its own, to break."""

    def make(**spec: Any) -> Path:
        return Path(shutil.copytree(make_checkpoint(TinySpec(**spec)), tmp_path / "copy"))

    return make


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refuse(path: Path | str, match: str, **options: Any) -> ModelError:
    with pytest.raises(ModelError, match=match) as raised:
        load_model(str(path), device="cpu", **options)
    assert raised.value.exit_code == 2
    return raised.value


def test_names_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse(tmp_path, "no config.json")
    refuse(tmp_path / "file", "is a file")
    refuse("./nowhere", "no such model")
    refuse("a/b/c", "no such model")
    refuse("nonsense", "no such model")


def test_a_hub_id_that_is_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = refuse("Qwen/Qwen2.5-Omni-0B", "not in the local cache, and the network is off", offline=True)
    assert "folder" in (error.hint or "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse("Qwen/Qwen2.5-Omni-0B", "the network is off")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("RepositoryNotFoundError", "the hub has no model a/b, or it is private"),
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "no revision v9"),
        ("HfHubHTTPError", "fetching a/b failed: the reason"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses(name: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = ("the reason",)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(type(error), "__str__", lambda _: "the reason")
    refuse("a/b", match, revision="v9")


def test_a_cached_hub_checkpoint_loads_offline(
    tiny_checkpoint_path: Path, tiny_adapter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache as the hub client lays it out, without the talker's shard: it is not needed."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--acme--omni"
    snapshot = Path(shutil.copytree(tiny_checkpoint_path, repo / "snapshots" / commit))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (snapshot / "model-00004-of-00004.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = load_model("acme/omni", device="cpu", dtype="float32", offline=True)
    assert (adapter.name, adapter.revision) == ("acme/omni", commit)
    assert torch.equal(logits(adapter), logits(tiny_adapter))
    (snapshot / "model-00002-of-00004.safetensors").unlink()
    refuse("acme/omni", r"incomplete: 1 of 3 weight files are missing \(model-00002", offline=True)


def test_foreign_families_and_incomplete_configs(copy: Callable[..., Path]) -> None:
    path = copy()
    config = path / "config.json"
    whole = config.read_text()
    edit(config, lambda c: c.update(model_type="llama"))
    assert "qwen2_5_omni" in (refuse(path, "not supported: model_type 'llama'").hint or "")
    for change, match in (
        (lambda c: c.pop("thinker_config"), "lacks `thinker_config`"),
        (lambda c: c["thinker_config"].pop("vision_config"), "lacks `vision_config`"),
        (lambda c: c["thinker_config"].pop("vision_start_token_id"), "lacks `vision_start_token_id`"),
        (lambda c: c["thinker_config"]["text_config"].update(hidden_size="wide"), "not valid"),
    ):
        config.write_text(whole)
        edit(config, change)
        refuse(path, match)
    config.write_text("{")
    refuse(path, "not readable JSON")


def test_missing_files(copy: Callable[..., Path]) -> None:
    path = copy()
    (path / "model-00002-of-00004.safetensors").rename(path / "elsewhere")
    refuse(path, r"1 of 3 weight files are missing \(model-00002-of-00004.safetensors\)")
    (path / "model-00002-of-00004.safetensors").write_bytes(b"broken")
    refuse(path, "not a readable safetensors file")
    (path / "elsewhere").rename(path / "model-00002-of-00004.safetensors")
    (path / "preprocessor_config.json").rename(path / "elsewhere")
    refuse(path, "no preprocessor_config.json")
    (path / "elsewhere").rename(path / "preprocessor_config.json")
    edit(path / "preprocessor_config.json", lambda c: c.pop("hop_length"))
    refuse(path, "preprocessor_config.json lacks `hop_length`")
    edit(path / "preprocessor_config.json", lambda c: c.update(hop_length=160, feature_size=80))
    refuse(path, "80 mel bins")
    for name in ("tokenizer.json", "vocab.json"):
        (path / name).unlink()
    refuse(path, "no tokenizer")


def test_pickled_weights_are_refused(copy: Callable[..., Path]) -> None:
    path = copy(sharded=False)
    (path / "model.safetensors").unlink()
    refuse(path, "no weights")
    (path / "pytorch_model.bin").touch()
    refuse(path, "pickled")


def test_weights_that_do_not_fit_the_config(copy: Callable[..., Path]) -> None:
    path = copy(sharded=False, layout="thinker")
    file = path / "model.safetensors"
    whole = load_file(file)

    def save(changed: dict[str, torch.Tensor]) -> None:
        save_file({**{k: v for k, v in whole.items() if k not in changed}, **changed}, file)

    save_file({k: v for k, v in whole.items() if k != "model.layers.3.mlp.up_proj.weight"}, file)
    refuse(path, r"lacks 1 weights of its thinker: .*layers\.3\.mlp\.up_proj\.weight")
    save({"model.norm.weight": torch.ones(7)})
    refuse(path, r"shape is not what its config says: .*norm\.weight")
    save({"model.layers.9.mlp.up_proj.weight": torch.ones(7)})
    refuse(path, r"no place for: .*layers\.9\.mlp\.up_proj\.weight")
    save({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load_model(str(path), device="cpu")


def test_the_embedded_model_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("seats_cli.model.checkpoint.resources.files", lambda _: tmp_path)
    refuse("tiny", "embedded model is missing")


# ---- options and choices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"revision": "v2"}, "is a folder"),
        ({"dtype": "int3"}, "int3"),
        ({"device": "toaster"}, "toaster"),
        ({"load_format": "bin"}, "bin"),
    ],
)
def test_bad_options(options: dict[str, str], match: str, tiny_checkpoint_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        load_model(str(tiny_checkpoint_path), **options)


def test_an_absent_device(tiny_checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device"):
        load_model(str(tiny_checkpoint_path), device="cuda")


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, *free_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free_gib))
    index = lambda device: device.index if isinstance(device, torch.device) else device  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (int(free_gib[index(d)] * 2**30), 0))


def test_device_is_chosen_by_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    gib = 2**30
    pretend_gpus(monkeypatch, 10, 80, 80)

    def choose(device: str, n_gib: float) -> Placement:
        return choose_placement(device, "none", n_gib * gib, said.append)

    assert choose("auto", 4) == Placement(torch.device("cuda", 0))
    assert choose("auto", 18) == Placement(torch.device("cuda", 1))
    assert choose("cuda", 4) == Placement(torch.device("cuda", 0))
    with pytest.raises(DeviceError, match=r"cuda:0 has 10\.0 GiB free"):
        choose("cuda:0", 18)
    with pytest.raises(DeviceError, match="there is no cuda:7"):
        choose("cuda:7", 1)
    monkeypatch.setattr(placement, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match="needs accelerate") as refused:
        choose("auto", 120)
    assert "multi-gpu" in (refused.value.hint or "")
    monkeypatch.setattr(placement, "find_spec", lambda _: object())
    spread = choose("auto", 120)
    assert (spread.device, spread.spread) == (torch.device("cuda", 0), "auto")
    assert spread.max_memory == {0: 7 * gib, 1: 77 * gib, 2: 77 * gib, "cpu": 0}, "3 GiB of each to work in"
    with pytest.raises(DeviceError, match=r"170.0 GiB are free on all GPUs"):
        choose("auto", 1200)
    assert len(said) == 3


def test_a_device_map_leaves_the_rest_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    gib = 2**30
    for device, device_map, error, match in (
        ("cpu", "auto", UsageError, "contradict"),
        ("auto", "spread", UsageError, "unknown device map 'spread'"),
        ("auto", "auto", DeviceError, "none is usable here"),
    ):
        with pytest.raises(error, match=match):
            choose_placement(device, device_map, gib, said.append)
    pretend_gpus(monkeypatch, 24)
    monkeypatch.setattr(placement, "find_spec", lambda _: object())
    monkeypatch.setattr(placement, "host_memory_free", lambda: 100 * gib)
    chosen = choose_placement("auto", "auto", 60 * gib, said.append)
    assert chosen.max_memory == {0: 21 * gib, "cpu": 90 * gib}
    assert said == [
        "device: spread over 1 GPU (asked for), about 39.0 GiB of it in the host's memory, which is slow"
    ]
    with pytest.raises(DeviceError, match=r"21\.0 GiB on the GPUs .* and 90\.0 GiB in the host's memory"):
        choose_placement("auto", "auto", 120 * gib, said.append)
    with pytest.raises(
        DeviceError, match=r"room for 21\.0 GiB on the GPUs \(less 3\.0 GiB each to work in\)$"
    ):
        choose_placement("auto", "auto", 60 * gib, said.append, offload=False)
    assert choose_placement("auto", "auto", 20 * gib, said.append, offload=False).max_memory["cpu"] == 0


@pytest.mark.parametrize(
    ("asked", "device", "size", "stored", "chosen"),
    [
        ("auto", "cpu", 10**7, "BF16", torch.float32),
        ("auto", "cpu", 3 * 10**9, "BF16", torch.bfloat16),
        ("auto", "cuda", 10**7, "BF16", torch.bfloat16),
        ("auto", "cuda", 10**7, "F32", torch.bfloat16),
        ("auto", "cuda", 10**7, "F16", torch.float16),
        ("fp32", "cuda", 10**7, "BF16", torch.float32),
    ],
)
def test_dtype_is_chosen_with_a_reason(
    asked: str, device: str, size: int, stored: str, chosen: torch.dtype
) -> None:
    said: list[str] = []
    assert choose_dtype(asked, torch.device(device), size, stored, said.append) == chosen
    assert bool(said) == (asked == "auto")


# ---- random weights ---------------------------------------------------------------------------------------


def test_dummy_of_a_folder_with_nothing_but_a_config(tiny_checkpoint_path: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_checkpoint_path / "config.json", tmp_path)
    said: list[str] = []
    adapter = load_model(str(tmp_path), device="cpu", load_format="dummy", log=said.append)
    again = load_model(str(tmp_path), device="cpu", load_format="dummy")
    assert adapter.random_weights
    assert any("random weights" in line for line in said)
    assert torch.equal(logits(adapter), logits(again)), "the same noise each time"
    assert logits(adapter).isfinite().all()
    assert adapter.tokenizer.decode(adapter.prompt("née", adapter.media_shape()).input_ids).count("née") == 1
    assert len(adapter.eos_token_ids) == 2


def test_dummy_takes_a_folder_s_own_tokenizer(tiny_checkpoint_path: Path, tiny_adapter: Any) -> None:
    adapter = load_model(str(tiny_checkpoint_path), device="cpu", load_format="dummy")
    shape = adapter.media_shape(n_samples=32000)
    assert torch.equal(adapter.prompt("x", shape).input_ids, tiny_adapter.prompt("x", shape).input_ids)
    assert adapter.geometry == tiny_adapter.geometry


def test_dummy_of_an_unknown_name() -> None:
    refuse("acme/unknown", "no geometry is known", load_format="dummy")


def test_dummy_of_a_preset_has_its_geometry() -> None:
    """The config only: 7 billion parameters have no place in a test."""
    from seats_cli.model.dummy import _preset_config

    config = _preset_config("omni-7b")
    assert config.text_config.num_hidden_layers == 28
    assert config.vision_config.hidden_size == 1280
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize(
    ("device", "gib", "environment", "expected"),
    [
        ("auto", 24, {}, ["expandable_segments:True"]),
        ("cuda:1", 24, {}, ["expandable_segments:True"]),
        ("cpu", 24, {}, []),
        ("cuda:2", 24, {}, []),
        ("cuda", 80, {}, ["expandable_segments:True"]),
        ("cuda", 140, {}, []),
        ("cuda", 24, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, []),
        ("cuda", 24, {"PYTORCH_ALLOC_CONF": "backend:native"}, []),
    ],
)
def test_the_allocator_of_a_small_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, gib: int, environment: dict[str, str], expected: list[str]
) -> None:
    """What the user says of it stands."""
    asked: list[int] = []
    found: list[str] = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        return SimpleNamespace(total_memory=gib * 2**30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    save_gpu_memory(device, environment)
    assert found == expected
    assert asked == {"cpu": [], "cuda:1": [1], "cuda:2": []}.get(device, [0])


def test_loading_saves_gpu_memory(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(load, "save_gpu_memory", asked.append)
    load_model(str(tiny_checkpoint_path), device="cpu")
    assert asked == ["cpu"]
