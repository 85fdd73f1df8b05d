"""Clips an hour of a batch, and how busy the GPU is meanwhile.

    python tests/batch/throughput.py phases OUT.json --clips 128 --paces 8x8,12x8
    python tests/batch/throughput.py gpus OUT.json --clips 200 --gpus 4,1,2,4,1 --cores 16
    python tests/batch/throughput.py turns OUT.json --clips 300

`phases`: in one session one clip after the other, and then so many readers x answers together. `gpus`: the
command itself on so many GPUs in turn, with so many clips and logical cores (both threads of a core; 0: all)
for each; from an early record to the last, as they are finished, so without loading (but `cpu_s`, of all
cores, is with it). There are four different clips under many names, 640x360 with sound. What a clip costs the
GPU hangs on its length, not on `--fps`; what it costs the cores, nearly all on their number.
`turns`: no file and no model: what comes of readers whose clips take unequal times to read, five times as
fast as the clock, in their turn and with clips that overtake others.
Without --model it is the 7B geometry with random weights.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
QUESTION = "what is said in this clip and who says it?"
LOOKS_S = 0.1
RATE, WIDTH, HEIGHT = 48_000, 640, 360
DIFFERENT = 4
SHARES = {"median": 0.5, "p90": 0.9, "most": 1.0}


# ---- clips ------------------------------------------------------------------------------------------------


def write_clip(path: Path, seconds: int, fps: int, seed: int) -> None:
    """H.264 and AAC: a box and a patterned background that both move, a tone that wavers."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    background = tiles.repeat(8, 0).repeat(8, 1)
    time_s = np.arange(seconds * RATE) / RATE
    sound = (0.3 * np.sin(2 * np.pi * (200 + 50 * np.sin(time_s)) * time_s)).astype(np.float32)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        for number in range(seconds * fps):
            picture = np.roll(background, (number * 3, number * 5), (0, 1))
            left = number * 7 % (WIDTH // 2)
            picture[HEIGHT // 4 : HEIGHT // 2, left : left + WIDTH // 6] = number * 3 % 255
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], "fltp", "mono")
            block.sample_rate, block.pts = RATE, start
            container.mux(audio.encode(block))
        container.mux(audio.encode())


def named(folder: Path, tag: str, count: int, asked: argparse.Namespace) -> Path:
    """A folder with so many names of the clips, which are written once."""
    place = folder / tag
    place.mkdir()
    sources = [folder / f"{number}.mp4" for number in range(min(DIFFERENT, count))]
    missing = {source: number for number, source in enumerate(sources) if not source.exists()}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda path: write_clip(path, asked.seconds, asked.fps, missing[path]), missing))
    for number in range(count):
        os.link(sources[number % DIFFERENT], place / f"{number:05d}.mp4")
    return place


