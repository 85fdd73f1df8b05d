"""On a CUDA device: the same words as on the CPU, on one GPU and spread over two."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seats_cli.demo.write import write_clip
from seats_cli.model.placement import Placement
from seats_cli.session import AskOptions, ModelOptions, Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = AskOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A clip of the toy world, and its questions."""
    path = tmp_path_factory.mktemp("gpu") / "clip.mp4"
    return path, write_clip(path, seed=5)["questions"]


@pytest.fixture(scope="module")
def on_cpu() -> Session:
    return Session(ModelOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_gpu(request: pytest.FixtureRequest) -> Session:
    return Session(ModelOptions(device="cuda", dtype=request.param))


@pytest.mark.parametrize(
    "options", [{}, {"method": "full"}, {"preset": "paper"}, {"settings": {"merge": "on"}}]
)
def test_one_gpu_says_what_the_cpu_says(
    clip: tuple[Path, list[dict[str, Any]]], on_cpu: Session, on_gpu: Session, options: dict[str, Any]
) -> None:
    """The same words; the same counts but for ties, which rounding on another device may break otherwise."""
    path, questions = clip
    asked = AskOptions(max_new_tokens=12, **options)
    same = 0
    for question in questions[:4]:
        ours = on_gpu.ask(path, question["question"], asked)
        theirs = on_cpu.ask(path, question["question"], asked)
        for mine, other in zip(ours.report.tokens.per_layer, theirs.report.tokens.per_layer, strict=True):
            assert abs(mine.video - other.video) + abs(mine.audio - other.audio) <= 8
        same += ours.text == theirs.text
    assert same == 4 if on_gpu.adapter.dtype == torch.float32 else same >= 3, same


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_spread_over_two_gpus_says_the_same(
    clip: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, questions = clip
    one = Session(ModelOptions(device="cuda:0", dtype="float32"))
    # Room for the encoders, which come first and are two fifths, and for some of the layers.
    some = int(0.75 * one.adapter.parameter_count * 4)
    everywhere = Placement(torch.device("cuda", 0), "sequential", {0: some, 1: 2**30})
    monkeypatch.setattr("seats_cli.model.load.choose_placement", lambda *_, **__: everywhere)
    two = Session(ModelOptions(dtype="float32"))
    devices = {two.adapter.layer_device(i).index for i in range(two.adapter.n_layers)}
    assert devices == {0, 1}
    for question in questions[:8]:
        assert (
            two.ask(path, question["question"], SHORT).text == one.ask(path, question["question"], SHORT).text
        )


def test_full_geometry_with_random_weights_runs_and_is_labelled(
    clip: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "seats_cli", "ask", "--json", "-m", "omni-7b", "--load-format", "dummy"]
    ran = subprocess.run(
        [*command, "--max-new-tokens", "4", str(clip[0]), "what is said?"],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(ran.stdout)
    assert document["environment"]["random_weights"] is True
    assert document["environment"]["device"].startswith("cuda")
    assert document["tokens"]["before"]["video"] == 16 * 144
    assert document["retention"]["reached"]["overall"] == pytest.approx(0.1, abs=0.005)
    assert "random" in ran.stderr


def test_running_out_of_gpu_memory_is_an_error_and_nothing_leaks(
    clip: tuple[Path, list[dict[str, Any]]], hoard: Callable[[], list[torch.Tensor]]
) -> None:
    from seats_cli.errors import DeviceError

    session = Session(ModelOptions(device="cuda"))
    session.ask(clip[0], "what is said?", SHORT)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    held = hoard()
    with pytest.raises(DeviceError, match="out of memory") as raised:
        session.ask(clip[0], "what is said?", SHORT)
    assert "--max-frames" in str(raised.value.hint)
    held.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert session.ask(clip[0], "what is said?", SHORT).text


@pytest.fixture
def hoard() -> Callable[[], list[torch.Tensor]]:
    """Takes all but a few MiB of the GPU."""

    def take() -> list[torch.Tensor]:
        held = []
        size = 2**30
        while size >= 2**20:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        return held

    return take
