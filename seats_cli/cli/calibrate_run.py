"""The run of `seats calibrate`: who measures, plan by plan, and the preset at the end."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from seats_cli.cli import options as opt
from seats_cli.cli.console import Table
from seats_cli.cli.eval_run import say_size
from seats_cli.cli.eval_screen import EvalTerminal
from seats_cli.cli.loading import ended_like_ctrl_c, leaving_at_once, quieten_libraries
from seats_cli.errors import SeatsError, UsageError

if TYPE_CHECKING:
    from seats_cli.lab.calibrate import Found, Trial
    from seats_cli.lab.records import Record, RecordFile
    from seats_cli.lab.settings import Setting
    from seats_cli.lab.sweep import Asking, ClipTask, Described, Team
    from seats_cli.presets import CalibratedRow, Preset

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CalibrateRequest:
    """One call of `seats calibrate`, checked. `model`: keywords of ModelOptions."""

    trace: Mapping[str, Any]
    trace_path: Path
    target: Path
    manifest: Path | None
    suite: tuple[int, int, str, float]
    ratios: tuple[float, ...]
    first: int
    rounds: int
    tolerance: float
    preset: str | None
    settings: Mapping[str, str]
    asking: "Asking"
    model: Mapping[str, Any]
    workers: int | None
    output: Path | None
    as_json: bool


def run_calibration(terminal: EvalTerminal, request: CalibrateRequest) -> int:
    """Search, print what was found, write the preset. Returns the exit code.

    What stops the search loses no ratio that is done: their plans are written all the same.
    """
    from seats_cli.lab.calibrate import Found, climb, curves_of
    from seats_cli.lab.manifest import read_manifest
    from seats_cli.lab.records import RecordFile, has_failed
    from seats_cli.lab.settings import FULL

    samples = None
    if request.manifest is not None:
        samples = read_manifest(request.manifest, need_answers=False)
    curves = curves_of(request.trace)
    base = base_of(request)
    settings = {**style_options(request.preset), **request.settings}
    settings.pop("schedule", None)
    say_differences(terminal, request, base, settings)
    failed: list[Record] = []

    def look_at(record: "Record") -> None:
        if record["method"] == FULL and has_failed(record):  # a plan's failure ends the search by itself
            if not failed:
                terminal.warn(f"{record['clip']}: {record['error']['message']}")
            failed.append(record)

    stopped: BaseException | None = None
    done: list[Found] = []
    with ExitStack() as stack:
        stack.enter_context(ended_like_ctrl_c())
        file = None
        if request.output is not None:
            file = stack.enter_context(RecordFile(request.output, warn=terminal.warn))
        quieten_libraries(terminal)
        with leaving_at_once(terminal):
            from seats_cli.lab.sweep import Listener, manifest_tasks, suite_tasks
            from seats_cli.lab.trials import Trials, on_disk, searched_as, with_answers

        say_size(terminal, request.suite, samples is None)
        tasks = suite_tasks(*request.suite) if samples is None else manifest_tasks(samples)
        asked = [request.trace, base, settings, request.asking, request.first, request.rounds]
        measure: Trials | None = None
        try:
            for ratio in request.ratios:
                rows = [one.row for one in done]
                key = searched_as(tasks, request.model, [*asked, ratio, rows[-1:]])
                if file is not None and key in file.known:
                    done.append(found_in(file, key))
                    terminal.note(f"ratio {ratio:g}: {request.output} has it already")
                    continue
                if measure is None:
                    gather = gatherer(terminal, request, len(tasks))
                    with terminal.counting("clips rendered") as rendering:
                        ready: Sequence[ClipTask] = stack.enter_context(on_disk(tasks, rendering))
                    progress = stack.enter_context(terminal.counting("answers"))
                    listener = Listener(look_at, progress, lambda message, clip: terminal.warn(message))
                    ready = with_answers(gather, ready, request.asking, request.preset, listener)
                    folder = Path(stack.enter_context(TemporaryDirectory(prefix="seats-trials-")))
                    measure = Trials(ready, request.asking, base, settings, folder, gather, listener)
                best, tried = climb(
                    curves,
                    ratio,
                    measure,
                    first=request.first,
                    rounds=request.rounds,
                    known=rows[-1:],
                    tell=lambda trial: terminal.detail(described(trial)),
                )
                n_samples = sum(len(task.samples) for task in ready)
                done.append(Found(best, tuple(tried), n_samples, len(ready), len(failed)))
                if file is not None:
                    file.append({"key": key, "method": "seats", "ratio": ratio, **done[-1].to_json()})
                terminal.note(f"ratio {ratio:g}: {described(max(tried, key=lambda trial: trial.measured))}")
        except (KeyboardInterrupt, SeatsError) as error:
            if not done:
                raise
            stopped = error
    trials = [trial for one in done for trial in one.trials]
    show(terminal, request, [one.row for one in done], trials)
    searched = f"{len(trials)} plans on {done[-1].questions} questions, {done[-1].clips} clips"
    write(terminal, request, with_settings(base, settings), [one.row for one in done], searched)
    if stopped is not None:
        goes_on = "; the same command goes on from there" if request.output is not None else ""
        so_far = f"{len(done)} of {len(request.ratios)} ratios are in {request.target}"
        terminal.note(f"stopped early: {so_far}{goes_on}")
    if isinstance(stopped, SeatsError):
        raise stopped
    if stopped is not None:
        return opt.INTERRUPTED
    return 1 if any(one.failed for one in done) else 0


def found_in(file: "RecordFile", key: str) -> "Found":
    """A ratio's plans from the file of an earlier run. Raises UsageError for a damaged line."""
    from seats_cli.lab.calibrate import Found

    try:
        return Found.from_json(file.known[key])
    except (KeyError, TypeError, ValueError):
        raise file.damaged(key) from None


