"""`seats` on a checkpoint of each family, from the command line to the answer."""

import json
from pathlib import Path

import pytest

from make_clips import pictures, tone, write_clip

from .conftest import Run


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_clip(path, pictures(45), fps=15, audio=tone(3.0))


def test_ask(run: Run, media: Path, family_path: Path) -> None:
    done = run(
        "ask", "--model", family_path, "--device", "cpu", "--ratio", "0.3", "--max-new-tokens", "3", "--json",
        media, "what is said?",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    family = report["environment"]["family"]
    assert family in family_path.joinpath("config.json").read_text()
    assert report["retention"]["reached"]["overall"] == pytest.approx(0.3, abs=0.05)
    rate = {"qwen2_5_omni": 25, "qwen3_omni_moe": 13}[family]
    assert report["tokens"]["before"]["audio"] == pytest.approx(3 * rate, abs=2)
    assert report["tokens"]["end"]["video"] == report["tokens"]["end"]["audio"] == 0
    window = report["method"]["stage_1_window"]["audio"]
    assert window == {"qwen2_5_omni": 50, "qwen3_omni_moe": 26}[family], "2 s"


def test_ask_as_published(run: Run, media: Path, family_path: Path) -> None:
    done = run(
        "ask", "--model", family_path, "--device", "cpu", "--ratio", "0.3", "--max-new-tokens", "2", "--json",
        "--preset", "paper", media, "what is said?",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    method = json.loads(done.stdout)["method"]
    assert method["stage_1_window"]["audio"] == 50
    assert method["options"]["tau"] == (
        0.3 if "qwen3" in family_path.joinpath("config.json").read_text() else 0.1
    )


def test_a_method_that_cuts_too_early_is_told(run: Run, media: Path, qwen3_path: Path) -> None:
    done = run(
        "ask", "--model", qwen3_path, "--device", "cpu", "--method", "fastv", "--ratio", "0.2", media, "what?"
    )
    assert done.exit_code == 2
    assert "deepstack" in done.stderr
    assert "first drop layer is 2 or more" in " ".join(done.stderr.split())


def test_bench_beside_transformers(run: Run, family_path: Path, tmp_path: Path) -> None:
    done = run(
        "bench", "--model", family_path, "--load-format", "dummy", "--device", "cpu", "--seconds", "4",
        "--frames", "8", "--size", "64x64", "--new-tokens", "2", "--repeats", "1", "--ratio", "0.3",
        "--against", "transformers", "--check-flops", "-o", tmp_path / "b.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["engine"] for row in rows} == {"seats", "transformers"}
