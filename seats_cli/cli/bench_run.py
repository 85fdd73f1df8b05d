"""The run of `seats bench`: the clips, the model, the rounds, and the document at the end."""

import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seats_cli.cli import options as opt
from seats_cli.cli.bench_tables import bench_head, bench_notes, bench_tables
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_screen import EvalTerminal
from seats_cli.cli.loading import ended_like_ctrl_c, leaving_at_once, quieten_libraries
from seats_cli.errors import UsageError

if TYPE_CHECKING:
    from seats_cli.lab.bench import Row
    from seats_cli.lab.bench_input import Item
    from seats_cli.lab.settings import Setting
    from seats_cli.session import ModelOptions, Session

NEW_TOKENS = {"cuda": 100}  # by device; elsewhere:
FEW_NEW_TOKENS = 16


@dataclass(frozen=True)
class Synthetic:
    """What was typed of the synthetic clip; None: as is usual on the device. `size`: "caps" or pixels."""

    seconds: float | None
    frames: int | None
    fps: float
    size: Any
    text_tokens: int | None


@dataclass(frozen=True)
class BenchRequest:
    """One call of `seats bench`, checked. `model`: keywords of ModelOptions; `sampling`: of AskOptions."""

    files: tuple[Path, ...]
    clip: Synthetic
    sampling: Mapping[str, Any]
    sweep: tuple[str, tuple[float, ...]] | None
    settings: "tuple[Setting, ...]"
    against: str | None
    new_tokens: int | None
    repeats: int
    warmup: int
    check_flops: bool
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    form: str  # "table", "json" or "csv"
    output: Path | None
    plot: Path | None


def run_bench(terminal: EvalTerminal, request: BenchRequest) -> int:
    """Measure, then print the document. Returns the exit code."""
    with terminal.counting("runs") as progress:
        quieten_libraries(terminal)
        with leaving_at_once(terminal):
            from seats_cli.lab.bench import Bench, BenchOptions, Watcher, measure
            from seats_cli.lab.bench_input import usual_spec
            from seats_cli.session import ModelOptions, Session

            device = device_type(request.model["device"])
        n_tokens = request.new_tokens or NEW_TOKENS.get(device, FEW_NEW_TOKENS)
        bench = Bench(items_of(terminal, request, usual_spec(device)))
        options = BenchOptions(
            request.repeats, request.warmup, n_tokens, request.against is not None, request.check_flops
        )
        opened: list[Session] = []
        said: set[tuple[int, str]] = set()  # rows of one input often fail alike

        def open_session(model: "ModelOptions") -> "Session":
            opened[:] = []
            with leaving_at_once(terminal):
                opened.append(Session(model, log=terminal.detail, note=lambda _: None, warn=terminal.warn))
            return opened[0]

        def failed(row: "Row") -> None:
            if row.error is not None and (row.item, str(row.error)) not in said:
                said.add((row.item, str(row.error)))
                terminal.error(row.error, about=bench.items[row.item].name)

        if request.model["load_format"] == "dummy":
            terminal.warn("random weights (--load-format dummy): costs are real, answers mean nothing")
        interrupted = False
        try:
            with ended_like_ctrl_c():
                measure(
                    bench, open_session, ModelOptions(**request.model), request.settings, options,
                    Watcher(progress, failed, lambda item: terminal.detail(item.name)),
                )  # fmt: skip
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        terminal.note("interrupted: what is done is shown" if bench.order else "interrupted")
    if not opened or not (bench.order or any(row.error for row in bench.rows)):
        return opt.INTERRUPTED
    show(terminal, request, document_of(request, bench, opened[0], n_tokens))
    if interrupted:
        return opt.INTERRUPTED
    return 1 if any(row.error is not None for row in bench.rows) else 0


def device_type(asked: str) -> str:
    """ "cuda", "mps" or "cpu", as loading will choose."""
    if asked != "auto":
        return asked.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def items_of(terminal: Terminal, request: BenchRequest, usual: Any) -> "list[Item]":
    """Files, or the synthetic clip at each value of the sweep; `usual` fills in what was not typed."""
    from dataclasses import replace

    from seats_cli.lab.bench_input import Item
    from seats_cli.session import AskOptions

    if request.files:
        sampling = AskOptions(**request.sampling).sampling
        return [Item(path, sampling, terminal.warn) for path in request.files]
    key, values = request.sweep or ("", (0.0,))
    asked = request.clip
    items = []
    for value in values if key in ("seconds", "frames") else (0.0,):
        seconds = value if key == "seconds" else asked.seconds or usual.seconds
        frames = int(value) if key == "frames" else asked.frames
        size = usual.size if asked.size is None else None if asked.size == "caps" else asked.size
        spec = replace(usual, seconds=seconds, size=size, text_tokens=asked.text_tokens)
        items.append(Item(replace(spec, frames=round(seconds * asked.fps) if frames is None else frames)))
    return items


# ---- the document -----------------------------------------------------------------------------------------


def document_of(request: BenchRequest, bench: Any, session: "Session", n_tokens: int) -> dict[str, Any]:
    """What --json prints."""
    from seats_cli.lab.bench_document import document

    options = {
        **request.model,
        **request.options,
        "files": [str(path) for path in request.files],
        **({key: request.sampling[key] for key in request.sampling} if request.files else {}),
        "against": request.against,
        "new_tokens": n_tokens,
        "repeats": request.repeats,
        "warmup": request.warmup,
        "check_flops": request.check_flops,
    }
    sweep = None if request.sweep is None else dict(zip(("key", "values"), request.sweep, strict=True))
    found = document(bench, session, options, sweep)
    typed = {"command": shlex.join(["seats", *sys.argv[1:]])} if "bench" in sys.argv else {}
    date = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    return {"schema_version": found.pop("schema_version"), **typed, **date, **found}


def show(terminal: EvalTerminal, request: BenchRequest, found: Mapping[str, Any]) -> None:
    """Print the rows in the form that was asked for, then write the files."""
    if request.form == "json":
        terminal.document(found)
    elif request.form == "csv":
        from seats_cli.lab.bench_document import as_csv

        terminal.answer_piece(as_csv(dict(found)))
    else:
        for line in bench_head(found):
            terminal.answer(line)
        for table in bench_tables(found):
            terminal.answer("")
            Terminal.report(
                terminal, table
            )  # aligned words also for a person: boxes would not fit 80 columns
        for line in bench_notes(found):
            terminal.answer(line)
    if request.output is not None:
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        try:
            request.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {request.output}: {error.strerror or error}") from None
        terminal.note(f"wrote {request.output}")
    if request.plot is not None and any(row["samples"] for row in found["rows"]):
        from seats_cli.lab.bench_plot import plot_bench

        plot_bench(found, request.plot)
        terminal.note(f"wrote {request.plot}")
