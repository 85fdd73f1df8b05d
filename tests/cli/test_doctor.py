"""`seats doctor`: it sees what is there and says what is missing."""

import json
import struct
from pathlib import Path

import pytest

from cli.conftest import Run
from seats_cli.cli import doctor
from seats_cli.cli.doctor import Finding


def checkpoint(folder: Path, model_type: str, tensors: dict[str, int], *, weights: bool = True) -> Path:
    """A folder like a checkpoint, whose safetensors file has a true header and no data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text("{}")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    if weights:
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_is_examined(run: Run) -> None:
    result = run("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    for name in ("python", "torch", "transformers", "av", "librosa", "cpu", "decode H.264", "decode AAC"):
        assert findings[name]["state"] in ("ok", "untested"), findings[name]
    essential = [f for f in findings.values() if f["state"] == "broken"]
    assert result.exit_code == (1 if essential else 0)


def test_the_plain_report_has_every_topic(run: Run) -> None:
    lines = run("doctor").stdout.splitlines()
    topics = [line for line in lines if not line.startswith(" ")]
    assert topics == ["versions", "devices", "memory", "codecs", "models", "what works"]


def test_checkpoints_are_found_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub = tmp_path / "hub"
    sizes = {"thinker.model.a": 3 * 2**20, "talker.b": 2**30}
    checkpoint(hub / "models--Qwen--Qwen2.5-Omni-3B" / "snapshots" / "abc", "qwen2_5_omni", sizes)
    checkpoint(hub / "models--me--half" / "snapshots" / "def", "qwen3_omni_moe", {}, weights=False)
    checkpoint(hub / "models--other--llama" / "snapshots" / "123", "llama", {"a": 2})
    found = by_name(list(doctor.examine_models()))
    assert found["Qwen/Qwen2.5-Omni-3B"].state == "ok"
    assert "3.0 MiB to load, revision abc" in found["Qwen/Qwen2.5-Omni-3B"].value  # the talker is not loaded
    assert found["me/half"].state == "missing"
    assert "model.safetensors" in found["me/half"].value
    assert "other/llama" not in found
    assert "Qwen-Omni" not in found


def test_an_empty_cache_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    found = by_name(list(doctor.examine_models()))
    assert found["Qwen-Omni"] == Finding(
        "models", "Qwen-Omni", "missing", f"no checkpoint in {tmp_path / 'none'}"
    )


def test_a_package_that_does_not_load_is_fatal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "soundfile", "no_such_module_anywhere")
    result = run("doctor", "--json")
    findings = by_name([Finding(**f) for f in json.loads(result.stdout)["findings"]])
    assert result.exit_code == 1
    assert findings["soundfile"].state == "broken"
    assert "soundfile" in findings["seats ask"].value


def test_a_version_outside_the_range_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr(doctor, "required_ranges", lambda: {"numpy": SpecifierSet("<1")})
    found = by_name(list(doctor.examine_packages()))
    assert found["numpy"].state == "untested"
    assert "<1" in found["numpy"].value


@pytest.mark.parametrize(
    ("hidden", "driver", "torch_cuda", "expected"),
    [
        ("", True, "12.8", "hidden by CUDA_VISIBLE_DEVICES"),
        (None, False, "12.8", "no NVIDIA driver"),
        (None, True, None, "built for CPUs"),
        (None, True, "12.8", "too old"),
    ],
)
def test_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, hidden: str | None, driver: bool, torch_cuda: str | None, expected: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/bin/nvidia-smi" if driver else None)
    assert expected in doctor.why_no_cuda(torch_cuda)


def test_whether_the_gpu_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seats_cli.media.nvdec.why_not", lambda gpu: "it is broken")
    found = by_name(list(doctor.examine_codecs()))["decode on GPU 0"]
    assert (found.state, found.value) == ("missing", "it is broken")
    monkeypatch.setattr("seats_cli.media.nvdec.why_not", lambda gpu: None)
    found = by_name(list(doctor.examine_codecs()))["decode on GPU 0"]
    assert (found.state, found.value) == ("ok", "--hwaccel cuda: h264, hevc, vp8, vp9")


def test_a_codec_that_is_not_there() -> None:
    from av.codec import Codec

    assert doctor.has_codec(Codec, "h264", "r")
    assert not doctor.has_codec(Codec, "no_such_codec", "r")


def test_a_gpu_without_a_checkpoint_and_the_reverse() -> None:
    gpu = Finding("devices", "cuda:0", "ok", "H200")
    model = Finding("models", "Qwen/Qwen2.5-Omni-3B", "ok", "9 GiB")
    for findings, state in (([gpu], "missing"), ([model], "missing"), ([gpu, model], "ok")):
        assert by_name(list(doctor.conclusions(findings)))["seats ask, Qwen-Omni"].state == state


def test_options_that_need_more_are_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "torchao" else object())
    said = {finding.name: finding for finding in doctor.conclusions([])}
    assert said["--device-map"].state == "ok"
    assert said["--quantize int8, int4, fp8"].state == "missing"
    assert said["--quantize int8, int4, fp8"].value == 'pip install "seats-cli[torchao]"'