def with_settings(base: "Preset", settings: Mapping[str, str]) -> "Preset":
    """The preset with the options that its plans were measured with, so that they are used with them."""
    return replace(base, options={**base.options, **settings})


def gatherer(
    terminal: EvalTerminal, request: CalibrateRequest, n_clips: int
) -> "Callable[[Sequence[Setting]], AbstractContextManager[Team]]":
    """Who answers: workers, made anew for every batch of plans, or one session that stays."""
    from seats_cli.batch.devices import choose_workers
    from seats_cli.lab.sweep import Alone, describe
    from seats_cli.lab.workers import Crew

    model = request.model
    devices = choose_workers(request.workers, n_clips, model)
    if len(devices) > 1:

        @contextmanager
        def crew(settings: "Sequence[Setting]") -> "Iterator[Team]":
            with Crew(
                devices, model, settings, request.asking, warn=terminal.warn, log=lambda _: None
            ) as team:
                check_same_model(request.trace, team.described)
                yield team

        return crew
    with leaving_at_once(terminal):
        from seats_cli.session import ModelOptions, Session
    session = Session(ModelOptions(**model), note=lambda _: None, warn=terminal.warn)

    @contextmanager
    def alone(settings: "Sequence[Setting]") -> "Iterator[Team]":
        described = describe(session, settings, request.asking)
        check_same_model(request.trace, described)
        yield Alone(session, settings, request.asking, described)

    return alone


def base_of(request: CalibrateRequest) -> "Preset":
    """The preset that the rows go into: the traced checkpoint's, its paper-like schedule from the trace."""
    from seats_cli.lab.boundaries import propose
    from seats_cli.lab.preset_file import base_preset, trace_provenance, traced_preset
    from seats_cli.presets import Preset, load_any

    asked = None if request.preset is None else load_any(request.preset)
    base = asked if isinstance(asked, Preset) else base_preset(request.trace)
    n_layers = request.trace["n_layers"]
    if base.n_layers != n_layers:
        raise UsageError(
            f"preset {base.name} is made for {base.n_layers} layers; the traced checkpoint has {n_layers}",
            hint="leave --preset out, or give one for this checkpoint",
        )
    found = propose(request.trace, request.tolerance)
    schedule = found.schedule(n_layers, base.schedule) if found.found else base.schedule
    return traced_preset(request.trace, base, schedule, provenance=trace_provenance(request.trace, found))


def style_options(preset: str | None) -> Mapping[str, str]:
    """The options of a style that was asked for; a model's preset keeps its own."""
    from seats_cli.presets import Style, load_any

    loaded = None if preset is None else load_any(preset)
    return loaded.options if isinstance(loaded, Style) else {}


