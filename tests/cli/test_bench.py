"""`seats bench`: what may be typed, the three forms of its document, and what goes wrong on the way."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from make_clips import pictures, tone, write_clip
from processor_time import is_instant
from seats_cli.cli.bench import parse_size, sweep_values
from seats_cli.lab import bench as lab

from .conftest import Run

SHORT = ["--seconds", "4", "--frames", "8", "--size", "56x56", "--new-tokens", "2", "--repeats", "2"]
HEAVY = {"torch", "transformers", "av", "librosa", "soundfile", "numpy", "scipy"}


@pytest.fixture
def model(tiny_checkpoint_path: Path) -> list[Any]:
    """The tiny random checkpoint."""
    return ["--model", tiny_checkpoint_path, "--dtype", "float32", "--device", "cpu"]


# ---- what may be typed ------------------------------------------------------------------------------------

WRONG = [
    (["--methods", "seats,foo"], "--methods: 'foo' is not one of seats, full"),
    (["--ratio", "0"], "--ratio: 0 is out of range; accepted: a number above 0 and at most 1"),
    (["--ratio", "0.1,1.5"], "--ratio: 1.5 is out of range"),
    (["--repeats", "0"], "accepted: a whole number at least 1"),
    (["--warmup", "-1"], "accepted: a whole number at least 0"),
    (["--new-tokens", "0"], "accepted: a whole number at least 1"),
    (["--seconds", "0"], "accepted: a number above 0"),
    (["--frames", "-2"], "accepted: a whole number at least 0"),
    (["--size", "336"], "'336' is no size; accepted: WIDTHxHEIGHT"),
    (["--size", "0x336"], "'0x336' is no size"),
    (["--text-tokens", "x"], "'x' is not a number"),
    (["--against", "vllm"], "'vllm' is not one of transformers"),
    (["--sweep", "length=1:2"], "'length=1:2' is no sweep"),
    (["--sweep", "seconds=16:8"], "does not go up"),
    (["--sweep", "seconds=16:64:4"], "is not FROM:TO or FROM:TO:xFACTOR"),
    (["--sweep", "seconds=16:64:x1"], "--sweep: 1 is out of range"),
    (["--sweep", "ratio=0.5,2"], "--sweep: 2 is out of range"),
    (["--sweep", "seconds=1:2:x1.10000000001:x3"], "is not FROM:TO"),
    (["--sweep", "seconds=8:16", "--seconds", "4"], "--seconds is both fixed and swept"),
    (["--sweep", "ratio=0.1,0.2", "--ratio", "0.3"], "--ratio is both fixed and swept"),
    (["clip.mp4", "--seconds", "4"], "--seconds: of the synthetic clip, but files were given"),
    (["clip.mp4", "--sweep", "seconds=8:16"], "--sweep seconds: of the synthetic clip, but files were given"),
    (["--max-frames", "8"], "--max-frames: of files, but none is given"),
    (["--start", "3"], "--start: of files, but none is given"),
    (["--json", "--csv"], "choose one"),
    (["--preset", "nope"], "no preset 'nope'"),
    (["--set", "tau=0"], "tau=0: not accepted"),
    (["-o", "."], "cannot write .: it is a folder"),
    (["-o", "none/b.json"], "there is no folder none"),
    (["--plot", "b.jpg"], "is no PNG file"),
    (["--plot", "none/b.png"], "no such folder"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "measure", lambda *_, **__: pytest.fail("too late"))
    done = run("bench", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_file_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "measure", lambda *_, **__: pytest.fail("too late"))
    done = run("bench", "no-such-file.mp4")
    assert done.exit_code == 1
    assert "no-such-file.mp4" in done.stderr


def test_help_and_wrong_usage_are_instant_and_import_nothing_heavy() -> None:
    for arguments in (["--help"], ["--ratio", "2"], ["--sweep", "x"], ["no-such-file.mp4"], ["-o", "none/b"]):
        program = (
            "import sys\nfrom seats_cli.cli.app import run\n"
            f"run(['bench', *{arguments!r}])\n"
            f"heavy = {HEAVY!r} & set(sys.modules)\nsys.exit(f'imported {{heavy}}' if heavy else 0)\n"
        )
        assert is_instant([sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seconds=16:1024", (16, 32, 64, 128, 256, 512, 1024)),
        ("seconds=16:100", (16, 32, 64)),
        ("seconds=16:1024:x8", (16, 128, 1024)),
        ("seconds=5,2.5,5", (2.5, 5)),
        ("frames=2:7:x1.5", (2, 3, 4, 7)),
        ("ratio=0.05:0.4", (0.05, 0.1, 0.2, 0.4)),
        ("seconds=7", (7,)),
    ],
)
def test_sweeps(text: str, values: tuple[float, ...]) -> None:
    assert sweep_values(text) == (text.partition("=")[0], values)


def test_sizes() -> None:
    assert parse_size("640X360") == (640, 360)
    assert parse_size("caps") == "caps"


# ---- what comes out ---------------------------------------------------------------------------------------


def test_the_table_on_a_pipe_is_plain_and_fits_80_columns(run: Run, model: list[Any], tmp_path: Path) -> None:
    done = run(
        "bench", *model, *SHORT, "--ratio", "0.5,0.2", "--against", "transformers", "--check-flops",
        "-o", tmp_path / "b.json", "--plot", tmp_path / "b.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.isascii()
    tables = lines[5:]  # the head names the checkpoint's folder
    assert max(map(len, tables)) <= 100
    assert "synthetic clip, 4 s, 8 frames of 56x56: 16 video + 100 audio + " in done.stdout
    assert "answers of 2 tokens; 2 rounds after 1 of warm-up, rows in turns" in done.stdout
    named = [
        line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in ("full", "seats")
    ]
    assert named == ["full", "seats", "seats"] * 4
    assert sum(line.startswith("  transformers") for line in lines) == 2
    assert "random weights" not in done.stdout  # a checkpoint's own, whatever they are
    document = json.loads((tmp_path / "b.json").read_text())
    assert [row["engine"] for row in document["rows"]] == ["transformers", "seats", "seats", "seats"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_json_says_all_that_is_needed_to_run_it_again(run: Run, model: list[Any]) -> None:
    done = run("bench", *model, *SHORT, "--ratio", "0.5", "--methods", "seats,random", "--json", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert next(iter(found)) == "schema_version"
    assert {"environment", "input", "options", "rows", "memory", "date", "complete"} <= set(found)
    assert found["schema_version"] == 1
    assert {"torch", "transformers", "cuda", "device_name", "attention", "dtype", "random_weights"} <= set(
        found["environment"]
    )
    assert found["options"]["new_tokens"] == 2
    (item,) = found["input"]["items"]
    assert (item["seconds"], item["frames"], item["grid"]) == (4, 8, [4, 4, 4])
    assert [(row["method"], row["ratio"]) for row in found["rows"]] == [
        ("full", 1.0), ("seats", 0.5), ("random", 0.5),
    ]  # fmt: skip
    orders = [[sample["order"] for sample in row["samples"]] for row in found["rows"]]
    assert orders == [[0, 3], [1, 4], [2, 5]]
    for row in found["rows"]:
        assert row["error"] is None
        assert row["seconds"]["whole"]["low"] <= row["seconds"]["whole"]["median"]
        assert row["seconds"]["prefill_device"] is None
        assert row["peak_bytes"] is None
        assert row["kv_bytes"] > 0
    assert found["rows"][0]["speedup"] == 1.0


def test_csv_has_a_line_a_row_of_a_sweep(run: Run, model: list[Any]) -> None:
    short = [word for word in SHORT if word not in ("--seconds", "4", "--frames", "8")]
    done = run("bench", *model, *short, "--sweep", "seconds=2:4", "--ratio", "0.5", "--csv", "-q")
    assert done.exit_code == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["seconds"], row["frames"], row["method"]) for row in rows] == [
        ("2.0", "4", "full"), ("2.0", "4", "seats"), ("4.0", "8", "full"), ("4.0", "8", "seats"),
    ]  # fmt: skip
    assert {"prefill_s", "prefill_s_low", "prefill_s_high", "whole_s", "flops", "limit", "kv_bytes"} <= set(
        rows[0]
    )
    assert all(float(row["select_prefill_s"]) > 0 for row in rows)
    assert {row["random_weights"] for row in rows} == {"False"}


def test_random_weights_are_called_so_in_every_form(run: Run, tiny_checkpoint_path: Path) -> None:
    dummy = ["--model", tiny_checkpoint_path, "--load-format", "dummy", "--device", "cpu"]
    once = [*dummy, *SHORT, "--repeats", "1", "--warmup", "0", "--methods", "full"]
    table = run("bench", *once)
    assert table.exit_code == 0, table.stderr
    lines = table.stdout.splitlines()
    assert "random weights" in lines[0]
    assert sum(line.endswith(", random weights") for line in lines) == 3
    assert "warning: random weights" in table.stderr
    assert json.loads(run("bench", *once, "--json").stdout)["environment"]["random_weights"] is True
    (row,) = csv.DictReader(io.StringIO(run("bench", *once, "--csv").stdout))
    assert row["random_weights"] == "True"


def test_files_are_timed_with_their_decoding(run: Run, model: list[Any], tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", pictures(20, 84, 84), fps=10, audio=tone(2.0))
    (tmp_path / "b.mp4").write_bytes(b"no clip at all")
    arguments = ["--repeats", "1", "--warmup", "0", "--new-tokens", "1", "--ratio", "0.5", "--json"]
    done = run("bench", tmp_path / "a.mp4", tmp_path / "b.mp4", *model, *arguments)
    assert done.exit_code == 1
    assert done.stderr.count("error: ") == 1  # both rows of it fail alike
    found = json.loads(done.stdout)
    assert [(row["item"], row["error"] is None) for row in found["rows"]] == [
        (0, True), (0, True), (1, False), (1, False),
    ]  # fmt: skip
    assert found["rows"][0]["seconds"]["read"]["median"] > 0
    assert found["rows"][2]["error"]["kind"].startswith("media")
    assert found["input"]["items"][1]["tokens"] is None
    assert [item["video_decoder"] for item in found["input"]["items"]] == ["cpu", None]
    assert found["options"]["files"] == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]


def test_a_gpu_that_does_not_decode_is_told_once(
    run: Run, model: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run opens the file anew, with the session's choice of decoder."""
    from seats_cli.media import VideoDecoding

    write_clip(tmp_path / "a.mp4", pictures(20, 84, 84), fps=10)
    arguments = ["--repeats", "2", "--new-tokens", "1", "--methods", "full", "--json", "--hwaccel", "cuda"]
    monkeypatch.setattr("seats_cli.session.choose_decoding", lambda *_: VideoDecoding(99, insisted=True))
    done = run("bench", tmp_path / "a.mp4", *model, *arguments)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("a.mp4: video decoded on the CPU: the GPU's decoder does not open") == 1
    found = json.loads(done.stdout)
    assert found["options"]["hwaccel"] == "cuda"
    assert found["input"]["items"][0]["video_decoder"] == "cpu"


def test_a_size_that_does_not_fit_is_told_and_the_sweep_goes_on(
    run: Run, model: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lab.run_row

    def run_row(session: Any, item: Any, *rest: Any, **more: Any) -> Any:
        if item.source.seconds == 4:
            raise MemoryError
        return real(session, item, *rest, **more)

    monkeypatch.setattr(lab, "run_row", run_row)
    done = run(
        "bench", *model, "--sweep", "seconds=2:8", "--size", "56x56", "--new-tokens", "1", "--repeats", "1",
        "--methods", "full",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "4 s full: not possible: out of memory" in done.stdout
    assert "error: synthetic clip, 4 s" in done.stderr
    assert any(line.split()[:3] == ["8", "s", "full"] for line in done.stdout.splitlines())


def test_an_interruption_shows_what_is_done(
    run: Run, model: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = lab.run_row, []

    def run_row(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(lab, "run_row", run_row)
    done = run("bench", *model, *SHORT, "--json")
    assert done.exit_code == 130
    assert "interrupted: what is done is shown" in done.stderr
    found = json.loads(done.stdout)
    assert found["complete"] is False
    assert [row["method"] for row in found["rows"]] == ["full"]
