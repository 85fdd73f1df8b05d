"""`seats calibrate`: what may be typed, a search on a tiny checkpoint, and what stops one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lab.tracing import document
from make_clips import pictures, tone, write_clip
from seats_cli.cli.calibrate_run import check_same_model
from seats_cli.cli.loading import ended_like_ctrl_c
from seats_cli.errors import SeatsError, UsageError
from seats_cli.lab import trials
from seats_cli.lab.sweep import Described, weights_fingerprint
from seats_cli.presets import load_preset
from seats_cli.session import Session

from .conftest import Run

N_LAYERS = 6
CURVE = [0.1, 0.2, 0.5, 0.9, 0.9, 0.9]


def full_trace(**model: Any) -> dict[str, Any]:
    """A trace with all curves, of a checkpoint like the tiny random one."""
    found = document(CURVE, options={"preset": None, "fps": 2.0})
    numbers = {key: found["full"][key] for key in ("accuracy", "agreement", "probability", "n")}
    found["choice"] = [
        {"kind": "both", "after_layer": after, "keep": keep, **numbers}
        for after in range(1, N_LAYERS)
        for keep in (0.1, 0.5)
    ]
    found["entry"] = [
        {"kind": kind, "entry": enters, **numbers} for kind in ("video", "audio") for enters in (0.1, 0.5)
    ]
    by_rule = f"by rule for {N_LAYERS} layers"
    found["model"] |= {"layers": N_LAYERS, "hidden_size": 64, "preset": by_rule, **model}
    return found


@pytest.fixture
def trace(tmp_path: Path, tiny_checkpoint_path: Path) -> Path:
    """A trace that says it is of the tiny random checkpoint."""
    path, name = tmp_path / "t.json", str(tiny_checkpoint_path)
    path.write_text(json.dumps(full_trace(name=name, weights=weights_fingerprint(name), merge=True)))
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two questions about a clip of two seconds; any answer is wrong."""
    write_clip(tmp_path / "a.mp4", pictures(20, 84, 84), fps=10, audio=tone(2.0))
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(
            json.dumps({"media": "a.mp4", "question": question, "answer": "no such words"}) + "\n"
            for question in ("what is said?", "what is the")
        )
    )
    return path


@pytest.fixture
def options(tiny_checkpoint_path: Path) -> list[Any]:
    model = ["--model", tiny_checkpoint_path, "--workers", "1", "--dtype", "float32"]
    return [*model, "--max-new-tokens", "2", "--first", "2", "--rounds", "0"]


