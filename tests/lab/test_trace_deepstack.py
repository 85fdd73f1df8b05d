"""A trace of a family whose vision encoder adds to the first layers: its short cuts change nothing there."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.test_trace import OPTIONS, TRACING, Cutting, _kept, asked_from_the_start
from seats_cli.lab import reading as readings
from seats_cli.lab import trace
from seats_cli.lab.reading import Reading, read_with_answer
from seats_cli.lab.sweep import ClipTask
from seats_cli.session import ModelOptions, Session


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def session(qwen3_path: Path) -> Session:
    return Session(ModelOptions(model=str(qwen3_path), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def reading(session: Session, tasks: list[ClipTask]) -> Reading:
    sample = tasks[0].samples[0]
    with torch.inference_mode():
        return read_with_answer(session, session.read(sample.media, OPTIONS), sample, OPTIONS)[0]


@pytest.mark.parametrize("kind", ["video", "audio", "both"])
def test_removal_equals_the_same_removal_from_the_start(
    session: Session, reading: Reading, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reading.deepstack is not None
    assert reading.deepstack.shape[1] == len(reading.layout)
    rows: list[torch.Tensor] = []
    original = readings.answer_logits
    monkeypatch.setattr(readings, "answer_logits", lambda *given: rows.append(original(*given)) or rows[-1])
    full = trace.after_cut(reading, 6, torch.arange(len(reading.layout)), reading.layout.counts)
    removable = replace(TRACING, layers=(1, 2, 3, 5))
    points = [point for point, _ in trace.removal(reading, full, removable) if point["layer"] < 7]
    for point, logits in zip(points, rows[1:], strict=True):
        if point["kind"] != kind or point["layer"] == 2:  # a method may not cut after layer 1, a trace may
            continue
        method = Cutting(point["layer"] - 1, _kept(reading, kind))
        torch.testing.assert_close(logits, asked_from_the_start(session, reading, method), atol=1e-4, rtol=0)


def test_entry_equals_the_same_entry_from_the_start(session: Session, reading: Reading) -> None:
    """Every token enters: what is left is the answer with all tokens."""
    points = list(trace.entry(reading, replace(TRACING, entries=(1.0, 0.2))))
    full = trace.after_cut(reading, 6, torch.arange(len(reading.layout)), reading.layout.counts)
    for point, outcome in points:
        same = outcome.log_likelihood == pytest.approx(full.log_likelihood, abs=1e-5)
        assert same == (point["entry"] == 1.0), point
