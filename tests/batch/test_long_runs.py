"""The two long proofs, small here and whole with -m slow: killed runs, and damaged files."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from batch.fuzz import fuzz
from batch.kill_and_resume import KILLS, compare, lines_in, started, write_clips

ROOT = Path(__file__).parents[2]

needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def holds(report: dict, count: int) -> None:  # type: ignore[type-arg]
    assert report["equal"], report
    assert report["lines"] == [count, count]
    assert report["keys_twice"] == report["differing_lines"] == 0
    assert report["failed"] == [report["broken"]] * 2
    assert report["broken"] == max(1, count // 20)
    assert [kill["killed"] for kill in report["kills"]] == [True] * len(KILLS)
    assert report["untouched_by_another_run"]
    assert report["resumed"]["exit_code"] == 1


@needs_kill
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["alone", "workers"])
def test_a_run_that_is_killed_three_times_loses_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    holds(compare(200, tmp_path, options=options), 200)


@needs_kill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_ends_its_line_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    """In the middle of an answer, while another clip is being read."""
    (tmp_path / "clips").mkdir()
    write_clips(tmp_path / "clips", 40)
    out = tmp_path / "out.jsonl"
    process = started(tmp_path, out, ())
    until = time.monotonic() + 120
    while lines_in(out) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; the same command goes on from there" in stderr
    assert "Traceback" not in stderr
    names = [Path(json.loads(line)["path"]).name for line in out.read_text().splitlines()]
    assert out.read_bytes().endswith(b"\n")
    assert 3 <= len(names) < 40
    assert sorted(set(names)) == sorted(names)
    assert names[:3] == ["0000.mp4", "0001.mp4", "0002.mp4"]


@pytest.mark.slow
def test_five_hundred_damaged_files_are_five_hundred_records(tmp_path: Path) -> None:
    report = fuzz(500, tmp_path, timeout_s=600)
    assert report["problems"] == []
    assert report["answered"] + sum(report["errors"].values()) == 500


def test_damaged_files_are_records(tmp_path: Path) -> None:
    """One damage of each kind on each container."""
    report = fuzz(54, tmp_path, timeout_s=120)
    assert report["problems"] == []
    assert set(report["by_container"]) == {"jpg", "mkv", "mov", "mp4", "wav", "webm"}
    assert len(report["by_damage"]) == 9
    assert report["answered"] > 10 < sum(report["errors"].values())


def test_the_reports_in_the_documentation_hold() -> None:
    for name, count in (("killed", 200), ("killed-workers", 200)):
        holds(json.loads((ROOT / "docs" / "benchmarks" / "batch" / f"{name}.json").read_text()), count)
    report = json.loads((ROOT / "docs" / "benchmarks" / "batch" / "fuzz.json").read_text())
    assert (report["files"], report["problems"]) == (500, [])
