"""The run of `seats eval`: what is in the file already, who answers, and the document at the end."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seats_cli.cli import options as opt
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_screen import EvalTerminal, Progress, counted, result_tables, row_notes
from seats_cli.cli.loading import EMBEDDED_NOTICE, ended_like_ctrl_c, leaving_at_once, quieten_libraries
from seats_cli.errors import DeviceError, SeatsError

if TYPE_CHECKING:
    from seats_cli.lab.records import Record, RecordFile
    from seats_cli.lab.results import Row
    from seats_cli.lab.settings import Setting
    from seats_cli.lab.sweep import Asking, ClipTask, Described, Listener, Team

SCHEMA_VERSION = 1
MANY_CLIPS = 200
MOST_ERRORS = 5  # failures that are told one by one


@dataclass(frozen=True)
class EvalRequest:
    """One call of `seats eval`, checked. `model`: keywords of ModelOptions."""

    manifest: Path | None
    suite: tuple[Any, ...]  # clips, seed, split, seconds
    settings: "tuple[Setting, ...]"
    varied: tuple[str, ...]
    against: str
    asking: "Asking"
    model: Mapping[str, Any]
    workers: int | None
    output: Path | None
    form: str  # "table", "json" or "csv"
    options: Mapping[str, Any]


# ---- the run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run came to: `done` answers of the `whole`, and whose model gave them."""

    tasks: "Sequence[ClipTask]"
    records: "Mapping[Setting, Sequence[Record]]"
    described: "Described"
    workers: int
    done: int
    whole: int


def run_sweep(terminal: EvalTerminal, request: EvalRequest) -> int:
    """Run what is not in the file yet, then print the document. Returns the exit code."""
    from seats_cli.lab.manifest import read_manifest
    from seats_cli.lab.records import RecordFile, has_failed

    samples = None if request.manifest is None else read_manifest(request.manifest)
    with ExitStack() as stack:
        stack.enter_context(ended_like_ctrl_c())
        file = None
        if request.output is not None:
            file = stack.enter_context(RecordFile(request.output, warn=terminal.warn))
        progress = stack.enter_context(terminal.counting("answers"))
        quieten_libraries(terminal)
        with leaving_at_once(terminal):
            from seats_cli.batch.devices import choose_workers
            from seats_cli.lab.sweep import (
                by_setting,
                check_caps,
                keys_of,
                manifest_tasks,
                suite_tasks,
                sweep,
            )

            say_size(terminal, request.suite, samples is None)
            tasks = suite_tasks(*request.suite) if samples is None else manifest_tasks(samples)
            model = request.model
            devices = choose_workers(request.workers, len(tasks), model)
        team = finished(file, tasks, request.settings, request.asking, model, devices)
        if team is None:
            team = gather(terminal, request, devices, stack)
            note_model(file, team, request.settings, request.asking, model, devices)
        check_caps(request.settings, team.described)
        if request.manifest is not None and model["model"] == opt.EMBEDDED_MODEL:
            terminal.note(EMBEDDED_NOTICE)
        if model["load_format"] == "dummy":
            terminal.warn("random weights (--load-format dummy): costs are real, accuracy means nothing")
        keys = keys_of(tasks, request.settings, request.asking, team.described)
        wanted = {key for jobs in keys for key in jobs.values()}
        kept = kept_in(terminal, file, wanted)
        interrupted = False
        try:
            sweep(team, tasks, keys, kept, Told(terminal, file, progress).listener())
        except KeyboardInterrupt:
            interrupted = True
        terminal.subject = None
        records = by_setting(request.settings, keys, kept)
        outcome = Outcome(tasks, records, team.described, team.size, len(kept), len(wanted))
    if interrupted:
        told = "the same command goes on from there" if file is not None else "-o FILE would have kept them"
        so_far = f": {outcome.done} of {outcome.whole} answers; {told}" if outcome.done else ""
        terminal.note(f"interrupted{so_far}")
    if outcome.done:
        show(terminal, request, outcome)
    if interrupted:
        return opt.INTERRUPTED
    return 1 if any(has_failed(record) for found in records.values() for record in found) else 0


