"""`seats eval`: what may be typed, the document, resuming, and what goes wrong on the way."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from make_clips import pictures, tone, write_clip
from processor_time import is_instant
from seats_cli.cli import eval as command
from seats_cli.cli import suite_options
from seats_cli.lab import convert, suite
from seats_cli.session import Session

from .conftest import Run

SEATS = [sys.executable, "-m", "seats_cli"]
HEAVY = {"torch", "transformers", "av", "librosa", "soundfile", "numpy", "scipy"}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two clips of two seconds."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name, pictures(20, 84, 84), fps=10, audio=tone(2.0))
    return folder


@pytest.fixture
def manifest(media: Path, tmp_path: Path) -> Path:
    """Two questions about each clip, of two families."""
    lines = [
        {"media": str(media / name), "question": question, "answer": "so", "family": family}
        for name in ("a.mp4", "b.mp4")
        for question, family in (("what is said?", "transcription"), ("what is the", "other"))
    ]
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def options(tiny_checkpoint_path: Path) -> list[Any]:
    """The tiny random checkpoint in this process, short answers."""
    return ["--model", tiny_checkpoint_path, "--workers", "1", "--max-new-tokens", "3", "--dtype", "float32"]


# ---- what may be typed ------------------------------------------------------------------------------------

WRONG = [
    (["--methods", "seats,foo"], "--methods: 'foo' is not one of seats, full"),
    (["--methods", ","], "--methods: ',' is an empty list"),
    (["--ratio", "0"], "--ratio: 0 is out of range; accepted: a number above 0 and at most 1"),
    (["--ratio", "0.1,nan"], "--ratio: nan is out of range"),
    (["--ratio", "0.1,x"], "--ratio: 'x' is not a number"),
    (["--vary", "merge"], "--vary: 'merge' is not KEY=VALUE,VALUE"),
    (["--vary", "merge=on", "--vary", "merge=off"], "--vary: merge comes twice"),
    (["--vary", "merge=on,maybe"], "merge=maybe: not accepted"),
    (["--vary", "preset=nope"], "no preset 'nope'"),
    (["--vary", "merge=on,off", "--set", "merge=on"], "merge is both fixed and varied"),
    (["--preset", "nope"], "no preset 'nope'"),
    (["--set", "tau=0"], "tau=0: not accepted"),
    (["--schedule", "paper", "--set", "schedule=calibrated"], "--schedule paper and --set schedule=calib"),
    (["--foo\x1b[31m"], r"--foo\x1b[31m"),
    (["--against", "fixed"], "--against fixed is not among the methods"),
    (["--json", "--csv"], "choose one"),
    (["--seconds", "8.3"], "--seconds: 8.3 is no multiple of 0.5"),
    (["--split", "train"], "'train' is not one of dev, test, ood"),
    (["--clips", "0"], "accepted: a whole number at least 1"),
    (["--workers", "0"], "accepted: a whole number at least 1"),
    (["none.jsonl"], "cannot read the manifest none.jsonl"),
    (["empty.jsonl"], "empty.jsonl holds no samples"),
    (["bad.jsonl"], "bad.jsonl:2: not JSON"),
    (["good.jsonl", "--clips", "3"], "--clips: of the built-in suite, but a manifest was given"),
    (["-o", "."], "is a folder"),
    (["-o", "none/out.jsonl"], "there is no folder none"),
    (["-o", "good.jsonl"], "good.jsonl: line 1 is no record of seats eval"),
    (["--convert", "videomme"], "needs the benchmark's annotation file"),
    (["--media-dir", "."], "--media-dir goes with --convert"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"media": "a.mp4", "question": "why?", "answer": "so"}\n'
    (tmp_path / "good.jsonl").write_text(line)
    (tmp_path / "bad.jsonl").write_text(f"{line}{{bad\n")
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seats_cli.lab.sweep.suite_tasks", lambda *_: pytest.fail("too late"))
    done = run("eval", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert (tmp_path / "good.jsonl").read_text() == line


def test_help_and_wrong_usage_are_instant_and_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{bad\n")
    for arguments in (["--help"], ["--ratio", "2"], ["--vary", "merge=maybe"], [str(tmp_path / "bad.jsonl")]):
        program = (
            "import sys\nfrom seats_cli.cli.app import run\n"
            f"run(['eval', *{arguments!r}])\n"
            f"heavy = {HEAVY!r} & set(sys.modules)\nsys.exit(f'imported {{heavy}}' if heavy else 0)\n"
        )
        assert is_instant([sys.executable, "-c", program])


def test_the_names_that_are_accepted_are_the_lab_s() -> None:
    assert suite.SPLITS == suite_options.SPLITS
    assert tuple(convert.BENCHMARKS) == command.BENCHMARKS


def test_lists_keep_their_order_and_each_item_once() -> None:
    assert command.names(" seats, full,seats,") == ["seats", "full"]
    assert command.numbers("0.35,0.1, 0.350") == [0.35, 0.1]
    assert command.variations(["merge=on, off,on", " preset =a=b"]) == {
        "merge": ["on", "off"],
        "preset": ["a=b"],
    }


# ---- the run ----------------------------------------------------------------------------------------------


def test_json_has_a_row_a_setting_with_all_that_was_measured(
    run: Run, manifest: Path, options: list[Any]
) -> None:
    arguments = [
        "--methods",
        "seats,fixed",
        "--ratio",
        "0.5,0.5",
        "--against",
        "fixed",
        "--vary",
        "merge=off,on",
    ]
    done = run("eval", manifest, *options, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["complete"] is True
    assert document["environment"]["workers"] == 1
    assert document["options"]["ratios"] == [0.5]
    assert document["options"]["max_new_tokens"] == 3
    rows = [(row["method"], row["ratio"], row["settings"]) for row in document["rows"]]
    assert rows == [
        ("full", 1.0, {}),
        ("seats", 0.5, {"merge": "off"}),
        ("seats", 0.5, {"merge": "on"}),
        ("fixed", 0.5, {"merge": "off"}),
        ("fixed", 0.5, {"merge": "on"}),
    ]
    for row in document["rows"]:
        assert (row["n"], row["clips"], row["failed"], row["error"]) == (4, 2, 0, None)
        assert set(row["families"]) == {"transcription", "other"}
        assert row["wer"] >= 0
        assert len(row["right"]) == len(document["samples"]) == 4
        assert row["overall"] == row["right"].count("1") / 4
    assert document["rows"][0]["retention"] == 1.0
    assert document["rows"][1]["retention"] == pytest.approx(0.5, abs=0.03)
    resolved = [document["resolved"][row["resolved"]] for row in document["rows"]]
    assert [came_to.get("options", {}).get("merge") for came_to in resolved] == [
        None,
        False,
        True,
        False,
        True,
    ]
    assert [row["against"] and row["against"]["method"] for row in document["rows"]] == [
        None,
        "fixed",
        "fixed",
        None,
        "fixed",
    ]


def test_a_gpu_that_cannot_decode_is_told_once(
    run: Run, manifest: Path, options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seats_cli.media.nvdec.why_not", lambda gpu: "it is broken")
    done = run("eval", manifest, *options, "--methods", "full", "--csv", env={"SEATS_HWACCEL": "cuda"})
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("--hwaccel cuda: video is decoded on the CPU: it is broken") == 1
    assert done.stderr.count("decoded") == 1


def test_what_the_file_has_is_not_run_again(
    run: Run, manifest: Path, options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    once = ["eval", manifest, *options, "--ratio", "0.5", "-o", out]
    first = run(*once, "--csv")
    assert first.exit_code == 0, first.stderr
    lines = out.read_text().splitlines()
    assert len(lines) == 8
    record = json.loads(lines[0])
    assert {"key", "id", "clip", "answer", "correct", "retention", "prefill_s", "error"} <= set(record)

    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("loaded again"))
    second = run(*once, "--csv")
    assert (second.exit_code, second.stdout) == (0, first.stdout)
    assert "has 8 of 8 answers already" in second.stderr
    elsewhere = run(*once, "--csv", "--hwaccel", "cuda")  # where video is decoded changes no answer
    assert (elsewhere.exit_code, elsewhere.stdout) == (0, first.stdout)
    assert out.read_text().splitlines() == lines

    for damage in ({"retention": "high"}, {"tokens": None}, {"correct": None}, {"family": 3}):
        out.write_text(
            "\n".join([*lines[:1], json.dumps({**json.loads(lines[1]), **damage}), *lines[2:], ""])
        )
        told = run(*once, "--csv")
        assert told.exit_code == 2, told.stderr
        assert f"{out}: line 2 is a damaged record" in " ".join(told.stderr.split())

    monkeypatch.undo()
    out.write_text("\n".join([*lines[:3], lines[4][:50]]))
    third = run(*once[:-4], "--ratio", "0.5,0.3", "-o", out, "--csv")
    assert third.exit_code == 0
    assert "was cut off" in third.stderr
    assert "has 3 of 12 answers already" in third.stderr
    assert len(out.read_text().splitlines()) == 12
    first_rows, third_rows = ([*csv.DictReader(io.StringIO(done.stdout))] for done in (first, third))
    assert [{**row, "seconds": ""} for row in third_rows[:2]] == [
        {**row, "seconds": ""} for row in first_rows
    ]

    fourth = run(*once, "--max-new-tokens", "2", "--csv")
    assert "also has 12 answers of other models, versions, settings or clips: left alone" in fourth.stderr
    assert len(out.read_text().splitlines()) == 20


def test_a_table_for_a_pipe(run: Run, manifest: Path, options: list[Any]) -> None:
    done = run("eval", manifest, *options, "--ratio", "0.5")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{manifest}: 2 clips, 4 questions, ")
    assert lines[1].split() == [
        "method",
        "ratio",
        "accuracy",
        "%",
        "of",
        "full",
        "kept",
        "compute",
        "time",
        "n",
    ]
    assert [line.split()[:2] for line in lines[2:4]] == [["full", "1"], ["seats", "0.5"]]
    assert "100.0%" in lines[2]
    assert "transcription" in lines[5]
    assert "\x1b" not in done.stdout
    assert "cut off at --max-new-tokens 3" in done.stderr


def test_the_suite_is_rendered_and_asked_about(run: Run, options: list[Any]) -> None:
    arguments = ["--clips", "1", "--seconds", "8", "--split", "dev", "--seed", "4", "--methods", "full"]
    done = run("eval", *options, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    (row,) = document["rows"]
    assert row["n"] >= 10
    assert (row["clips"], row["low"]) == (1, None)
    assert {key: document["options"][key] for key in ("clips", "seed", "split", "seconds")} == {
        "clips": 1, "seed": 4, "split": "dev", "seconds": 8.0,
    }  # fmt: skip


def test_files_that_fail_are_told_once_and_counted(
    run: Run, manifest: Path, options: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    with manifest.open("a") as stream:
        for name in ("missing.mp4", "broken.mp4"):
            stream.write(json.dumps({"media": name, "question": "why?", "answer": "so"}) + "\n")
    out = tmp_path / "out.jsonl"
    arguments = ["eval", manifest, *options, "--ratio", "0.5,0.3", "-o", out]
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stderr.count("no such file") == 1
    assert done.stderr.count("broken.mp4") == 1
    assert done.stdout.count("2 questions failed, in no number here") == 1
    assert "every row: 2 questions failed, in no number here" in done.stdout
    assert len(out.read_text().splitlines()) == 18

    again = run(*arguments)
    assert again.exit_code == 1
    assert "has 12 of 18 answers already, 6 failed and are tried again" in again.stderr
    assert "no such file" in again.stderr
    assert len(out.read_text().splitlines()) == 18  # the same failure is not written twice

    write_clip(tmp_path / "missing.mp4", pictures(20, 84, 84), fps=10, audio=tone(2.0))
    mended = run(*arguments, "--json")
    assert mended.exit_code == 1
    rows = json.loads(mended.stdout)["rows"]
    assert [(row["n"], row["failed"]) for row in rows] == [(5, 1)] * 3
    assert [row["right"].count("-") for row in rows] == [1] * 3


def test_a_ratio_that_a_method_cannot_meet_is_no_failure(
    run: Run, manifest: Path, options: list[Any]
) -> None:
    done = run("eval", manifest, *options, "--methods", "seats,fastv", "--ratio", "0.3,0.01")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"^ +fastv +0\.01 +n/a +n/a", done.stdout, re.MULTILINE)
    assert re.search(r"^fastv at 0\.01: not possible: ratio 0\.01 is too small", done.stdout, re.MULTILINE)
    rows = json.loads(
        run("eval", manifest, *options, "--methods", "fastv", "--ratio", "0.01", "--json").stdout
    )["rows"]
    assert rows[1]["accuracy"] is rows[1]["retention"] is None
    assert "too small" in rows[1]["error"]


def test_ctrl_c_keeps_what_is_finished(
    run: Run, manifest: Path, options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original, asked = tmp_path / "out.jsonl", Session.ask, []

    def ask(self: Session, *rest: Any) -> Any:
        asked.append(rest)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return original(self, *rest)

    arguments = ["eval", manifest, *options, "--ratio", "0.5", "-o", out, "--json"]
    monkeypatch.setattr(Session, "ask", ask)
    done = run(*arguments)
    assert done.exit_code == 130
    assert "interrupted: 5 of 8 answers; the same command goes on from there" in done.stderr
    document = json.loads(done.stdout)
    assert document["complete"] is False
    assert sum(row["n"] for row in document["rows"]) == 5
    assert len(out.read_text().splitlines()) == 5
    monkeypatch.setattr(Session, "ask", original)
    done = run(*arguments)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["complete"] is True
    keys = [json.loads(line)["key"] for line in out.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 8


def test_a_model_that_is_not_there(run: Run, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run("eval", manifest, "--model", tmp_path, "--workers", "1", "-o", out)
    assert done.exit_code == 2
    assert "it has no config.json" in done.stderr
    assert not out.exists()


def test_annotations_become_a_manifest(run: Run, tmp_path: Path) -> None:
    about = {"videoID": "v1", "question_id": "1-1", "task_type": "Counting"}
    rows = [{**about, "question": "How many?", "options": ["A. one", "B. two"], "answer": "B"}]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    done = run("eval", "--convert", "videomme", tmp_path / "annotations.json")
    assert done.exit_code == 0, done.stderr
    (record,) = map(json.loads, done.stdout.splitlines())
    assert (record["question"], record["options"], record["answer"]) == ("How many?", ["one", "two"], "B")
    assert "missing: 1 of 1 video, the first" in done.stderr


# ---- as a process -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_in_the_middle_goes_on(tmp_path: Path, end: signal.Signals) -> None:
    out, place = tmp_path / "out.jsonl", tmp_path / "tmp"
    place.mkdir()
    arguments = [
        "eval",
        "--clips",
        "3",
        "--seconds",
        "8",
        "--split",
        "dev",
        "--ratio",
        "0.2",
        "--workers",
        "2",
        "--csv",
    ]
    process = subprocess.Popen(
        [*SEATS, *arguments, "-o", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")},
    )
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if end == signal.SIGKILL else 130)
    if end != signal.SIGKILL:
        assert list(place.iterdir()) == []
    assert "Traceback" not in errors
    had = out.read_bytes().count(b"\n")
    assert 20 <= had < 80
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    done = subprocess.run([*SEATS, *arguments, "-o", out], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"has {had} of " in done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({record["key"] for record in records}) == len(records)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert float(rows[0]["accuracy"]) > 0.9
    assert sum(int(row["n"]) for row in rows) == len(records)