WRONG = [
    (["none.json", "p.yaml"], "cannot read the trace none.json"),
    (["m.jsonl", "p.yaml"], "m.jsonl is no trace"),
    (["t.json", "none/p.yaml"], "cannot write none/p.yaml"),
    (["t.json", "."], "cannot write ."),
    (["t.json", "p.yaml", "--set", "schedule=paper"], "the schedule is what is searched for"),
    (["t.json", "p.yaml", "--set", "tau=0"], "tau=0: not accepted"),
    (["t.json", "p.yaml", "--preset", "nope"], "no preset 'nope'"),
    (["t.json", "p.yaml", "--preset", "tiny"], "preset tiny is made for 14 layers"),
    (["t.json", "p.yaml", "--ratio", "1,0.1"], "a ratio of 1 keeps everything"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    run: Run, trace: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace.parent)
    monkeypatch.setattr(Session, "__init__", None)
    (trace.parent / "m.jsonl").write_text('{"media": "a.mp4", "question": "why?"}\n')
    result = run("calibrate", *arguments)
    assert result.exit_code == 2, result.stderr
    assert words in " ".join(result.stderr.split()).replace("Invalid value for ", "")
    assert not (trace.parent / "p.yaml").exists()


def test_a_search_writes_a_preset_that_answers(
    run: Run, trace: Path, manifest: Path, options: list[Any], tmp_path: Path
) -> None:
    target = tmp_path / "p.yaml"
    arguments = [*options, "--ratio", "0.3,0.5", "--fps", "1", "--set", "merge=off", "--json"]
    result = run("calibrate", trace, target, manifest, *arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["ratio"] for row in found["rows"]] == [0.5, 0.3]
    assert all(trial["measured"] == 0.0 for trial in found["trials"])
    assert "made with merge=on, plans run with off" in result.stderr
    assert "made with --fps 2, plans run with 1" in result.stderr
    made = load_preset(target)
    assert [row.ratio for row in made.calibrated] == [0.3, 0.5]
    assert "plans on 2 questions, 1 clips" in made.provenance["calibrated"]
    assert made.options == {"merge": "off"}  # as measured, so as used
    model = ["--model", options[1], "--dtype", "float32", "--max-new-tokens", "2"]
    asked = run("ask", tmp_path / "a.mp4", "why?", "--preset", target, "--ratio", "0.3", "--json", *model)
    assert asked.exit_code == 0, asked.stderr
    assert json.loads(asked.stdout)["method"]["late_layer"] == made.calibrated[0].late_layer


def test_a_trace_of_another_model_is_refused(
    run: Run, trace: Path, manifest: Path, options: list[Any], tmp_path: Path
) -> None:
    other = json.loads(trace.read_text())
    other["model"] |= {"name": "another", "weights": "0123456789abcdef"}
    trace.write_text(json.dumps(other))
    result = run("calibrate", trace, tmp_path / "p.yaml", manifest, *options, "--ratio", "0.3")
    assert result.exit_code == 2
    assert f"the trace is of another, and not of {options[1]}" in " ".join(result.stderr.split())
    assert not (tmp_path / "p.yaml").exists()


def test_checkpoints_of_the_hub_are_told_apart_by_id_and_revision() -> None:
    traced = {**full_trace(name="a/small", weights=None), "environment": {"revision": "r1"}}
    model = {"model": "a/small", "family": "qwen2_5_omni", "weights": None, "revision": "r1"}
    check_same_model(traced, Described(model, {}, ()))
    for change in ({"model": "a/large"}, {"revision": "r2"}, {"family": "qwen3_omni_moe"}):
        with pytest.raises(UsageError, match="the trace is of a/small"):
            check_same_model(traced, Described({**model, **change}, {}, ()))


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (SeatsError("the clip is gone"), 1)],
    ids=["ctrl-c", "failure"],
)
def test_what_stops_a_search_loses_no_ratio_that_is_done(
    run: Run,
    trace: Path,
    manifest: Path,
    options: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def measured(self: trials.Trials, rows: Any) -> list[float]:
        if rows[0].ratio < 0.4:
            raise error
        return [0.5] * len(rows)

    monkeypatch.setattr(trials.Trials, "__call__", measured)
    target = tmp_path / "p.yaml"
    result = run("calibrate", trace, target, manifest, *options, "--ratio", "0.5,0.3")
    assert result.exit_code == code, result.stderr
    assert "stopped early: 1 of 2 ratios are in" in result.stderr
    assert [row.ratio for row in load_preset(target).calibrated] == [0.5]
    target.unlink()
    alone = run("calibrate", trace, target, manifest, *options, "--ratio", "0.3")
    assert alone.exit_code == code
    assert not target.exists()


def test_a_second_run_takes_the_ratios_of_the_first_from_its_file(
    run: Run,
    trace: Path,
    manifest: Path,
    options: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[float] = []

    def measured(self: trials.Trials, rows: Any) -> list[float]:
        searched.append(rows[0].ratio)
        if rows[0].ratio < 0.4 and len(searched) == 2:
            raise KeyboardInterrupt
        return [0.5] * len(rows)

    monkeypatch.setattr(trials.Trials, "__call__", measured)
    target, output = tmp_path / "p.yaml", tmp_path / "found.jsonl"
    once = ["calibrate", trace, target, manifest, *options, "-o", output, "--json"]
    first = run(*once, "--ratio", "0.5,0.3")
    assert first.exit_code == 130, first.stderr
    assert "the same command goes on from there" in first.stderr
    assert len(output.read_text().splitlines()) == 1
    second = run(*once, "--ratio", "0.5,0.3")
    assert second.exit_code == 0, second.stderr
    assert "ratio 0.5: " in second.stderr
    assert "has it already" in second.stderr
    assert searched == [0.5, 0.3, 0.3]
    assert json.loads(second.stdout)["rows"][0] == json.loads(first.stdout)["rows"][0]
    assert [row.ratio for row in load_preset(target).calibrated] == [0.3, 0.5]

    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("loaded again"))
    written = target.read_text()
    assert run(*once, "--ratio", "0.5,0.3").exit_code == 0
    assert target.read_text() == written
    monkeypatch.undo()
    line = json.loads(output.read_text().splitlines()[0])
    output.write_text(json.dumps({**line, "trials": line["trials"][:-5]}) + "\n")
    damaged = run(*once, "--ratio", "0.5,0.3")
    assert damaged.exit_code == 2
    assert f"{output}: line 1 is a damaged record" in " ".join(damaged.stderr.split())


def test_sigterm_is_ctrl_c_inside_a_run_and_itself_again_behind_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_like_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_sigterm_leaves_no_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    traced = full_trace(weights=weights_fingerprint("tiny"), merge=True)
    traced["model"] |= {"layers": N_LAYERS}
    (tmp_path / "t.json").write_text(json.dumps(traced))
    command = [sys.executable, "-m", "seats_cli", "calibrate", tmp_path / "t.json", tmp_path / "p.yaml"]
    process = subprocess.Popen(
        [*command, "--clips", "50", "--workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "TMPDIR": str(tmp_path / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"),
        },
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "tmp").glob("seats-trials-*/*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_file_that_fails_is_told(
    run: Run, trace: Path, manifest: Path, options: list[Any], tmp_path: Path
) -> None:
    lines = manifest.read_text()
    unanswered = json.dumps({"media": "none.mp4", "question": "why?"}) + "\n"
    manifest.write_text(lines + unanswered)  # full tokens are to say what is right: they cannot
    result = run("calibrate", trace, tmp_path / "p.yaml", manifest, *options, "--ratio", "0.3")
    assert result.exit_code == 1
    assert "none.mp4: no such file" in " ".join(result.stderr.split())
    assert load_preset(tmp_path / "p.yaml").calibrated
    answered = json.dumps({"media": "none.mp4", "question": "why?", "answer": "so"}) + "\n"
    manifest.write_text(lines + answered)
    (tmp_path / "p.yaml").unlink()
    result = run("calibrate", trace, tmp_path / "p.yaml", manifest, *options, "--ratio", "0.3")
    assert result.exit_code == 1
    assert "no such file" in result.stderr
    assert not (tmp_path / "p.yaml").exists()
