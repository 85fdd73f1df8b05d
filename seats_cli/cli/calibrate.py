"""`seats calibrate TRACE.json`: the best plan at each ratio, searched for on a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from seats_cli.cli import options as opt
from seats_cli.cli import suite_options as suite_opt
from seats_cli.cli.ask import check_selection
from seats_cli.cli.calibrate_run import CalibrateRequest, run_calibration
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval import numbers
from seats_cli.cli.eval_screen import EvalTerminal
from seats_cli.errors import UsageError

DEFAULT_SUITE = (20, 0, "dev", 16.0)  # clips, seed, split, seconds
SEARCH_PANEL = "Search"


def calibrate(
    ctx: typer.Context,
    trace: Annotated[
        Path,
        typer.Argument(metavar="TRACE.json", show_default=False, help="What seats trace --json printed."),
    ],
    preset_file: Annotated[
        Path, typer.Argument(metavar="PRESET.yaml", show_default=False, help="The preset to write.")
    ],
    manifest: suite_opt.ManifestArgument = None,
    clips: suite_opt.ClipsOption = None,
    suite_seed: suite_opt.SuiteSeedOption = None,
    split: suite_opt.SplitOption = None,
    seconds: suite_opt.SecondsOption = None,
    ratios: Annotated[
        str,
        typer.Option(
            "--ratio",
            metavar="R,R,...",
            rich_help_panel=SEARCH_PANEL,
            help="Ratios to find a plan for; others take the nearest one's.",
        ),
    ] = "0.35,0.25,0.15,0.1,0.05",
    first: Annotated[
        int,
        typer.Option(
            metavar="N",
            parser=opt.number(least=1, most=100, whole=True),
            rich_help_panel=SEARCH_PANEL,
            help="Plans to measure at first at each ratio, the likeliest by the trace.",
        ),
    ] = 6,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            parser=opt.number(least=0, most=100, whole=True),
            rich_help_panel=SEARCH_PANEL,
            help="How often the neighbours of the best plan are measured too, at most.",
        ),
    ] = 3,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X",
            parser=opt.number(least=0, most=1),
            rich_help_panel=SEARCH_PANEL,
            help="As for seats trace: of the paper-like schedule that the preset also holds.",
        ),
    ] = 0.01,
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
            help="Add each ratio's plans to FILE as a line of JSON. What FILE has is not searched again.",
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    quiet: suite_opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Find the best plan at each ratio and write it as a preset, for --preset PRESET.yaml.

    The trace says which plans are likely; these and their neighbours are measured by how often they answer
    right (as the answer from all tokens, where the manifest has none). Calibrate on other clips than you
    report on. The table goes to stdout, progress to stderr. Exit code: 0 all right, 1 a question failed, 2
    wrong usage, 130 interrupted (the ratios that were done are written; with -o, the same command goes on
    from there).
    """
    outer: Terminal = ctx.obj
    outer.quiet, outer.verbose, outer.debug = quiet, verbose, debug
    terminal = EvalTerminal.like(outer)
    if preset_file.is_dir() or not preset_file.parent.is_dir():
        raise UsageError(f"cannot write {preset_file}: no such folder, or a folder itself")
    read = [one for one in (trace, manifest) if one is not None and one.exists()]
    if preset_file.exists() and any(preset_file.samefile(one) for one in read):
        raise UsageError(f"{preset_file} is read here: writing the preset there would replace it")
    suite = suite_opt.chosen_suite(manifest, clips, suite_seed, split, seconds, DEFAULT_SUITE)
    fixed = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings)
    if "schedule" in fixed:
        raise UsageError("the schedule is what is searched for", hint="leave schedule out of --set")
    check_selection(preset, fixed)
    asked = sorted(set(numbers(ratios)), reverse=True)
    if asked[0] >= 1:
        raise typer.BadParameter(
            "a ratio of 1 keeps everything: there is no plan to find", param_hint="--ratio"
        )
    from seats_cli.lab.sweep import Asking
    from seats_cli.lab.trace_document import read_document

    request = CalibrateRequest(
        trace=read_document(trace),
        trace_path=trace,
        target=preset_file,
        manifest=manifest,
        suite=suite,
        ratios=tuple(asked),
        first=first,
        rounds=rounds,
        tolerance=tolerance,
        preset=preset,
        settings=fixed,
        asking=Asking(max_new_tokens, fps, max_frames),
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
        as_json=as_json,
    )
    raise typer.Exit(run_calibration(terminal, request))
