"""A batch that is killed and resumed writes what an uninterrupted one writes, line by line, timing aside.

    python tests/batch/kill_and_resume.py 200 report.json

Renders short clips, breaks one in twenty, asks about all of them in one run, and again in a run that gets
SIGKILL three times on its way; after the second its last line is also cut in the middle, as a kill inside a
write leaves it. Reports what was compared.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_clips import pictures, tone, write_clip  # noqa: E402 - a script is run from anywhere

KILLS = (0.2, 0.5, 0.8)  # of the lines
CUT_AFTER = 2  # the kill after which the last line is cut as well
QUESTION = "what is said?"


def write_clips(folder: Path, count: int) -> int:
    """`count` clips, one in twenty broken in one of four ways; how many are broken."""
    rng = random.Random(count)
    broken = 0
    for number in range(count):
        path = folder / f"{number:04d}.mp4"
        frames = pictures(16 + number % 9)[rng.randrange(8) :]
        sound = tone(1.6 + number % 5 / 10, channels=1) if number % 3 else None
        write_clip(path, frames, fps=10, audio=sound)
        if number % 20 == 7:
            data = path.read_bytes()
            damaged = (b"", b"no media at all", data[: len(data) // 3], bytes(len(data)))
            path.write_bytes(damaged[broken % len(damaged)])
            broken += 1
    return broken


def started(folder: Path, out: Path, options: tuple[str, ...]) -> subprocess.Popen[str]:
    """The command on its way, in a process group of its own."""
    command = [sys.executable, "-m", "seats_cli", "ask", "clips", QUESTION, "-o", out.name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [*command, "--max-new-tokens", "8", *options], cwd=folder, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )  # fmt: skip


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_at(process: subprocess.Popen[str], out: Path, lines: int, deadline_s: float) -> bool:
    """Kill the run once the file has so many lines; False if it ended before."""
    until = time.monotonic() + deadline_s
    while lines_in(out) < lines and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    _, stderr = process.communicate()
    if not alive:
        sys.stderr.write(stderr)  # it had no time to end by itself: why did it?
    return alive


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records without what no two runs share."""
    return [{**json.loads(line), "timing": None} for line in path.read_text(encoding="utf-8").splitlines()]


def compare(
    count: int, folder: Path, *, options: tuple[str, ...] = (), deadline_s: float = 600
) -> dict[str, Any]:
    """Both runs over `count` clips; the report, whose `equal` should be true."""
    (folder / "clips").mkdir()
    broken = write_clips(folder / "clips", count)
    whole, parts = folder / "whole.jsonl", folder / "parts.jsonl"
    began = time.monotonic()
    process = started(folder, whole, options)
    _, stderr = process.communicate(timeout=deadline_s)
    seconds = time.monotonic() - began
    report: dict[str, Any] = {
        "clips": count,
        "broken": broken,
        "options": list(options),
        "uninterrupted": {"exit_code": process.returncode, "seconds": round(seconds, 1)},
        "kills": [],
    }
    for number, share in enumerate(KILLS, 1):
        process = started(folder, parts, options)
        was_killed = killed_at(process, parts, max(1, round(share * count)), deadline_s)
        kill = {"killed": was_killed, "lines": lines_in(parts)}
        if number == CUT_AFTER:
            content = parts.read_bytes()
            last = content.rstrip(b"\n").rfind(b"\n") + 1
            parts.write_bytes(content[: last + (len(content) - last) // 2])
            kill["cut_to_bytes_of_last_line"] = (len(content) - last) // 2
        report["kills"].append(kill)
    process = started(folder, parts, options)
    _, resumed = process.communicate(timeout=deadline_s)
    report["resumed"] = {"exit_code": process.returncode, "stderr": resumed.splitlines()[-3:]}
    first, second = timeless(whole), timeless(parts)
    report["lines"] = [len(first), len(second)]
    report["keys_twice"] = len(second) - len({record["key"] for record in second})
    report["failed"] = [sum(not record["ok"] for record in records) for records in (first, second)]
    report["different_answers"] = len({record["answer"] for record in first})
    report["differing_lines"] = sum(a != b for a, b in zip(first, second, strict=False))
    report["equal"] = first == second
    before = parts.read_bytes()
    process = started(folder, parts, options)
    process.communicate(timeout=deadline_s)
    report["untouched_by_another_run"] = parts.read_bytes() == before
    if "Traceback" in stderr + resumed:
        report["equal"] = False
    return report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = compare(int(sys.argv[1]), Path(place), options=tuple(sys.argv[3:]))
    text = json.dumps(found, indent=1)
    Path(sys.argv[2]).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
