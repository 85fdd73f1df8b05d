"""Quantised and offloaded loading where it is meant for: on a CUDA device. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seats_cli.demo.write import write_clip
from seats_cli.model.placement import Placement
from seats_cli.model.quantize import SCHEMES
from seats_cli.session import AskOptions, ModelOptions, Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = AskOptions(max_new_tokens=16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A clip of the toy world, and its questions."""
    path = tmp_path_factory.mktemp("gpu") / "clip.mp4"
    return path, write_clip(path, seed=1)["questions"]


@pytest.fixture(scope="module")
def plain() -> Session:
    return Session(ModelOptions(device="cuda", dtype="bfloat16"))


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_embedded_model_answers_in_fewer_bits(name: str, clip: Any, plain: Session) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip(SCHEMES[name].package)
    path, questions = clip
    quantised = Session(ModelOptions(device="cuda", dtype="bfloat16", quantize=name))
    assert "decoder: the weights are quantised" in quantised.adapter.notes[-1]
    same = 0
    for question in questions[:6]:
        ours, expected = (one.ask(path, question["question"], SHORT) for one in (quantised, plain))
        assert ours.report.tokens.per_layer == expected.report.tokens.per_layer
        same += ours.text == expected.text
    assert same >= 3, f"{name}: {same} of 6 answers as in bfloat16"


def test_weights_that_wait_on_the_host(clip: Any, plain: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    path, questions = clip
    room = plain.adapter.parameter_count  # bytes: half of the weights in bfloat16
    placed = Placement(torch.device("cuda", 0), "sequential", {0: room, "cpu": 2**32})
    monkeypatch.setattr("seats_cli.model.load.choose_placement", lambda *_, **__: placed)
    offloaded = Session(ModelOptions(dtype="bfloat16", device_map="auto"))
    assert "weights are offloaded" in offloaded.adapter.notes[-1]
    assert offloaded.adapter.device.type == "cuda"
    for question in questions[:2]:
        assert offloaded.ask(path, question["question"], SHORT).text