def check_same_model(trace: Mapping[str, Any], described: "Described") -> None:
    """Raise UsageError unless the trace is of the model that the plans are measured on.

    Files are known by their content; a checkpoint of the hub by its id and revision.
    """
    traced, model = trace["model"], described.model
    pairs = [(traced["model_type"], model["family"]), (traced.get("weights"), model["weights"])]
    if model["weights"] is None:
        revision = trace.get("environment", {}).get("revision")
        pairs += [(traced["name"], model["model"]), (revision, model["revision"])]
    if any(theirs != ours for theirs, ours in pairs):
        raise UsageError(
            f"the trace is of {traced['name']}, and not of {model['model']} as it is now",
            hint="name the traced checkpoint with --model, or trace this one first",
        )


def say_differences(
    terminal: EvalTerminal, request: CalibrateRequest, base: "Preset", settings: Mapping[str, str]
) -> None:
    """Warn where plans are measured in another way than the curves were."""
    from seats_cli.presets import load_style

    merge = {**load_style("default").options, **base.options, **settings}["merge"] == "on"
    traced_merge, fps = request.trace["model"].get("merge"), request.trace.get("options", {}).get("fps")
    if traced_merge not in (None, merge):
        words = {True: "on", False: "off"}
        terminal.warn(f"the trace was made with merge={words[traced_merge]}, plans run with {words[merge]}")
    if fps not in (None, request.asking.fps):
        terminal.warn(f"the trace was made with --fps {fps:g}, plans run with {request.asking.fps:g}")


def write(
    terminal: EvalTerminal,
    request: CalibrateRequest,
    base: "Preset",
    rows: "Sequence[CalibratedRow]",
    searched: str,
) -> None:
    """The preset file, which then also says how the rows were found."""
    from seats_cli.presets.writing import write_preset

    source = f"{searched}; {command()}" if command() else searched
    made = replace(
        base, calibrated=tuple(reversed(rows)), provenance={**base.provenance, "calibrated": source}
    )
    heading = f"Written by `seats calibrate`; use it as --preset {request.target.name}."
    write_preset(made, request.target, heading=heading)
    terminal.note(f"written: {request.target}, for --preset {request.target}")


def show(
    terminal: EvalTerminal,
    request: CalibrateRequest,
    rows: "Sequence[CalibratedRow]",
    trials: "Sequence[Trial]",
) -> None:
    """The plans found, as a table or with every one tried as JSON."""
    if request.as_json:
        terminal.document(
            {
                "schema_version": SCHEMA_VERSION,
                "command": command(),
                "trace": str(request.trace_path),
                "rows": [asdict(row) for row in rows],
                "trials": [asdict(trial) for trial in trials],
            }
        )
        return
    measured = {trial.row: trial.measured for trial in trials}
    lines = tuple(
        (
            f"{row.ratio:g}",
            f"{row.video:.3f}",
            f"{row.audio:.3f}",
            drops_in_words(row),
            str(row.late_layer or "none"),
            f"{100 * measured[row]:.1f}",
        )
        for row in rows
    )
    columns = ("ratio", "video", "audio", "drops", "late layer", "accuracy %")
    terminal.report(
        Table("the best plans found: mean retention of each kind, where tokens leave", columns, lines)
    )


def described(trial: "Trial") -> str:
    """A trial in one line."""
    row = trial.row
    return (
        f"video {row.video:.3f}, audio {row.audio:.3f}, drops {drops_in_words(row)}, "
        f"late layer {row.late_layer or 'none'}: {100 * trial.measured:.1f}% "
        f"(predicted {100 * trial.predicted:.1f})"
    )


def drops_in_words(row: "CalibratedRow") -> str:
    """ "5: 50/25" keeps half of video and a quarter of audio after layer 5."""
    parts = [f"{d.after_layer}: {100 * d.video:g}/{100 * d.audio:g}" for d in row.drops]
    return ", ".join(parts) or "none"


def command() -> str:
    """What was typed, or nothing where it was no command line."""
    return shlex.join(["seats", *sys.argv[1:]]) if "calibrate" in sys.argv else ""
