"""`seats trace [MANIFEST]`: which layers read the clip, and a schedule for this checkpoint from it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from seats_cli.cli import options as opt
from seats_cli.cli import suite_options as suite_opt
from seats_cli.cli.ask import check_selection
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_screen import EvalTerminal
from seats_cli.cli.trace_run import TraceRequest, run_trace, show_saved
from seats_cli.errors import UsageError

CURVES = ("removal", "choice", "entry", "attention")  # of seats_cli.lab.tracing; a test keeps them equal
DEFAULT_SUITE = (20, 0, "dev", 16.0)  # clips, seed, split, seconds

TRACE_PANEL = "What is measured"
SCHEDULE_PANEL = "What is made of it"
WITH_FROM = ("source", "tolerance", "plot", "write_preset", "as_json", "quiet", "verbose", "debug", "config")


def trace(
    ctx: typer.Context,
    manifest: suite_opt.ManifestArgument = None,
    clips: suite_opt.ClipsOption = None,
    suite_seed: suite_opt.SuiteSeedOption = None,
    split: suite_opt.SplitOption = None,
    seconds: suite_opt.SecondsOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="TRACE.json",
            rich_help_panel=TRACE_PANEL,
            help="Measure nothing: take the trace that an earlier run printed with --json.",
        ),
    ] = None,
    curves: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            rich_help_panel=TRACE_PANEL,
            help="removal: a kind gone from a layer on. choice: only the most attended of each kind kept "
            "after a layer. entry: only stage I's choice of a kind enters. attention: where the last text "
            "token looks.",
        ),
    ] = ",".join(CURVES),
    layers: Annotated[
        str,
        typer.Option(
            metavar="L,L,...",
            rich_help_panel=TRACE_PANEL,
            help="Layers, from 1, to remove from and to choose after, such as 1,5,9-12; removal from layer "
            "1 is always measured. all: each one (choice: every second of more than 20).",
        ),
    ] = "all",
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions-per-clip",
            metavar="N",
            parser=opt.number(least=1, most=10**4, whole=True),
            rich_help_panel=TRACE_PANEL,
            show_default="all",
            help="No more questions of a clip than these, families taking turns.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X",
            parser=opt.number(least=0, most=1),
            rich_help_panel=SCHEDULE_PANEL,
            help="The loss that counts as none where the late layers begin: of accuracy, or of agreement "
            "where there are no answers; 0.01 is one in a hundred.",
        ),
    ] = 0.01,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", rich_help_panel=SCHEDULE_PANEL, help="Draw the curves (needs matplotlib)."
        ),
    ] = None,
    write_preset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            rich_help_panel=SCHEDULE_PANEL,
            help="Write the proposed schedule as a preset, for --preset FILE.yaml.",
        ),
    ] = None,
    preset: opt.PresetOption = None,
    settings: opt.SetOption = None,
    model: opt.ModelOption = opt.EMBEDDED_MODEL,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    load_format: opt.LoadFormatOption = "auto",
    quantize: opt.QuantizeOption = "none",
    device_map: opt.DeviceMapOption = "none",
    offline: opt.OfflineOption = False,
    workers: suite_opt.WorkersOption = None,
    max_new_tokens: opt.MaxNewTokensOption = 32,
    fps: opt.FpsOption = 2.0,
    max_frames: opt.MaxFramesOption = 768,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=opt.OUTPUT_PANEL,
            help="Add each question's curves to FILE as a line of JSON. What FILE has is not run again.",
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    quiet: suite_opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Find out which layers read the clip: answer with all tokens, then see what is left of each answer when
    video, audio or both are gone from a layer on.

    Where the manifest has answers accuracy is measured, else agreement with the answer from all tokens. The
    curves propose where shallow, middle and late layers part. The tables go to stdout, progress to stderr.
    Exit code: 0 all right, 1 some questions failed, 2 wrong usage, 130 interrupted (with -o, the same command
    goes on from there).
    """
    outer: Terminal = ctx.obj
    outer.quiet, outer.verbose, outer.debug = quiet, verbose, debug
    terminal = EvalTerminal.like(outer)
    made_of_it = (tolerance, plot, write_preset, as_json)
    check_targets(plot, write_preset)
    if source is not None:
        check_nothing_measured(ctx)
        raise typer.Exit(show_saved(terminal, source, *made_of_it))
    suite = suite_opt.chosen_suite(manifest, clips, suite_seed, split, seconds, DEFAULT_SUITE)
    chosen = curve_names(curves)
    if (plot or write_preset) and "removal" not in chosen:
        raise UsageError(
            "--plot and --write-preset need the removal curve", hint=f"--curves removal,{curves}"
        )
    fixed = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings)
    check_selection(preset, fixed)
    from seats_cli.lab.tracing import Tracing, full_setting

    tracing = Tracing(max_new_tokens, fps, max_frames, curves=chosen, layers=layer_numbers(layers))
    options: dict[str, Any] = {
        "manifest": None if manifest is None else str(manifest),
        "curves": list(chosen),
        "layers": None if tracing.layers is None else list(tracing.layers),
        "questions_per_clip": questions,
        "preset": preset,
        "settings": fixed,
        "max_new_tokens": max_new_tokens,
        "fps": fps,
        "max_frames": max_frames,
    }
    if manifest is None:
        options |= dict(zip(("clips", "seed", "split", "seconds"), suite, strict=True))
    request = TraceRequest(
        manifest=manifest,
        suite=suite,
        questions=questions,
        setting=full_setting(preset, fixed),
        tracing=tracing,
        model={
            "model": model,
            "device": device,
            "dtype": dtype,
            "load_format": load_format,
            "quantize": quantize,
            "device_map": device_map,
            "offline": offline,
        },
        workers=workers,
        output=output,
        options=options,
    )
    raise typer.Exit(run_trace(terminal, request, *made_of_it))