# ---- the GPU ----------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[list[float]]:
    """Seconds and the first GPU's use in percent, in turns, as nvidia-smi tells; nothing without one."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0"]
    looks: list[float] = []
    with tempfile.TemporaryFile("w+") as log:
        try:
            watcher = subprocess.Popen([*command, "-lms", str(round(LOOKS_S * 1000))], stdout=log)
        except FileNotFoundError:
            yield looks
            return
        try:
            yield looks
        finally:
            watcher.kill()
            watcher.wait()
            log.seek(0)
            looks += [float(line) for line in log.read().split()]


def mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 1) if values else None


# ---- measurements -----------------------------------------------------------------------------------------


def phases(asked: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for one after the other, and for each pace, in one session."""
    from seats_cli.batch.decoders import PREFILLED, PREFILLED_ON_SMALL, Pace, cores
    from seats_cli.batch.records import Asking
    from seats_cli.batch.run import run_batch
    from seats_cli.batch.sources import Item
    from seats_cli.batch.streams import one_core_each
    from seats_cli.batch.team import answered
    from seats_cli.session import ModelOptions, Session

    asking = Asking(model_of(asked), {"max_new_tokens": asked.tokens, "ratio": asked.ratio})
    if asked.memory:
        import torch

        share = asked.memory * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    session = Session(ModelOptions(**asking.model))

    def run(tag: str, count: int, pace: Pace | None) -> dict[str, Any]:
        files = sorted(named(folder, tag, count, asked).iterdir())
        clips = [(Item(str(path), QUESTION, key=path.name),) for path in files]
        with watched() as looks:
            start = time.perf_counter()
            given: Iterable[dict[str, Any]] = (
                run_batch(session, clips, asking, ahead=0)
                if pace is None
                else answered(session, clips, asking, pace)
            )
            records = list(given)
            seconds = time.perf_counter() - start
        return {
            "pace": tag,
            "clips": count,
            "failed": sum(not record["ok"] for record in records),
            "errors": sorted({record["error"]["message"] for record in records if not record["ok"]}),
            "seconds": round(seconds, 2),
            "clips_per_hour": round(count / seconds * 3600),
            "gpu_utilisation": mean(looks),
        }

    paces = [
        Pace(
            readers,
            slots,
            max(1, cores() // readers) if readers else 0,
            overtake=None,
            prefilled=PREFILLED_ON_SMALL if 0 < asked.memory < 40 else PREFILLED,
        )
        for readers, slots in (map(int, pace.split("x")) for pace in asked.paces.split(","))
    ]
    with one_core_each(session.adapter.device):
        run("warm-up", 2, None)
        run("warm-up together", 8, paces[0])
        yield run("one after the other", max(4, asked.clips // 16), None)
        for pace in paces:
            name = f"{pace.readers} readers of {pace.threads} threads, {pace.slots} slots"
            yield run(name, asked.clips, pace)


def gpus(asked: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each number of GPUs."""
    for turn, count in enumerate(map(int, asked.gpus.split(","))):
        place = named(folder, f"turn {turn}", asked.clips * count, asked)
        out = folder / f"{turn}.jsonl"
        options = [
            item
            for name, value in model_of(asked).items()
            if name != "device"
            for item in (f"--{name.replace('_', '-')}", value)
        ]
        options += ["--max-new-tokens", str(asked.tokens), "--ratio", str(asked.ratio)]
        # In order, what other workers have finished would be counted when the slowest lets it be written.
        options += ["--unordered", "-o", str(out), *shlex.split(asked.options)]
        cores = whole_cores()[: asked.cores * count or None]
        began, lines, used_s = time.perf_counter(), [(0.0, 0)], children_s()
        with watched() as looks, tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "seats_cli", "ask", str(place), QUESTION, *options],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))},
                preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: B023 - run at once
                stderr=told,
            )
            while process.poll() is None:
                done = out.read_bytes().count(b"\n") if out.exists() else 0
                if done != lines[-1][1]:
                    lines.append((round(time.perf_counter() - began, 2), done))
                time.sleep(LOOKS_S)
            told.seek(0)
            said = told.read().strip()
        if not out.exists():
            sys.exit(f"the command ended with {process.returncode} and wrote nothing:\n{said}")
        yield steady(lines, 8 * count, looks) | {
            "seconds_a_clip": stages(out),
            "gpus": count,
            "cores": cores,
            "cpu_s": round(children_s() - used_s, 1),
            "summary": said.splitlines()[-1:],
        }


def stages(out: Path) -> dict[str, dict[str, float]]:
    """What each of a record's stages took: mean, median, nine tenths at most, most."""
    timings = [record["timing"] for record in map(json.loads, out.read_text().splitlines()) if record["ok"]]
    ordered = {name: sorted(timing[name] for timing in timings) for name in (timings or [{}])[0]}
    return {
        name: {
            "mean": round(statistics.mean(values), 3),
            **{key: round(values[int(share * (len(values) - 1))], 3) for key, share in SHARES.items()},
        }
        for name, values in ordered.items()
    }


def turns(asked: argparse.Namespace, _: Path) -> Iterator[dict[str, Any]]:
    """A row for each spread of the times that reading takes, in turn and overtaking."""
    import torch

    from seats_cli.batch.decoders import Pace
    from seats_cli.batch.reading import ClipReader, Listener
    from seats_cli.batch.records import Asking
    from seats_cli.batch.sources import Item

    faster, reading_s, answering_s, pace = 5, 2.1, 0.175, Pace(readers=15)

    class Sleeps:
        adapter = argparse.Namespace(device=torch.device("cpu"))

        def __init__(self, spread: float) -> None:
            self._sigma = math.sqrt(math.log(1 + spread**2))
            self._random = random.Random(0)

        def read(self, *_: Any, **options: Any) -> None:
            seconds = self._random.lognormvariate(math.log(reading_s) - self._sigma**2 / 2, self._sigma)
            time.sleep(seconds / faster)

    clips = [(Item(str(number), QUESTION, key=str(number)),) for number in range(asked.clips)]
    for spread in (0.2, 0.4, 0.8):
        for overtake in (0, None):
            session: Any = Sleeps(spread)
            start = time.perf_counter()
            with ClipReader(
                session,
                clips,
                Asking({}, {}),
                Listener(),
                ahead=pace.ahead,
                readers=pace.readers,
                overtake=overtake,
            ) as reader:
                while reader.take() is not None:
                    time.sleep(answering_s / faster)
            yield {
                "reading_s": reading_s,
                "spread": spread,
                "answering_s": answering_s,
                "readers": pace.readers,
                "ahead": pace.ahead,
                "overtake": overtake,
                "clips_per_s": round(len(clips) / (time.perf_counter() - start) / faster, 2),
            }


def whole_cores() -> list[int]:
    """The logical cores that this process may use, both threads of a core side by side, so that every number
    of GPUs gets the same share of the machine: the first half of a list by number is often every core's first
    thread."""
    allowed = os.sched_getaffinity(0)

    def core(number: int) -> tuple[int, int]:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        return (int(re.split("[,-]", siblings.read_text())[0]) if siblings.exists() else number), number

    return sorted(allowed, key=core)


def children_s() -> float:
    """Seconds that the cores have worked for processes that this one has started and seen end, and theirs."""
    times = os.times()
    return times.children_user + times.children_system


def steady(lines: list[tuple[float, int]], after: int, looks: list[float]) -> dict[str, Any]:
    """Rates from the first look that saw at least `after` records to the last record, and in the middle."""
    first = next((line for line in lines if line[1] >= after), lines[-1])
    total = lines[-1][1]
    middle = [line for line in lines if total / 5 <= line[1] <= total * 4 / 5] or lines[-1:]
    return {
        "records": total,
        "from": first[1],
        "seconds": round(lines[-1][0] - first[0], 2),
        "clips_per_hour": hourly(first, lines[-1]),
        "gpu_0_utilisation": mean(looks[round(first[0] / LOOKS_S) : round(lines[-1][0] / LOOKS_S)]),
        "middle_clips_per_hour": hourly(middle[0], middle[-1]),
        "middle_gpu_0_utilisation": mean(
            looks[round(middle[0][0] / LOOKS_S) : round(middle[-1][0] / LOOKS_S)]
        ),
        "lines_at_s": [line for before, line in pairwise(lines) if line[1] != before[1]],
    }


def hourly(start: tuple[float, int], end: tuple[float, int]) -> int | None:
    """Records an hour between two looks."""
    return round((end[1] - start[1]) / (end[0] - start[0]) * 3600) if end[0] > start[0] else None


def model_of(asked: argparse.Namespace) -> dict[str, str]:
    """Keywords of ModelOptions."""
    return {"model": asked.model, "device": asked.device, "load_format": asked.load_format}


MODES = {"phases": phases, "gpus": gpus, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=MODES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="omni-7b")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--seconds", type=int, default=64)
    parser.add_argument("--fps", type=int, default=30, help="frames a second of the clips")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--paces", default="8x8,12x8")
    parser.add_argument("--memory", type=float, default=0, help="of `phases`: GiB of the GPU for it")
    parser.add_argument("--gpus", default="1,2,4")
    parser.add_argument("--cores", type=int, default=0)
    parser.add_argument("--options", default="", help="of `gpus`: more of the command's, in one argument")
    asked = parser.parse_args()
    options = {name: value for name, value in vars(asked).items() if name != "out"}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in MODES[asked.what](asked, Path(folder)):
            rows.append(row)
            print({name: value for name, value in row.items() if name != "lines_at_s"}, flush=True)
            asked.out.write_text(
                json.dumps({"options": options, "cores": os.cpu_count(), "rows": rows}) + "\n"
            )


if __name__ == "__main__":
    main()