def gather(terminal: EvalTerminal, request: EvalRequest, devices: Sequence[str], stack: ExitStack) -> "Team":
    """Workers, one a device, or a session in this process; the stack ends them."""
    if len(devices) == 1:
        return alone(terminal, request)
    from seats_cli.lab.workers import Crew

    terminal.detail(f"{len(devices)} workers on {', '.join(dict.fromkeys(devices))}")
    log, warn = terminal.detail, terminal.warn
    try:
        crew = Crew(devices, request.model, request.settings, request.asking, warn=warn, log=log)
    except DeviceError as error:
        if request.workers is not None:
            raise
        terminal.warn(f"no device has room for a worker's model: {error} Going on in one process.")
        return alone(terminal, request)
    return stack.enter_context(crew)


def alone(terminal: EvalTerminal, request: EvalRequest) -> "Team":
    """A session in this process, which says why it chose what while it loads, and then tells losses only."""
    with leaving_at_once(terminal):
        from seats_cli.lab.sweep import Alone, describe
        from seats_cli.session import ModelOptions, Session

    loading = True

    def log(message: str) -> None:
        if loading:
            terminal.detail(message)

    def at(task: "ClipTask") -> None:
        terminal.subject = task.clip

    options = ModelOptions(**request.model)
    session = Session(options, log=log, note=lambda _: None, warn=terminal.warn)
    loading = False
    described = describe(session, request.settings, request.asking)
    return Alone(session, request.settings, request.asking, described, at)


def finished(
    file: "RecordFile | None",
    tasks: "Sequence[ClipTask]",
    settings: "Sequence[Setting]",
    asking: "Asking",
    model: Mapping[str, Any],
    devices: Sequence[str],
) -> "Team | None":
    """A team without a model, where the file has every answer already and knows whose they are."""
    if file is None or not file.runs:
        return None
    from seats_cli.lab.finished import Finished, noted, run_key
    from seats_cli.lab.records import has_failed
    from seats_cli.lab.sweep import keys_of

    described = noted(file, run_key(model, settings, asking, devices))
    if described is None:
        return None
    wanted = {key for jobs in keys_of(tasks, settings, asking, described) for key in jobs.values()}
    if not all(key in file.known and not has_failed(file.known[key]) for key in wanted):
        return None
    return Finished(described, len(devices))


def note_model(
    file: "RecordFile | None",
    team: "Team",
    settings: "Sequence[Setting]",
    asking: "Asking",
    model: Mapping[str, Any],
    devices: Sequence[str],
) -> None:
    """Leave in the file what the team's model is, so that a run with nothing left to do needs none."""
    from seats_cli.lab.finished import note, run_key

    if file is not None:
        note(file, run_key(model, settings, asking, devices), team.described)


def say_size(terminal: Terminal, suite: Sequence[Any], from_suite: bool) -> None:
    """A word before a suite so large that drawing it takes a while."""
    if from_suite and suite[0] >= MANY_CLIPS:
        terminal.note(f"drawing {suite[0]} clips of the suite with their questions: this takes a while")


def kept_in(terminal: Terminal, file: "RecordFile | None", wanted: AbstractSet[str]) -> "dict[str, Record]":
    """The answers of this run that a file has already. Failures are tried again. Raises UsageError for a line
    of this run that lacks something."""
    if file is None or not file.known:
        return {}
    from seats_cli.lab.record_shape import is_whole
    from seats_cli.lab.records import has_failed

    mine = file.known.keys() & wanted
    for key in mine:
        if not is_whole(file.known[key]):
            raise file.damaged(key)
    kept = {key: file.known[key] for key in mine if not has_failed(file.known[key])}
    others = len(file.known) - len(mine)
    if mine:
        again = f", {len(mine) - len(kept)} failed and are tried again" if len(kept) < len(mine) else ""
        terminal.note(f"{file.path} has {len(kept)} of {len(wanted)} answers already{again}")
    if others:
        what = f"{counted(others, 'answer')} of other models, versions, settings or clips"
        terminal.note(f"{file.path} also has {what}: left alone")
    return kept


