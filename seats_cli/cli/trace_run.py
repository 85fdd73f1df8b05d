"""The run of `seats trace`: who measures, the document, the tables and files made of it."""

import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seats_cli.cli import options as opt
from seats_cli.cli.console import Table
from seats_cli.cli.eval_run import Told, finished, kept_in, note_model, say_size
from seats_cli.cli.eval_screen import EvalTerminal, counted
from seats_cli.cli.loading import EMBEDDED_NOTICE, ended_like_ctrl_c, leaving_at_once, quieten_libraries
from seats_cli.cli.suite_options import Suite
from seats_cli.cli.tables import NONE
from seats_cli.errors import DeviceError

if TYPE_CHECKING:
    from seats_cli.lab.boundaries import Boundaries
    from seats_cli.lab.records import Record
    from seats_cli.lab.settings import Setting
    from seats_cli.lab.sweep import ClipTask, Team
    from seats_cli.lab.tracing import Tracing

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TraceRequest:
    """What to measure, checked. `model`: keywords of ModelOptions; `questions`: the most of a clip."""

    manifest: Path | None
    suite: Suite
    questions: int | None
    setting: "Setting"
    tracing: "Tracing"
    model: Mapping[str, Any]
    workers: int | None
    output: Path | None
    options: Mapping[str, Any]


# ---- the run ----------------------------------------------------------------------------------------------


def run_trace(
    terminal: EvalTerminal,
    request: TraceRequest,
    tolerance: float,
    plot: Path | None,
    preset: Path | None,
    as_json: bool,
) -> int:
    """Measure what is not in the file yet, then show it. Returns the exit code."""
    from seats_cli.lab.manifest import read_manifest
    from seats_cli.lab.records import RecordFile

    samples = None if request.manifest is None else read_manifest(request.manifest, need_answers=False)
    with ExitStack() as stack:
        stack.enter_context(ended_like_ctrl_c())
        file = None
        if request.output is not None:
            file = stack.enter_context(RecordFile(request.output, warn=terminal.warn))
        progress = stack.enter_context(terminal.counting("questions"))
        quieten_libraries(terminal)
        with leaving_at_once(terminal):
            from seats_cli.batch.devices import choose_workers
            from seats_cli.lab.sweep import by_setting, keys_of, manifest_tasks, suite_tasks, sweep
            from seats_cli.lab.tracing import with_fewer_questions

            say_size(terminal, request.suite, samples is None)
            tasks = suite_tasks(*request.suite) if samples is None else manifest_tasks(samples)
            tasks = with_fewer_questions(tasks, request.questions)
            model = request.model
            devices = choose_workers(request.workers, len(tasks), model)
        settings = (request.setting,)
        team = finished(file, tasks, settings, request.tracing, model, devices)
        if team is None:
            team = gather(terminal, request, devices, stack)
            note_model(file, team, settings, request.tracing, model, devices)
        if request.manifest is not None and model["model"] == opt.EMBEDDED_MODEL:
            terminal.note(EMBEDDED_NOTICE)
        if model["load_format"] == "dummy":
            terminal.warn("random weights (--load-format dummy): what is measured means nothing")
        keys = keys_of(tasks, settings, request.tracing, team.described)
        wanted = {key for jobs in keys for key in jobs.values()}
        kept = kept_in(terminal, file, wanted)
        interrupted = False
        try:
            sweep(team, tasks, keys, kept, Told(terminal, file, progress).listener())
        except KeyboardInterrupt:
            interrupted = True
        terminal.subject = None
        records = by_setting(settings, keys, kept)[request.setting]
        size = team.size
    if interrupted:
        told = "the same command goes on from there" if file is not None else "-o FILE would have kept them"
        terminal.note(f"interrupted: {len(kept)} of {len(wanted)} questions; {told}")
    say_losses(terminal, request, records)
    if any(record["error"] is None for record in records):
        traced = document(request, team, records, size, complete=len(kept) == len(wanted))
        files = (None, None) if interrupted else (plot, preset)
        show(terminal, traced, tolerance, *files, as_json)
    if interrupted:
        return opt.INTERRUPTED
    return 1 if any(record["error"] is not None for record in records) else 0


def show_saved(
    terminal: EvalTerminal,
    path: Path,
    tolerance: float,
    plot: Path | None,
    preset: Path | None,
    as_json: bool,
) -> int:
    """The same from a document that was printed before. Returns the exit code."""
    from seats_cli.lab.trace_document import read_document

    show(terminal, read_document(path), tolerance, plot, preset, as_json)
    return 0