# ---- what was typed ---------------------------------------------------------------------------------------


def curve_names(text: str) -> tuple[str, ...]:
    """Curves from "removal,entry" in the order they are measured. BadParameter for one that there is not."""
    asked = [item.strip() for item in text.split(",") if item.strip()]
    unknown = [name for name in asked if name not in CURVES]
    if unknown or not asked:
        problem = f"{unknown[0]!r} is not one of" if unknown else f"{text!r} is an empty list of"
        raise typer.BadParameter(f"{problem} {', '.join(CURVES)}", param_hint="--curves")
    return tuple(name for name in CURVES if name in asked)


def layer_numbers(text: str) -> tuple[int, ...] | None:
    """Layers from "1,5,9-12", ascending, each once; None for "all". BadParameter for anything else."""
    if text.strip() == "all":
        return None
    found: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        numbers = [first, last if dash else first]
        if not all(number.isascii() and number.isdigit() and 0 < int(number) < 10**4 for number in numbers):
            raise typer.BadParameter(
                f"{text!r} is no list of layers; accepted: all, or numbers from 1 such as 1,5,9-12",
                param_hint="--layers",
            )
        found |= set(range(int(numbers[0]), int(numbers[1]) + 1))
    if not found:
        raise typer.BadParameter(f"{text!r} holds no layer", param_hint="--layers")
    return tuple(sorted(found))


def check_targets(plot: Path | None, preset: Path | None) -> None:
    """Raise UsageError for files that could not be written at the end, before anything is measured."""
    if plot is not None:
        from seats_cli.lab.plot import check_plot

        check_plot(plot)
    if preset is not None and (preset.is_dir() or not preset.parent.is_dir()):
        raise UsageError(f"cannot write {preset}: no such folder, or a folder itself")


def check_nothing_measured(ctx: typer.Context) -> None:
    """Raise UsageError for an option that says how to measure beside --from."""
    for parameter in ctx.command.params:
        where = ctx.get_parameter_source(parameter.name or "")
        if where is not None and where.name == "COMMANDLINE" and parameter.name not in WITH_FROM:
            name = parameter.opts[0] if parameter.param_type_name == "option" else "a manifest"
            raise UsageError(
                f"{name} says how to measure, and a trace given with --from is measured already",
                hint="leave out one or the other",
            )
