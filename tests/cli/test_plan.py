"""`seats plan`: what it says is what happens, with neither weights nor a GPU."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from make_clips import pictures, tone, write_clip, write_picture
from seats_cli.cli.app import run
from seats_cli.errors import SeatsError
from seats_cli.lab import forecast
from seats_cli.session import AskOptions, ModelOptions, Session
from tiny_checkpoint import TinySpec

MakeCheckpoint = Callable[..., Path]
QUESTION = "What happens in this clip?"


@pytest.fixture(scope="module")
def model(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(TinySpec())


@pytest.fixture(scope="module")
def bare(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a weight."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "video with audio": write_clip(folder / "a.mp4", pictures(30 * 6), audio=tone(6.0)),
        "silent video": write_clip(folder / "b.mp4", pictures(30 * 4)),
        "audio": write_clip(folder / "c.m4a", audio=tone(3.0)),
        "picture": write_picture(folder / "d.png", pictures(1)[0], "png", "rgb24"),
    }


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert run(["plan", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["video with audio", "silent video", "audio", "picture"])
@pytest.mark.parametrize(("method", "ratio"), [("seats", 0.3), ("full", 1.0)])
def test_the_plan_is_what_the_answer_reports(
    kind: str, method: str, ratio: float, files: dict[str, Path], model: Path, bare: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = planned(
        capsys, str(files[kind]), "-m", str(bare), "--method", method, "--ratio", str(ratio),
        "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    session = Session(ModelOptions(str(model), device="cpu", dtype="float32"))
    report = session.ask(
        files[kind], QUESTION, AskOptions(method=method, ratio=ratio, max_new_tokens=1)
    ).report
    done = report.to_json()
    assert found["tokens"]["before"] == done["tokens"]["before"]
    assert found["tokens"]["per_layer"] == done["tokens"]["per_layer"]
    assert found["tokens"]["retention"] == pytest.approx(done["retention"]["reached"]["overall"])
    assert found["compute"]["kept_flops"] == done["compute"]["kept_flops"]
    assert found["compute"]["full_flops"] == done["compute"]["full_flops"]
    assert sum(found["compute"]["per_layer"]) < found["compute"]["kept_flops"]
    assert found["memory"]["kv_bytes"] == done["memory"]["kv_bytes"]
    assert found["memory"]["kv_bytes_full"] == done["memory"]["kv_bytes_full"]
    assert found["model"]["parameters"] == done["environment"]["parameters"]
    weights = sum(p.nbytes for p in session.adapter.network.parameters())
    buffers = sum(b.nbytes for b in session.adapter.network.buffers())
    assert found["model"]["weight_bytes"]["total"] == weights + buffers
    assert found["fits"] is True
    assert found["method"] == done["method"]


def test_a_known_model_needs_no_file_and_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("a download"))
    clip = ["--seconds", "64", "--size", "336x336", "-m", "omni-7b", "--dtype", "bfloat16"]
    found = planned(capsys, *clip, "--memory", "80", "--ratio", "0.1")
    assert found["model"]["parameters"] == 8931813888
    assert found["tokens"]["before"]["audio"] == 1600
    assert found["media"]["n_frames"] == 128
    assert found["devices"] == [
        {"name": "a device as asked", "kind": "cuda", "total": 80 * 2**30, "free": 80 * 2**30, "fits": True}
    ]
    assert found["memory"]["peak_bytes"] < 20 * 2**30
    # the paper's evaluation setting: 144 tokens a grid
    assert found["tokens"]["before"]["video"] == 64 * 144


def test_what_would_make_it_fit_does(capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--seconds", "600", "-m", "omni-7b", "--dtype", "bfloat16", "--memory", "24"]
    found = planned(capsys, *clip, "--method", "full", code=1)
    assert found["fits"] is False
    assert not found["context"]["fits"]
    options = [remedy["option"] for remedy in found["remedies"]]
    # Neither quantising nor more devices make the context longer.
    assert [option.split()[0] for option in options] == ["--method", "--max-frames", "--seconds"]
    for remedy in found["remedies"]:
        option = remedy["option"].split()
        method = [] if "--method" in option else ["--method", "full"]
        again = planned(capsys, *clip, *method, *option)
        assert again["fits"] is True, option
        assert again["memory"]["peak_bytes"] == pytest.approx(remedy["peak_bytes"], rel=1e-3), option


def test_a_number_of_frames_that_was_typed_is_what_is_lowered(capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--seconds", "100", "-m", "omni-7b", "--dtype", "bfloat16", "--memory", "19"]
    found = planned(capsys, *clip, "--frames", "4000", code=1)
    (fewer,) = [remedy["option"] for remedy in found["remedies"] if "frames" in remedy["option"]]
    assert fewer.startswith("--frames ")
    assert planned(capsys, *clip, *fewer.split())["fits"] is True


def test_what_is_too_long_for_the_model_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """As `ask` would refuse it, however much memory there is."""
    clip = ["--seconds", "600", "-m", "omni-7b", "--dtype", "bfloat16", "--memory", "1000"]
    found = planned(capsys, *clip, "--method", "full", code=1)
    assert (found["fits"], found["memory"]["fits"], found["context"]["fits"]) == (False, True, False)
    options = found["remedies"][0]["option"].split()
    assert options[:2] == ["--method", "seats"]
    again = planned(capsys, *clip, *options)
    assert again["fits"] is again["context"]["fits"] is True
    assert run(["plan", *clip, "--max-new-tokens", "40000"]) == 1
    out = capsys.readouterr().out
    assert "lower --ratio, --seconds, --frames or --max-new-tokens" in out
    assert "its memory fits on one device" in out


def test_a_smaller_device_takes_what_quantising_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--seconds", "60", "-m", "omni-7b", "--dtype", "bfloat16", "--memory", "12"]
    found = planned(capsys, *clip, code=1)
    options = [remedy["option"] for remedy in found["remedies"]]
    assert options[:1] == ["--quantize 4bit"], "no ratio shrinks weights"
    then = planned(capsys, *clip, "--quantize", "4bit")
    assert then["model"]["quantization"] == "4bit"
    weights, plain = then["model"]["weight_bytes"], found["model"]["weight_bytes"]
    assert weights["encoders"] == plain["encoders"]
    assert weights["decoder"] == pytest.approx(plain["decoder"] * 4.125 / 16, rel=0.01)


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--seconds", "60", "-m", "omni-7b", "--memory", "12", "--dtype", "bfloat16"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("omni-7b: 8.93 B parameters, bfloat16\na clip, 120 frames and 60.0 s of sound: ")
    assert "layers 24 to 28      0      0" in out
    assert "encoders at work (the largest counts)" in out
    assert "does not fit" in out
    assert "--quantize 4bit would make it fit: " in out
    assert run(["plan", "--seconds", "2", "--frames", "0", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "it fits on one device" in out
    assert "the host's memory" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "neither a file nor --seconds"),
        (["nothing.mp4"], "no such file: nothing.mp4"),
        (["--seconds", "5", "--start", "2"], "--start: of files, but none is given"),
        (["--seconds", "5", "-m", "nonsense"], "no such model: nonsense"),
        (["--seconds", "5", "--quantize", "3bit"], "'3bit' is not one of none, 8bit"),
        (["--seconds", "0.01", "--frames", "0"], "nothing to see or hear"),
        (["--seconds", "5", "--device-map", "auto", "--device", "cuda"], "no CUDA device"),
        (["--seconds", "5", "--memory", "24", "--device", "cpu"], "--memory and --device contradict"),
        (["--seconds", "5", "--frames", "10", "--fps", "2"], "--frames and --fps contradict"),
        (["--seconds", "5", "-m", ""], "the model's name is empty"),
        (["--seconds", "5", "-m", "omni-30b", "--method", "fastv"], "cannot be dropped after layer 2"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *arguments]) in (1, 2)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "device", "words"),
    [
        (False, "auto", "spreads a model over GPUs, and none is usable here"),
        (True, "cuda", "--device cuda and --device-map auto contradict each other"),
    ],
)
def test_a_device_map_is_refused_as_loading_would(
    gpus: bool, device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = forecast.Place("a GPU", "cuda" if gpus else "cpu", 2**40, 2**40)
    monkeypatch.setattr(forecast, "places_here", lambda *_: [place])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpus))
    with pytest.raises(SeatsError, match=words):
        forecast.Planner(ModelOptions("omni-7b", device=device, device_map="auto"))


def test_no_torch_before_the_words_are_checked() -> None:
    code = "import sys; from seats_cli.cli.app import run; run(['plan']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