def gather(terminal: EvalTerminal, request: TraceRequest, devices: Sequence[str], stack: ExitStack) -> "Team":
    """Workers, one a device, or a session in this process; the stack ends them."""
    if len(devices) == 1:
        return alone(terminal, request)
    with leaving_at_once(terminal):
        from seats_cli.lab.trace_team import TracingCrew

    terminal.detail(f"{len(devices)} workers on {', '.join(dict.fromkeys(devices))}")
    try:
        crew = TracingCrew(
            devices,
            request.model,
            (request.setting,),
            request.tracing,
            warn=terminal.warn,
            log=terminal.detail,
        )
    except DeviceError as error:
        if request.workers is not None:
            raise
        terminal.warn(f"no device has room for a worker's model: {error} Going on in one process.")
        return alone(terminal, request)
    return stack.enter_context(crew)


def alone(terminal: EvalTerminal, request: TraceRequest) -> "Team":
    """A session in this process, which says why it chose what while it loads, and then tells losses only."""
    with leaving_at_once(terminal):
        from seats_cli.lab.trace_team import TracingAlone, describe_trace
        from seats_cli.session import ModelOptions, Session

    loading = True

    def log(message: str) -> None:
        if loading:
            terminal.detail(message)

    def at(task: "ClipTask") -> None:
        terminal.subject = task.clip

    session = Session(ModelOptions(**request.model), log=log, note=lambda _: None, warn=terminal.warn)
    loading = False
    described = describe_trace(session, request.setting, request.tracing)
    return TracingAlone(session, request.setting, request.tracing, described, at)


def say_losses(terminal: EvalTerminal, request: TraceRequest, records: "Sequence[Record]") -> None:
    """Questions that are in no number, those that do not fit the model with why, and answers cut off."""
    from seats_cli.lab.records import is_unplanned

    for record in records:
        if is_unplanned(record):
            terminal.warn(record["error"]["message"])
    failed = sum(record["error"] is not None for record in records)
    if failed:
        terminal.note(f"{counted(failed, 'question')} of {len(records)} failed, in no number here")
    limit = request.tracing.max_new_tokens
    cut = sum(record["tokens"]["generated"] >= limit for record in records if record["error"] is None)
    if cut:
        terminal.note(f"{counted(cut, 'answer')} cut off at --max-new-tokens {limit}")


# ---- the document -----------------------------------------------------------------------------------------


def document(
    request: TraceRequest, team: "Team", records: "Sequence[Record]", workers: int, *, complete: bool
) -> dict[str, Any]:
    """What --json prints, without the boundaries."""
    from seats_cli.lab.trace_document import curves_of_records

    described = team.described
    resolved = described.resolved[0]
    typed = {"command": shlex.join(["seats", *sys.argv[1:]])} if "trace" in sys.argv else {}
    return {
        "schema_version": SCHEMA_VERSION,
        **typed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "complete": complete,
        "environment": {**described.environment, "workers": workers},
        "options": {**request.model, **request.options},
        "model": {"name": described.model["model"], "weights": described.model["weights"], **resolved},
        "failed": sum(record["error"] is not None for record in records),
        **curves_of_records(records, resolved["layers"]),
    }


def show(
    terminal: EvalTerminal,
    traced: Mapping[str, Any],
    tolerance: float,
    plot: Path | None,
    preset: Path | None,
    as_json: bool,
) -> None:
    """Print the document as JSON or tables, then write the files that were asked for."""
    from seats_cli.lab.boundaries import propose

    found = propose(traced, tolerance) if traced["removal"] else None
    if as_json:
        terminal.document({**traced, "boundaries": None if found is None else found.to_json()})
    else:
        for table in trace_tables(traced, found):
            terminal.report(table)
        for line in proposal_lines(traced, found):
            terminal.answer(line)
    if plot is not None:
        from seats_cli.lab.plot import plot_trace

        plot_trace(traced, found, plot)
        terminal.note(f"drawn: {plot}")
    if preset is not None:
        write(terminal, traced, found, preset)


def write(terminal: EvalTerminal, traced: Mapping[str, Any], found: "Boundaries | None", path: Path) -> None:
    """Write the proposal as a preset. Raises UsageError where there is none."""
    from seats_cli.errors import UsageError
    from seats_cli.lab.preset_file import base_preset, trace_provenance, traced_preset, write_traced

    if found is None:
        raise UsageError("this trace has no removal curve to make a preset of")
    base = base_preset(traced)
    schedule = found.schedule(traced["n_layers"], base.schedule)
    provenance = trace_provenance(traced, found)
    write_traced(path, traced_preset(traced, base, schedule, provenance=provenance))
    terminal.note(f"written: {path}, for --preset {path}")


