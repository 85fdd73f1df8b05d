"""`seats trace`: what may be typed, the document, resuming, a saved trace, and the files made of one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.tracing import document
from make_clips import pictures, tone, write_clip
from seats_cli.cli import trace as command
from seats_cli.lab import tracing
from seats_cli.presets import load_preset
from seats_cli.session import Session

from .conftest import Run

HEAVY = {"torch", "transformers", "av", "librosa", "soundfile", "scipy"}
KEYS = [
    "schema_version",
    "date",
    "complete",
    "environment",
    "options",
    "model",
    "failed",
    "n_layers",
    "measure",
    "samples",
    "clips",
    "counts",
    "full",
    "removal",
    "choice",
    "entry",
    "attention",
    "boundaries",
]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two clips of two seconds."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name, pictures(20, 84, 84), fps=10, audio=tone(2.0))
    return folder


def write_manifest(path: Path, media: Path, **extra: Any) -> Path:
    """Two questions about each clip, of two families."""
    lines = [
        {"media": str(media / name), "question": question, "family": family, **extra}
        for name in ("a.mp4", "b.mp4")
        for question, family in (("what is said?", "one"), ("what is the", "two"))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def manifest(media: Path, tmp_path: Path) -> Path:
    """Questions without answers."""
    return write_manifest(tmp_path / "manifest.jsonl", media)


@pytest.fixture
def options(tiny_checkpoint_path: Path) -> list[Any]:
    """The tiny random checkpoint in this process, short answers, few points."""
    model = ["--model", tiny_checkpoint_path, "--workers", "1", "--dtype", "float32"]
    return [*model, "--max-new-tokens", "3", "--layers", "2-4,6"]


# ---- what may be typed ------------------------------------------------------------------------------------

WRONG = [
    (["--curves", "removal,foo"], "--curves: 'foo' is not one of removal, choice, entry, attention"),
    (["--curves", ","], "--curves: ',' is an empty list"),
    (["--layers", "0"], "--layers: '0' is no list of layers; accepted: all, or numbers from 1"),
    (["--layers", "1,x"], "--layers: '1,x' is no list of layers"),
    (["--layers", "1,,2"], "--layers: '1,,2' is no list of layers"),
    (["--layers", "9-4"], "--layers: '9-4' holds no layer"),
    (["--tolerance", "2"], "2 is out of range; accepted: a number at least 0 and at most 1"),
    (["--questions-per-clip", "0"], "accepted: a whole number at least 1"),
    (["--seconds", "8.3"], "--seconds: 8.3 is no multiple of 0.5"),
    (["--preset", "nope"], "no preset 'nope'"),
    (["--set", "tau=0"], "tau=0: not accepted"),
    (["none.jsonl"], "cannot read the manifest none.jsonl"),
    (["good.jsonl", "--split", "dev"], "--split"),
    (["--plot", "p.jpg"], "--plot p.jpg is no PNG file"),
    (["--plot", "none/p.png"], "cannot write none/p.png"),
    (["--write-preset", "none/p.yaml"], "cannot write none/p.yaml"),
    (["--write-preset", "."], "cannot write ."),
    (["--curves", "entry", "--write-preset", "p.yaml"], "--plot and --write-preset need the removal curve"),
    (["-o", "."], "is a folder"),
    (["--from", "none.json"], "cannot read the trace none.json"),
    (["--from", "good.jsonl"], "good.jsonl is no trace"),
    (["--from", "t.json", "--clips", "3"], "--clips says how to measure"),
    (["good.jsonl", "--from", "t.json"], "a manifest says how to measure"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_what_is_wrong_is_told_at_once(
    run: Run,
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Session, "__init__", None)  # no model is loaded for it
    (tmp_path / "good.jsonl").write_text('{"media": "a.mp4", "question": "why?"}\n')
    result = run("trace", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split()).replace("Invalid value for ", "")
    assert result.stdout == ""


DAMAGE: list[tuple[Any, str]] = [
    (lambda d: d["removal"][2].pop("layer"), "removal, row 3: layer is missing"),
    (lambda d: d["removal"][2].update(kind="smell"), "removal, row 3: kind is 'smell'"),
    (lambda d: d["removal"][0].update(accuracy="high"), "removal, row 1: accuracy is 'high', not a number"),
    (lambda d: d["removal"][0].pop("low"), "removal, row 1: low or high is missing"),
    (lambda d: d.update(removal={}), "removal is no list"),
    (lambda d: d.update(full=[]), "full: no object with keys"),
    (lambda d: d.update(n_layers="many"), "n_layers is 'many'"),
    (lambda d: d.update(measure="taste"), "measure is 'taste'"),
    (lambda d: d["attention"][1].pop("text"), "attention, row 2: text is missing"),
    (lambda d: d["model"].pop("hidden_size"), "model: hidden_size is missing"),
    (lambda d: d.update(options=3), "options is no object"),
    (lambda d: d["counts"].update(video=None), "counts: video is None, not a number"),
]


@pytest.mark.parametrize(("spoil", "words"), DAMAGE, ids=[words for _, words in DAMAGE])
def test_a_damaged_trace_is_told_with_its_place(run: Run, spoil: Any, words: str, tmp_path: Path) -> None:
    traced = document([0.1, 0.2, 0.5, 0.9, 0.9, 0.9])
    path = tmp_path / "t.json"
    path.write_text(json.dumps(traced))
    assert run("trace", "--from", path).exit_code == 0
    spoil(traced)
    path.write_text(json.dumps(traced))
    result = run("trace", "--from", path)
    assert result.exit_code == 2
    assert f"{path} is a damaged trace: {words}" in " ".join(result.stderr.split())
    path.write_text(json.dumps(traced, indent=1)[:-30])
    assert " line " in run("trace", "--from", path).stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--layers", "x"], ["none.jsonl"]])
def test_starts_without_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from seats_cli.cli.app import run\n"
        f"run(['trace', *{arguments!r}])\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_names_are_those_of_the_lab() -> None:
    assert command.CURVES == tracing.CURVES


def test_lists_of_layers() -> None:
    assert command.layer_numbers("all") is None
    assert command.layer_numbers("9-12, 1,5,10") == (1, 5, 9, 10, 11, 12)
    assert command.curve_names("entry, removal") == ("removal", "entry")


# ---- a trace ----------------------------------------------------------------------------------------------


def test_the_document(run: Run, manifest: Path, options: list[Any], tmp_path: Path) -> None:
    result = run("trace", manifest, *options, "--json", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert (found["schema_version"], found["complete"], found["failed"]) == (1, True, 0)
    assert (found["measure"], found["samples"], found["clips"], found["n_layers"]) == ("agreement", 4, 2, 6)
    assert found["counts"] == {"video": 288.0, "audio": 50.0}
    assert found["full"]["agreement"] == 1.0
    assert found["full"]["accuracy"] is None
    assert [row["layer"] for row in found["removal"] if row["kind"] == "both"] == [1, 2, 3, 4, 6, 7]
    assert {row["after_layer"] for row in found["choice"]} == {2, 3, 4}
    assert len(found["entry"]) == 14
    assert len(found["attention"]) == 6
    for row in [*found["removal"], *found["choice"], *found["entry"]]:
        assert row["n"] == 4
        assert row["low"] <= row["agreement"] <= row["high"]
        assert row["log_likelihood"] < 0 < row["probability"] < 1
    assert found["model"]["hidden_size"] == 64
    assert found["environment"]["workers"] == 1
    assert found["boundaries"]["measure"] == "agreement"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "drawn: " in result.stderr


def test_tables_show_what_was_measured(run: Run, media: Path, options: list[Any], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", media, answer="so")
    result = run("trace", manifest, *options, "--questions-per-clip", "1")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "2 questions, 2 clips; accuracy with all tokens 0.0 (0.0-0.0)%" in lines[0]
    assert " ".join(lines[2].split()) == "from layer no video no audio neither to video to audio to text"
    assert [line.split()[0] for line in lines[3:9]] == list("123456")
    assert lines[7].split()[:4] == ["5", "-", "-", "-"]
    assert "only the most attended share of a kind stays after a layer" in result.stdout
    assert "only stage I's choice of a kind enters" in result.stdout
    assert "do not need the clip" in lines[-1]  # a random model is right neither way
    only = run("trace", manifest, *options, "--curves", "attention")
    assert only.exit_code == 0
    assert " ".join(only.stdout.splitlines()[2].split()) == "from layer to video to audio to text"
    assert len(only.stdout.splitlines()) == 9


def test_a_run_goes_on_where_it_ended(
    run: Run, manifest: Path, options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seats_cli.lab import trace

    output = tmp_path / "out.jsonl"
    first = run("trace", manifest, *options, "-o", output, "--json")
    lines = output.read_text().splitlines()
    assert len(lines) == 4
    output.write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])  # killed in the middle of a line
    measured = []
    original = trace.trace_sample
    monkeypatch.setattr(trace, "trace_sample", lambda *a: (measured.append(a[2].question), original(*a))[1])
    again = run("trace", manifest, *options, "-o", output, "--json")
    assert "cut off in the middle" in again.stderr
    assert "has 3 of 4 answers already" in again.stderr
    assert measured == ["what is the"]
    for name in ("removal", "choice", "entry", "attention", "full", "boundaries"):
        assert json.loads(again.stdout)[name] == json.loads(first.stdout)[name]
    run("trace", manifest, *options, "-o", output, "--json", "--tolerance", "0.5")
    assert len(measured) == 1  # the tolerance measures nothing


def test_a_file_that_fails_is_told_and_the_others_are_measured(
    run: Run, media: Path, options: list[Any], tmp_path: Path
) -> None:
    path = write_manifest(tmp_path / "m.jsonl", media)
    path.write_text(path.read_text() + '{"media": "none.mp4", "question": "why?"}\n')
    result = run("trace", path, *options, "--curves", "removal", "--json")
    assert result.exit_code == 1
    assert "none.mp4: no such file" in result.stderr
    assert "1 question of 5 failed, in no number here" in result.stderr
    found = json.loads(result.stdout)
    assert (found["failed"], found["samples"], found["choice"]) == (1, 4, [])


def test_a_question_that_does_not_fit_is_told(
    run: Run, media: Path, make_checkpoint: Any, tmp_path: Path
) -> None:
    from tiny_checkpoint import TinySpec

    small = make_checkpoint(TinySpec(context_length=64))
    path = write_manifest(tmp_path / "m.jsonl", media)
    result = run("trace", path, "--model", small, "--workers", "1", "--max-new-tokens", "3")
    assert result.exit_code == 1
    assert "warning: the prompt is too long" in result.stderr
    assert "4 questions of 4 failed" in result.stderr
    assert result.stdout == ""


def test_layers_beyond_the_last(run: Run, manifest: Path, options: list[Any]) -> None:
    result = run("trace", manifest, *options, "--layers", "3,7")
    assert result.exit_code == 2
    assert "--layers 7: this model has 6 layers" in result.stderr


# ---- a saved trace ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    from lab.tracing import document

    path = tmp_path / "t.json"
    curve = [0.1, 0.1, 0.12, 0.2, 0.4, 0.6, 0.75, 0.85, 0.89, 0.895, 0.9, 0.9, 0.9, 0.9]
    path.write_text(json.dumps(document(curve)))
    return path


def test_a_saved_trace_is_read_without_a_model(
    run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "__init__", None)
    plot, preset = tmp_path / "p.png", tmp_path / "p.yaml"
    result = run("trace", "--from", saved, "--plot", plot, "--write-preset", preset)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny, 40 questions, 4 clips; accuracy with all tokens 90.0 (85.0-95.0)%")
    assert lines[3].split()[:5] == ["1", "34.0", "58.0", "10.0", "(5.0-15.0)"]
    assert lines[3].split()[-1] == "shallow"
    assert lines[-1] == (
        "proposed (by accuracy, tolerance 0.01): shallow 1 to 5, middle 6 to 8, late 9 to 14; late layer 9; "
        "drops after 6, 7"
    )
    assert load_preset(preset).schedule.late_layer == 9
    assert plot.is_file()
    other = json.loads(run("trace", "--from", saved, "--json", "--tolerance", "0.05").stdout)
    assert other["boundaries"]["late_layer"] == 8
    again = tmp_path / "again.json"
    again.write_text(json.dumps(other))
    assert run("trace", "--from", again).stdout.splitlines()[-1] == lines[-1]


def test_a_preset_needs_a_curve_that_tells_something(run: Run, saved: Path, tmp_path: Path) -> None:
    trace = json.loads(saved.read_text())
    for row in trace["removal"]:
        row["accuracy"] = 0.9
    saved.write_text(json.dumps(trace))
    result = run("trace", "--from", saved, "--write-preset", tmp_path / "p.yaml")
    assert result.exit_code == 2
    assert "there is no schedule in this trace: removing every token costs 0 accuracy" in result.stderr
    assert "note: removing every token" in result.stdout
    assert not (tmp_path / "p.yaml").exists()


def test_a_written_preset_answers(run: Run, media: Path, saved: Path, tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    run("trace", "--from", saved, "--write-preset", preset)
    result = run(
        "ask", media / "a.mp4", "what is said?", "--preset", preset, "--json", "--max-new-tokens", "2"
    )
    assert result.exit_code == 0, result.stderr
    method = json.loads(result.stdout)["method"]
    assert (method["late_layer"], [drop["after_layer"] for drop in method["drops"]]) == (9, [6, 7])


# ---- the embedded model -----------------------------------------------------------------------------------


def test_the_suite_on_the_embedded_model(run: Run, tmp_path: Path) -> None:
    arguments = ["--clips", "1", "--seconds", "8", "--questions-per-clip", "2", "--layers", "1,12"]
    preset = tmp_path / "p.yaml"
    result = run(
        "trace",
        *arguments,
        "--curves",
        "removal,attention",
        "--workers",
        "1",
        "--json",
        "--write-preset",
        preset,
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["measure"], found["samples"], found["full"]["accuracy"]) == ("accuracy", 2, 1.0)
    left = {row["layer"]: row for row in found["removal"] if row["kind"] == "both"}
    assert left[12]["accuracy"] == 1.0 > left[1]["accuracy"]
    assert left[1]["log_likelihood"] < left[12]["log_likelihood"]
    assert found["boundaries"]["late_layer"] == 12
    assert load_preset(preset).status == "calibrated"
