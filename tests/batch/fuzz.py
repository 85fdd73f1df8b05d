"""Mutated media files through `seats ask`: every one must become a record, and nothing may crash or hang.

    python tests/batch/fuzz.py 500 report.json

Writes clips of six containers, damages copies of them, asks about all in one run, and reports what came of
each kind. The same seed makes the same files.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_clips import pictures, tone, write_clip, write_picture  # noqa: E402 - a script is run from anywhere

SEED = 20260


def originals(folder: Path) -> dict[str, bytes]:
    """A small whole file of each container, by its ending."""
    frames, sound = pictures(24), tone(2.4, channels=1)
    write_clip(folder / "a.mp4", frames, fps=10, audio=sound)
    write_clip(folder / "a.mkv", frames, fps=10, b_frames=2, audio=sound)
    write_clip(folder / "a.webm", frames, fps=10, codec="libvpx", audio=sound, audio_codec="libopus")
    write_clip(folder / "a.mov", frames, fps=10, codec="mpeg4", audio=sound, rotation=90)
    soundfile.write(folder / "a.wav", sound[0], 48_000, subtype="PCM_16")
    noise = np.random.default_rng(SEED).integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    write_picture(folder / "a.jpg", noise, "mjpeg", "yuvj420p")
    return {path.suffix[1:]: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- damage -----------------------------------------------------------------------------------------------


def flipped(data: bytearray, rng: random.Random) -> None:
    """A few bits, anywhere."""
    for _ in range(rng.randint(1, 40)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flipped_head(data: bytearray, rng: random.Random) -> None:
    """Bytes of the first 4 kB, where headers are."""
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(min(len(data), 4096))] = rng.randrange(256)


def flipped_tail(data: bytearray, rng: random.Random) -> None:
    """Bytes of the last 4 kB, where an index may be."""
    for _ in range(rng.randint(1, 12)):
        data[-1 - rng.randrange(min(len(data), 4096))] = rng.randrange(256)


def extreme(data: bytearray, rng: random.Random) -> None:
    """Lengths, counts, sizes: runs of the largest and the smallest numbers."""
    for _ in range(rng.randint(1, 6)):
        at, width = rng.randrange(len(data)), rng.choice((1, 2, 4, 8))
        data[at : at + width] = rng.choice((b"\xff", b"\x7f", b"\x80", b"\0")) * width


def cut(data: bytearray, rng: random.Random) -> None:
    """The end is missing."""
    del data[rng.randrange(len(data)) :]


def holed(data: bytearray, rng: random.Random) -> None:
    """A piece of the middle is missing, or zeros."""
    at, length = rng.randrange(len(data)), rng.randint(1, 4096)
    data[at : at + length] = b"" if rng.random() < 0.5 else bytes(len(data[at : at + length]))


def doubled(data: bytearray, rng: random.Random) -> None:
    """A piece comes again somewhere else."""
    at, length = rng.randrange(len(data)), rng.randint(1, 8192)
    to = rng.randrange(len(data))
    data[to:to] = data[at : at + length]


def noisy(data: bytearray, rng: random.Random) -> None:
    """A piece is random bytes."""
    at = rng.randrange(len(data))
    length = min(rng.randint(1, 2048), len(data) - at)
    data[at : at + length] = rng.randbytes(length)


def swapped_ends(data: bytearray, rng: random.Random) -> None:
    """The file begins in its middle."""
    at = rng.randrange(len(data))
    data[:] = data[at:] + data[:at]


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flipped, flipped_head, flipped_tail, extreme, cut, holed, doubled, noisy, swapped_ends),
)


def write_damaged(folder: Path, count: int, seed: int = SEED) -> dict[str, str]:
    """`count` damaged files in the folder, containers in turns; what was done to each, by name."""
    with tempfile.TemporaryDirectory() as place:
        whole = originals(Path(place))
    rng = random.Random(seed)
    done: dict[str, str] = {}
    for number in range(count):
        ending = list(whole)[number % len(whole)]
        data = bytearray(whole[ending])
        damage = DAMAGES[number // len(whole) % len(DAMAGES)]
        damage(data, rng)
        if rng.random() < 0.2 and data:
            rng.choice(DAMAGES)(data, rng)
        name = f"{number:04d}.{ending}"
        (folder / name).write_bytes(data)
        done[name] = damage.__name__
    return done


# ---- the run ----------------------------------------------------------------------------------------------


def fuzz(count: int, folder: Path, *, timeout_s: float, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Ask about `count` damaged files in one run; the report, whose `problems` should be none."""
    clips, out = folder / "clips", folder / "out.jsonl"
    clips.mkdir()
    done = write_damaged(clips, count)
    command = [sys.executable, "-m", "seats_cli", "ask", str(clips), "what is said?", "-o", str(out)]
    command += ["--max-new-tokens", "8", *options]
    began = time.monotonic()
    problems: list[str] = []
    stderr, code = "", None
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, cwd=folder, env=_environment()
        )
        stderr, code = run.stderr, run.returncode
    except subprocess.TimeoutExpired:
        problems.append(f"not done after {timeout_s:g} s")
    seconds = time.monotonic() - began
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    by_name = {Path(record["path"]).name: record for record in records}
    if code not in (0, 1):
        problems.append(f"exit code {code}: {stderr[-300:]}")
    if "Traceback" in stderr:
        problems.append("a traceback on stderr")
    if sorted(by_name) != sorted(done) or len(records) != len(done):
        problems.append(f"{len(done) - len(by_name)} files without a record")
    for name, record in by_name.items():
        if record["error"] is not None and record["error"]["message"].startswith("unexpected"):
            problems.append(f"{name}: {record['error']['message']}")
    return {
        "seed": SEED,
        "files": count,
        "seconds": round(seconds, 1),
        "exit_code": code,
        "problems": problems,
        "answered": sum(record["ok"] for record in records),
        "answered_with_warnings": sum(record["ok"] and bool(record["warnings"]) for record in records),
        "errors": dict(Counter(r["error"]["kind"] for r in records if not r["ok"]).most_common()),
        "by_container": _table(by_name, {name: name.rpartition(".")[2] for name in done}),
        "by_damage": _table(by_name, done),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "slowest_read_s": max((r["timing"]["read_s"] for r in records if r["ok"]), default=None),
    }


def _table(records: Mapping[str, Mapping[str, Any]], group: Mapping[str, str]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for name, record in records.items():
        row = table.setdefault(group[name], {"answered": 0, "failed": 0})
        row["answered" if record["ok"] else "failed"] += 1
    return table


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        report = fuzz(int(sys.argv[1]), Path(place), timeout_s=3600)
    text = json.dumps(report, indent=1)
    Path(sys.argv[2]).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
