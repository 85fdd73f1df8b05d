"""Weights go from their files to their device, the same bits as by `from_pretrained`, and once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from seats_cli.errors import DeviceError, ModelError
from seats_cli.model import weights
from seats_cli.model.checkpoint import locate, thinker_weights
from seats_cli.model.families import family_of
from seats_cli.model.load import load_model, read_thinker_config
from tiny_checkpoint import TinySpec, build_tiny_checkpoint

MakeCheckpoint = Callable[..., Path]


def by_from_pretrained(path: Path, dtype: torch.dtype) -> Any:
    """The same checkpoint through transformers' public door, on the CPU, where it asks for no accelerate."""
    checkpoint = locate(str(path), revision=None, offline=True, log=lambda _: None)
    config = read_thinker_config(checkpoint)
    family = family_of(config)
    with ExitStack() as files, weights.quiet_transformers():
        return family.network_class().from_pretrained(
            None,
            config=config,
            state_dict=weights.lazy_tensors(thinker_weights(checkpoint, lambda _: None), files),
            dtype=dtype,
            attn_implementation="sdpa",
            **family.loading,
        )


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_weight_and_buffer_is_from_pretrained_s(
    family: str, dtype: torch.dtype, stored: torch.dtype, make_checkpoint: MakeCheckpoint
) -> None:
    """Qwen3-Omni's files have a tensor an expert, its modules one of all experts."""
    path = make_checkpoint(TinySpec(family=family, dtype=stored))
    ours = load_model(str(path), device="cpu", dtype=str(dtype).removeprefix("torch."), fuse=False).network
    theirs = by_from_pretrained(path, dtype)
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(one, kind)()) for one in (ours, theirs))
        assert list(found) == list(expected)
        assert found
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].device == torch.device("cpu"), name
            assert torch.equal(found[name], tensor), name
    assert {**ours.config.to_dict(), "_name_or_path": ""} == {**theirs.config.to_dict(), "_name_or_path": ""}
    assert not ours.training


def test_it_does_not_ask_for_accelerate(tiny_checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("from_pretrained was called")

    monkeypatch.setattr(Qwen2_5OmniThinkerForConditionalGeneration, "from_pretrained", refuse)
    assert load_model(str(tiny_checkpoint_path), device="cpu").parameter_count > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_straight_to_a_gpu(tiny_checkpoint_path: Path) -> None:
    network = load_model(str(tiny_checkpoint_path), device="cuda", dtype="bfloat16", fuse=False).network
    theirs = by_from_pretrained(tiny_checkpoint_path, torch.bfloat16)
    found = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}.items():
        assert found[name].is_cuda, name
        assert torch.equal(found[name].cpu(), tensor), name


MEASURE = """
import sys, threading
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration  # imported before the count begins
from seats_cli.model.load import load_model

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024

before, peak, done = resident()[0], 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident()[0])
watcher = threading.Thread(target=watch)
watcher.start()
adapter = load_model(sys.argv[1], device="cpu", dtype="bfloat16", fuse=False)
done.set(); watcher.join()
size = sum(p.numel() * p.element_size() for p in adapter.network.parameters())
print(size, peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_the_host_never_holds_the_weights_twice(tmp_path: Path) -> None:
    """A checkpoint of 300 MB: memory of the process's own, beside the mapped files, grows by one copy."""
    path = build_tiny_checkpoint(tmp_path / "model", TinySpec(layout="thinker", sharded=False))
    config = json.loads((path / "config.json").read_text())
    width, hidden = 1 << 16, config["text_config"]["hidden_size"]
    config["text_config"]["intermediate_size"] = width
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if ".mlp." in name and name.startswith("model.layers")]:
        tensors[name] = torch.ones((hidden, width) if "down_proj" in name else (width, hidden))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    del tensors
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    size, grown = map(int, ran.stdout.split())
    assert size > 1.5e8
    assert grown < 1.35 * size + 3e7, (size, grown)  # float32 files, so that every weight is converted


# ---- what can be wrong ------------------------------------------------------------------------------------


@pytest.fixture
def broken(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint(TinySpec()), tmp_path / "copy"))


def test_a_shard_that_was_cut_off_is_named(broken: Path) -> None:
    shard = broken / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model-00002-of-00004\.safetensors is not a readable") as raised:
        load_model(str(broken), device="cpu")
    assert "again" in (raised.value.hint or "")


def test_a_shard_that_lacks_what_the_index_promises_is_named(broken: Path) -> None:
    shutil.copy(broken / "model-00001-of-00004.safetensors", broken / "model-00002-of-00004.safetensors")
    with pytest.raises(ModelError, match=r"model-00002-of-00004\.safetensors lacks thinker\."):
        load_model(str(broken), device="cpu")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceError),
        (MemoryError(), DeviceError),
        (ImportError("needs gptqmodel"), ModelError),
        (ValueError("strange"), ModelError),
    ],
)
def test_what_transformers_raises_is_told(
    error: Exception, kind: type[Exception], tiny_checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(weights, "_straight", fail)
    with pytest.raises(kind, match=str(error) or "out of memory"):
        load_model(str(tiny_checkpoint_path), device="cpu")


def test_memory_that_runs_out_inside_the_loader_is_told(
    tiny_checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers notes what goes wrong with a weight and goes on; the note is not one of a damaged file."""
    from transformers import core_model_loading

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(core_model_loading, "_materialize_copy", full)
    with pytest.raises(DeviceError, match="out of memory while loading"):
        load_model(str(tiny_checkpoint_path), device="cpu")


@pytest.mark.parametrize(
    ("noted", "kind", "match"),
    [
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nError: MergeModulelist", DeviceError,
         "out of memory while loading .*CUDA out of memory"),
        ("Traceback ...\nRuntimeError: sizes differ\nError: Concatenate on tensors", ModelError,
         "loading .* failed: model.x.weight: Error: Concatenate on tensors$"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_conversion_is_told(
    noted: str,
    kind: type[Exception],
    match: str,
    tiny_checkpoint_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Qwen2_5OmniThinkerForConditionalGeneration._load_pretrained_model

    def load(*arguments: Any) -> Any:
        found, index = real(*arguments)
        found.conversion_errors["model.x.weight"] = noted
        return found, index

    monkeypatch.setattr(
        Qwen2_5OmniThinkerForConditionalGeneration, "_load_pretrained_model", staticmethod(load)
    )
    with pytest.raises(kind, match=match):
        load_model(str(tiny_checkpoint_path), device="cpu")
