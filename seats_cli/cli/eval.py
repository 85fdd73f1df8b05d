"""`seats eval [MANIFEST]`: how often methods answer right at each ratio, on a manifest or the suite."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from seats_cli.cli import options as opt
from seats_cli.cli import suite_options as suite_opt
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_run import EvalRequest, run_sweep
from seats_cli.cli.eval_screen import EvalTerminal, counted
from seats_cli.errors import UsageError

# Names of seats_cli.lab that the command line has before it imports that; a test keeps them equal.
BENCHMARKS = ("worldsense", "daily-omni", "omnivideobench", "videomme", "lvomnibench")
DEFAULT_SUITE = (40, 0, "test", 16.0)  # clips, seed, split, seconds

SWEEP_PANEL = "What is compared"
CONVERT_PANEL = "Public benchmarks"


def evaluate(
    ctx: typer.Context,
    manifest: suite_opt.ManifestArgument = None,
    clips: suite_opt.ClipsOption = None,
    suite_seed: suite_opt.SuiteSeedOption = None,
    split: suite_opt.SplitOption = None,
    seconds: suite_opt.SecondsOption = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            metavar="A,B,...",
            rich_help_panel=SWEEP_PANEL,
            help="Methods to compare; full, what the others are measured by, always runs, once. "
            f"There are {', '.join(opt.METHOD_NAMES)}.",
        ),
    ] = "full,seats",
    ratios: Annotated[
        str,
        typer.Option(
            "--ratio",
            "-r",
            metavar="R,R,...",
            rich_help_panel=SWEEP_PANEL,
            help="Shares of the video and audio tokens to keep: above 0, at most 1.",
        ),
    ] = "0.35,0.1",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V,V,...",
            rich_help_panel=SWEEP_PANEL,
            help="Run each method that KEY matters to once for each value: a key of --set, or preset. May be "
            "given several times: every combination is run.",
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            parser=opt.one_of(opt.METHOD_NAMES),
            rich_help_panel=SWEEP_PANEL,
            help="Show the difference to this method, in points, at the same ratio and paired by clip.",
        ),
    ] = "full",
    preset: opt.PresetOption = None,
    schedule: opt.ScheduleOption = None,
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
    hwaccel: opt.HwaccelOption = "none",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=opt.OUTPUT_PANEL,
            help="Add each answer to FILE as a line of JSON. What FILE has already is not run again.",
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    as_csv: Annotated[
        bool,
        typer.Option("--csv", rich_help_panel=opt.OUTPUT_PANEL, help="Print one line a row, for tables."),
    ] = False,
    quiet: suite_opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    convert: Annotated[
        str | None,
        typer.Option(
            metavar="BENCHMARK",
            parser=opt.one_of(BENCHMARKS),
            rich_help_panel=CONVERT_PANEL,
            help="Print MANIFEST, the annotation file of a benchmark, as a manifest and do nothing else: "
            f"{', '.join(BENCHMARKS)}.",
        ),
    ] = None,
    media_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=CONVERT_PANEL,
            show_default="the annotation file's own folder",
            help="With --convert: where the benchmark's videos are.",
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure how often questions are answered right, by method and ratio, beside all tokens.

    A clip is decoded and encoded once for all of its questions and settings. The table goes to stdout,
    progress to stderr. Exit code: 0 all right, 1 some questions failed, 2 wrong usage, 130 interrupted (with
    -o, the same command goes on from there).
    """
    outer: Terminal = ctx.obj
    outer.quiet, outer.verbose, outer.debug = quiet, verbose, debug
    terminal = EvalTerminal.like(outer)
    if convert is not None or media_dir is not None:
        raise typer.Exit(print_manifest(terminal, convert, manifest, media_dir))
    if as_json and as_csv:
        raise UsageError("--json and --csv are two forms of one document: choose one")
    suite = suite_opt.chosen_suite(manifest, clips, suite_seed, split, seconds, DEFAULT_SUITE)
    from seats_cli.lab.settings import expand
    from seats_cli.lab.sweep import Asking

    chosen, kept, variants = names(methods), numbers(ratios), variations(vary or ())
    if against not in ("full", *chosen):
        raise UsageError(
            f"--against {against} is not among the methods", hint=f"add it: --methods {methods},{against}"
        )
    fixed = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings, schedule)
    rows = expand(chosen, kept, preset=preset, settings=fixed, vary=variants)
    if 1.0 in kept and chosen != ["full"]:
        terminal.note("note: a ratio of 1 keeps every token: that is the row full")
    options: dict[str, Any] = {
        "manifest": None if manifest is None else str(manifest),
        "methods": chosen,
        "ratios": kept,
        "vary": variants,
        "against": against,
        "preset": preset,
        "settings": fixed,
        "max_new_tokens": max_new_tokens,
        "fps": fps,
        "max_frames": max_frames,
    }
    if manifest is None:
        options |= dict(zip(("clips", "seed", "split", "seconds"), suite, strict=True))
    request = EvalRequest(
        manifest=manifest,
        suite=suite,
        settings=rows,
        varied=tuple(key for key in variants if any(row.value(key) is not None for row in rows)),
        against=against,
        asking=Asking(max_new_tokens, fps, max_frames),
        model={
            "model": model,
            "device": device,
            "dtype": dtype,
            "load_format": load_format,
            "quantize": quantize,
            "device_map": device_map,
            "offline": offline,
            "hwaccel": hwaccel,
        },
        workers=workers,
        output=output,
        form="json" if as_json else "csv" if as_csv else "table",
        options=options,
    )
    raise typer.Exit(run_sweep(terminal, request))


# ---- what was typed ---------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Methods from "a,b", each once. BadParameter for one that does not exist."""
    parse = opt.one_of(opt.METHOD_NAMES)
    return [_for("--methods", parse, name) for name in _items("--methods", text)]


def numbers(text: str) -> list[float]:
    """Ratios from "0.35,0.1", each once. BadParameter outside (0, 1]."""
    parse = opt.number(above=0, most=1)
    return list(dict.fromkeys(_for("--ratio", parse, item) for item in _items("--ratio", text)))


def variations(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Values by key from "key=a,b" pairs. BadParameter for another form, or a key that comes twice."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        key, equals, values = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE,VALUE", param_hint="--vary")
        if key in found:
            raise typer.BadParameter(f"{key} comes twice; give all its values at once", param_hint="--vary")
        found[key] = _items("--vary", values)
    return found


def _items(option: str, text: str) -> list[str]:
    items = list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    if not items:
        raise typer.BadParameter(f"{text!r} is an empty list", param_hint=option)
    return items


def _for(option: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint=option) from None


def print_manifest(terminal: Terminal, name: str | None, path: Path | None, media_dir: Path | None) -> int:
    """`--convert`: a benchmark's annotations as a manifest on stdout; a warning where videos are missing."""
    if name is None:
        raise UsageError("--media-dir goes with --convert")
    if path is None:
        raise UsageError(
            "--convert needs the benchmark's annotation file", hint=f"seats eval --convert {name} FILE"
        )
    from seats_cli.lab.convert import convert, missing_media

    records = list(convert(name, path, media_dir))
    for record in records:
        terminal.answer_piece(json.dumps(record, ensure_ascii=False) + "\n")
    missing = missing_media(records)
    if missing:
        videos = counted(len({record["media"] for record in records}), "video")
        terminal.warn(f"missing: {len(missing)} of {videos}, the first {missing[0]}")
    terminal.note(counted(len(records), "question"))
    return 0