class Told:
    """What is done with the news of a sweep: records go to the file, failures and losses to stderr."""

    def __init__(self, terminal: EvalTerminal, file: "RecordFile | None", progress: Progress) -> None:
        self.terminal, self.file, self.progress = terminal, file, progress
        self.failures: set[tuple[str, str]] = set()

    def listener(self) -> "Listener":
        """The callbacks."""
        from seats_cli.lab.sweep import Listener

        return Listener(record=self.record, progress=self.progress, warn=self.warn)

    def record(self, record: "Record") -> None:
        """Keep it; a failure that the file has already in the same words is not written twice."""
        from seats_cli.lab.records import has_failed

        if self.file is not None:
            before = self.file.known.get(record["key"])
            if before is None or before["error"] != record["error"]:
                self.file.append(record)
        if has_failed(record):
            self.fail(record["clip"], record["error"])

    def fail(self, clip: str, error: Mapping[str, Any]) -> None:
        """Tell a failure once a clip, and of the first few clips only."""
        if (clip, error["message"]) in self.failures:
            return
        self.failures.add((clip, error["message"]))
        if len(self.failures) <= MOST_ERRORS:
            self.terminal.error(SeatsError(error["message"], hint=error["hint"]), about=clip)
        elif len(self.failures) == MOST_ERRORS + 1:
            where = f"{self.file.path} has them all" if self.file is not None else "-o FILE keeps them all"
            self.terminal.warn(f"more clips fail; {where}")

    def warn(self, message: str, clip: str | None) -> None:
        """A loss that a worker tells of."""
        self.terminal.subject = clip
        self.terminal.warn(message)
        self.terminal.subject = None


# ---- the document -----------------------------------------------------------------------------------------


def show(terminal: EvalTerminal, request: EvalRequest, outcome: Outcome) -> None:
    """Print the rows in the form that was asked for."""
    from seats_cli.lab.results import as_csv, summarise

    rows = summarise(outcome.records, against=request.against)
    limit = request.asking.max_new_tokens
    answered = (record for found in outcome.records.values() for record in found if record["tokens"])
    cut = sum(record["tokens"]["generated"] >= limit for record in answered)
    if cut:
        terminal.note(f"{counted(cut, 'answer')} cut off at --max-new-tokens {limit}")
    if request.form == "csv":
        terminal.answer_piece(as_csv(rows))
    elif request.form == "json":
        terminal.document(document(request, outcome, rows))
    else:
        for table in result_tables(rows, title(request, outcome), request.varied):
            terminal.report(table)
        for line in row_notes(rows):
            terminal.answer(line)


def title(request: EvalRequest, outcome: Outcome) -> str:
    """What was asked of whom."""
    clips, seed, split, seconds = request.suite
    suite = f"suite {split}, clips {seed} to {seed + clips - 1} of {seconds:g} s"
    n_samples = sum(len(task.samples) for task in outcome.tasks)
    parts = [
        suite if request.manifest is None else f"{request.manifest}: {counted(len(outcome.tasks), 'clip')}",
        counted(n_samples, "question"),
        str(outcome.described.environment["model"]),
    ]
    if outcome.done < outcome.whole:
        parts.append(f"interrupted after {outcome.done} of {outcome.whole} answers")
    return ", ".join(parts)


def document(request: EvalRequest, outcome: Outcome, rows: "Sequence[Row]") -> dict[str, Any]:
    """What --json prints. Each row says which samples it got right, a character each (1 right, 0 wrong, - no
    answer), and by its place in `resolved` what its setting came to on this model."""
    resolved: list[dict[str, Any]] = []
    places = {}
    for setting, came_to in zip(request.settings, outcome.described.resolved, strict=True):
        if dict(came_to) not in resolved:
            resolved.append(dict(came_to))
        places[setting] = resolved.index(dict(came_to))
    samples = [sample.id for task in outcome.tasks for sample in task.samples]
    typed = {"command": shlex.join(["seats", *sys.argv[1:]])} if "eval" in sys.argv else {}
    return {
        "schema_version": SCHEMA_VERSION,
        **typed,
        "complete": outcome.done == outcome.whole,
        "environment": {**outcome.described.environment, "workers": outcome.workers},
        "options": {**request.model, **request.options},
        "samples": samples,
        "resolved": resolved,
        "rows": [
            {
                **row.to_json(),
                "right": marks(samples, outcome.records[row.setting]),
                "resolved": places[row.setting],
            }
            for row in rows
        ],
    }


def marks(samples: "Sequence[str]", records: "Sequence[Record]") -> str:
    """A character a sample: 1 right, 0 wrong, - no answer."""
    known = {record["id"]: record["correct"] for record in records if record["error"] is None}
    return "".join("-" if name not in known else str(int(known[name])) for name in samples)
