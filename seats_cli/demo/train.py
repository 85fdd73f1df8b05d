"""Train the embedded model on one GPU: `python -m seats_cli.demo.train --out FOLDER`.

Seeded and resumable (`--resume`); the recipe is train.yaml beside this file. What it does differently from a
plain chat fine-tune is in docs/demo-model.md: packed questions, auxiliary losses, Muon, and late removal,
which teaches the model to do without audio-visual tokens in its last layers.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from torch import Tensor

from seats_cli.demo.batches import Size
from seats_cli.demo.checkpoint import write_checkpoint
from seats_cli.demo.trainer import Outputs, Trainer

LOG_EVERY = 25


@dataclass(frozen=True)
class Phase:
    """A stretch of training: steps first..end, batches of `sizes` in turn; see train.yaml."""

    number: int
    first: int
    end: int
    sizes: tuple[tuple[float, int], ...]  # seconds a clip, clips a step
    lr: tuple[float, float]
    warmup: int
    disguised: bool

    def learning_rate(self, step: int) -> float:
        """Share of the peak rate at `step`: linear from lr[0] to lr[1], warmed up."""
        share = self.lr[0] + (self.lr[1] - self.lr[0]) * (step - self.first) / (self.end - self.first)
        return share * min(1.0, (step - self.first + 1) / max(1, self.warmup))


def phases_of(config: dict[str, Any]) -> tuple[Phase, ...]:
    """The phases of a recipe, one after the other."""
    found: list[Phase] = []
    first = 0
    for number, row in enumerate(config["phases"]):
        sizes = tuple((float(seconds), int(clips)) for seconds, clips in row["sizes"])
        low, high = row["lr"]
        end = first + row["steps"]
        found.append(Phase(number, first, end, sizes, (low, high), row["warmup"], row["disguised"]))
        first = end
    return tuple(found)


class Log:
    """log.jsonl: one JSON object a line, with the seconds since the start of this process's training."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.begin = file, time.monotonic()
        self.clock, self.clips = self.begin, 0

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begin

    def restart_clock(self) -> None:
        """Leave what was done until now out of the next rate."""
        self.clock, self.clips = time.monotonic(), 0

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append a row."""
        line = json.dumps({"step": step, "seconds": round(self.seconds(), 1)} | row)
        self.file.write(line + "\n")
        if step % 500 == 0 or "lr" not in row:
            print(line, flush=True)

    def losses(self, step: int, share: float, out: Outputs, norm: Tensor) -> None:
        """Append losses and speed; RuntimeError where they are not finite."""
        answer, encoder, sync, gradient = (x.item() for x in (out.answer, out.encoder, out.sync, norm))
        if not math.isfinite(answer + encoder + sync + gradient):
            raise RuntimeError(f"training diverged at step {step}: loss {answer}, gradient norm {gradient}")
        rate = round(self.clips / (time.monotonic() - self.clock))
        losses = {"answer": round(answer, 4), "encoder": round(encoder, 4), "sync": round(sync, 4)}
        self.write(step, {"lr": round(share, 4), "clips_per_s": rate} | losses)
        self.restart_clock()


@dataclass(frozen=True)
class Run:
    """From where to where. first: the step to begin with; fresh_probes: its weights came without probes."""

    out: Path
    first: int = 0
    fresh_probes: bool = False
    stop_after_s: float = math.inf
    evaluate: bool = True


def _steps(trainer: Trainer, phases: Sequence[Phase], first: int) -> Iterator[tuple[Phase, int, Size, Any]]:
    """Phase, step, size and batch of every step from `first` on."""
    for phase in phases:
        begin = max(first, phase.first)
        if begin >= phase.end:
            continue
        sizes = tuple(trainer.size(seconds, clips) for seconds, clips in phase.sizes)
        index = phase.number * 1_000_000 + begin - phase.first
        made = trainer.batches(sizes, "train", index, phase.end - begin)
        for step, (size, batch) in enumerate(made, begin):
            yield phase, step, size, batch


def train(trainer: Trainer, run: Run) -> int:
    """Train from run.first to the end; writes log.jsonl, state.pt and checkpoint/. Returns the last step."""
    config, phases = trainer.config, phases_of(trainer.config)
    removal, every = config["late_removal"]["start"], config["evaluation"]["every"]
    weights = {name: config["auxiliary"][name] for name in ("encoder", "sync")}
    step = run.first
    with (run.out / "log.jsonl").open("a", buffering=1) as file:
        log = Log(file)
        for phase, number, size, batch in _steps(trainer, phases, run.first):
            generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + number)
            trainer.noise.seed(number)
            dropped = trainer.late_layers(size.clips, generator, number >= removal)
            settling = run.fresh_probes and number - run.first < phase.warmup
            with torch.autocast(trainer.device.type, torch.bfloat16):
                out = trainer.run(batch, size.seconds, dropped, True, phase.disguised, probes_only=settling)
            share = phase.learning_rate(number)
            shares = (share, 1.0 if settling else share)
            norm = trainer.step(out, shares, clip=config["clip_gradient"], **weights)
            step, log.clips = number + 1, log.clips + size.clips
            if step % LOG_EVERY == 0:
                log.losses(step, share, out, norm)
            if step % every == 0 and step != phases[-1].end:
                first_size = trainer.size(*phase.sizes[0])
                scores = trainer.evaluate("dev", first_size, config["evaluation"]["clips"], (None, 9))
                log.write(step, {"split": "dev", "clip_seconds": first_size.seconds, "late": scores})
                trainer.save(run.out / "state.pt", step)
                log.restart_clock()
            if log.seconds() > run.stop_after_s:
                break
        trainer.save(run.out / "state.pt", step)
        write_checkpoint(run.out / "checkpoint", trainer.thinker, config["frame_size"])
        if run.evaluate:
            _final_evaluation(trainer, log, step)
    return step


def _final_evaluation(trainer: Trainer, log: Log, step: int) -> None:
    for split, seconds, per_batch, clips, late in trainer.config["evaluation"]["final"]:
        scores = trainer.evaluate(split, trainer.size(float(seconds), per_batch), clips, late)
        log.write(step, {"split": split, "clip_seconds": seconds, "clips": clips, "late": scores})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seats_cli.demo.train", description=__doc__)
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder for log.jsonl, state.pt and checkpoint/")
    option("--config", type=Path, default=Path(__file__).with_name("train.yaml"))
    option("--voices", type=Path, help="exported word bank (default: the one in the package)")
    option("--resume", action="store_true", help="continue from OUT/state.pt where it exists")
    option("--init", type=Path, metavar="FOLDER", help="start from a checkpoint's weights")
    option("--start-phase", type=int, default=1, metavar="N", help="skip the phases before (with --init)")
    option("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="stop early, resumable")
    option("--skip-evaluation", action="store_true", help="do not evaluate at the end")
    option("--device", default="cuda")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the trainer."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    config = yaml.safe_load(chosen.config.read_text())
    phases = phases_of(config)
    if not 1 <= chosen.start_phase <= len(phases):
        parser.error(f"--start-phase must be 1 to {len(phases)}")
    if chosen.start_phase > 1 and chosen.init is None:
        parser.error("--start-phase needs the weights of the phases before: give --init FOLDER")
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("training needs a CUDA device; --device cpu is meant for tests")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.automatic_dynamic_shapes = False  # every size has its own static shapes
    torch._dynamo.config.recompile_limit = 64
    trainer = Trainer(config, torch.device(chosen.device), chosen.voices)
    count = sum(p.numel() for p in trainer.thinker.parameters())
    print(f"{count / 1e6:.2f} M parameters", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    first, fresh, state = phases[chosen.start_phase - 1].first, False, chosen.out / "state.pt"
    if chosen.resume and state.exists():
        first = trainer.load(state)
    elif chosen.init is not None:
        trainer.start_from(chosen.init)
        fresh = True
    train(trainer, Run(chosen.out, first, fresh, chosen.stop_after, not chosen.skip_evaluation))


if __name__ == "__main__":
    main()