# ---- tables -----------------------------------------------------------------------------------------------


def trace_tables(traced: Mapping[str, Any], found: "Boundaries | None") -> list[Table]:
    """What is left by layer with the attention beside it, then the other curves that were measured."""
    from seats_cli.lab.boundaries import blocks_of

    measure, full = traced["measure"], traced["full"]
    asked = f"{counted(traced['samples'], 'question')}, {counted(traced['clips'], 'clip')}"
    of = f"{traced['model']['name']}, {asked}"
    whole = f"{measure} with all tokens {with_interval(full, measure)}%"
    blocks = blocks_of(found, traced["n_layers"]) if found is not None else []
    tables = []
    removed = {(row["kind"], row["layer"]): row for row in traced["removal"]}
    looks = {row["layer"]: row for row in traced["attention"]}
    layers = sorted({layer for _, layer in removed if layer <= traced["n_layers"]} | looks.keys())
    if layers:
        columns = ["from layer", *(["no video", "no audio", "neither"] if removed else [])]
        columns += ["to video", "to audio", "to text"] if looks else []
        columns += ["block"] if blocks else []
        lines = []
        for layer in layers:
            line = [str(layer)]
            if removed:
                line += [share(removed.get((kind, layer)), measure) for kind in ("video", "audio")]
                line.append(with_interval(removed.get(("both", layer)), measure))
            if looks:
                line += [share(looks.get(layer), kind) for kind in ("video", "audio", "text")]
            if blocks:
                line.append(next(name for name, first, last in blocks if first <= layer <= last))
            lines.append(tuple(line))
        told = f"{measure} left when tokens are removed from a layer on" if removed else ""
        seen = "the last text token's attention there" if looks else ""
        title = f"{of}; {whole}\n{'; '.join(part for part in (told, seen) if part)}; all in %"
        tables.append(Table(title, tuple(columns), tuple(lines)))
    if traced["choice"]:
        tables.append(choice_table(traced["choice"], measure))
    if traced["entry"]:
        tables.append(entry_table(traced["entry"], measure))
    return tables


def choice_table(rows: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """A row a layer, a column for each kind and kept share."""
    known = {(row["after_layer"], row["kind"], row["keep"]): row for row in rows}
    layers = sorted({row["after_layer"] for row in rows})
    heads = sorted({(row["kind"], row["keep"]) for row in rows}, key=lambda h: (h[0] != "both", h[0], h[1]))
    lines = [(str(at), *(share(known.get((at, *head)), measure) for head in heads)) for at in layers]
    title = f"{measure} left, %, when only the most attended share of a kind stays after a layer"
    return Table(title, ("after layer", *(f"{kind} {100 * keep:g}%" for kind, keep in heads)), tuple(lines))


def entry_table(rows: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """A row a share that enters, a column a kind."""
    known = {(row["kind"], row["entry"]): row for row in rows}
    shares = sorted({row["entry"] for row in rows})
    lines = [
        (f"{100 * enters:g}%", *(share(known.get((kind, enters)), measure) for kind in ("video", "audio")))
        for enters in shares
    ]
    title = f"{measure} left, %, when only stage I's choice of a kind enters"
    return Table(title, ("entering", "video", "audio"), tuple(lines))


def proposal_lines(traced: Mapping[str, Any], found: "Boundaries | None") -> list[str]:
    """The boundaries in words."""
    from seats_cli.lab.boundaries import blocks_of

    if found is None:
        return []
    lines = []
    blocks = blocks_of(found, traced["n_layers"])
    if blocks:
        parts = [f"{name} {span(first, last)}" for name, first, last in blocks]
        drops = ", ".join(map(str, found.drop_layers)) or "none"
        lines.append(
            f"proposed (by {found.measure}, tolerance {found.tolerance:g}): {', '.join(parts)}; "
            f"late layer {found.late_layer or 'none'}; drops after {drops}"
        )
    return lines + [f"note: {note}" for note in found.notes]


def span(first: int, last: int) -> str:
    """ "1 to 4", or "5" where it is one."""
    return str(first) if first == last else f"{first} to {last}"


def share(row: Mapping[str, Any] | None, key: str) -> str:
    """A fraction of a row in percent; a dash where it was not measured."""
    return NONE if row is None or row[key] is None else f"{100 * row[key]:.1f}"


def with_interval(row: Mapping[str, Any] | None, key: str) -> str:
    """The same with its interval where it has one."""
    if row is None or row["low"] is None:
        return share(row, key)
    return f"{share(row, key)} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
