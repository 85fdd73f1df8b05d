"""`seats bench [MEDIA...]`: what an answer costs, all tokens beside each method and ratio."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from seats_cli.cli import options as opt
from seats_cli.cli.ask import check_selection
from seats_cli.cli.bench_run import BenchRequest, Synthetic, run_bench
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval import names, numbers
from seats_cli.cli.eval_screen import EvalTerminal
from seats_cli.errors import UsageError

INPUT_PANEL = "Synthetic clip"
ROWS_PANEL = "What is compared"
RUNS_PANEL = "Runs"
SWEPT = ("seconds", "frames", "ratio")
MOST_VALUES = 32
MOST_SECONDS, MOST_FRAMES, MOST_SIDE = 86400.0, 10**6, 8192
OF_FILES = ("max_frames", "hwaccel", "start", "end")  # parameters that say nothing to a synthetic clip
OF_NOISE = ("seconds", "frames", "size", "text_tokens")  # and that say nothing to a file


def parse_size(text: str) -> tuple[int, int] | str:
    """Width and height from "336x336", or "caps"."""
    width, times, height = text.lower().partition("x")
    if text == "caps":
        return text
    sides = (width, height)
    if times and all(side.isascii() and side.isdigit() and 1 <= int(side) <= MOST_SIDE for side in sides):
        return int(width), int(height)
    raise typer.BadParameter(
        f"{text!r} is no size; accepted: WIDTHxHEIGHT in pixels, each at most {MOST_SIDE}, or caps"
    )


def bench(
    ctx: typer.Context,
    media: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MEDIA...",
            show_default=False,
            help="Files to time, decoding included. Without any, a synthetic clip: seeded noise in memory.",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            metavar="A,B,...",
            rich_help_panel=ROWS_PANEL,
            help="Methods to time; full, what the others are measured by, always runs, once. "
            f"There are {', '.join(opt.METHOD_NAMES)}.",
        ),
    ] = "full,seats",
    ratios: Annotated[
        str,
        typer.Option(
            "--ratio",
            "-r",
            metavar="R,R,...",
            rich_help_panel=ROWS_PANEL,
            help="Shares of the video and audio tokens to keep: above 0, at most 1.",
        ),
    ] = "0.1",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="transformers",
            parser=opt.one_of(("transformers",)),
            rich_help_panel=ROWS_PANEL,
            help="Also time the stock Hugging Face path on the same input: its encoders, its forward, its "
            "generate, from tensors in memory.",
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=FROM:TO",
            rich_help_panel=ROWS_PANEL,
            help="Time every row at several values of seconds, frames or ratio: 16:1024 (doubling), "
            "16:1024:x4, or 16,64,100.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            parser=opt.number(above=0, most=MOST_SECONDS),
            rich_help_panel=INPUT_PANEL,
            show_default="64 on CUDA, else 32",
            help="Its length.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=opt.number(least=0, most=MOST_FRAMES, whole=True),
            rich_help_panel=INPUT_PANEL,
            show_default="--fps for each second",
            help="Its frames, made even; 0 for sound alone.",
        ),
    ] = None,
    size: Annotated[
        Any,
        typer.Option(
            metavar="WxH",
            parser=parse_size,
            rich_help_panel=INPUT_PANEL,
            show_default="336x336 on CUDA, else 224x224",
            help="Its frames' size in pixels, from which their tokens follow; caps: 1280x720 frames that are "
            "resized as the preset says.",
        ),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=opt.number(least=1, most=10**5, whole=True),
            rich_help_panel=INPUT_PANEL,
            show_default="a short question",
            help="Text tokens of the prompt, the chat's own included.",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=opt.number(least=1, most=10**5, whole=True),
            rich_help_panel=RUNS_PANEL,
            show_default="100 on CUDA, else 16",
            help="Tokens of every answer, whatever the model says.",
        ),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="N",
            parser=opt.number(least=1, most=10**4, whole=True),
            rich_help_panel=RUNS_PANEL,
            help="Timed rounds; each runs every row once.",
        ),
    ] = 5,
    warmup: Annotated[
        int,
        typer.Option(
            metavar="N",
            parser=opt.number(least=0, most=10**4, whole=True),
            rich_help_panel=RUNS_PANEL,
            help="Rounds before them that do not count.",
        ),
    ] = 1,
    check_flops: Annotated[
        bool,
        typer.Option(
            "--check-flops",
            rich_help_panel=RUNS_PANEL,
            help="Also let PyTorch count what each row's prefill multiplies, once, and compare.",
        ),
    ] = False,
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
    compile: opt.CompileOption = True,
    graphs: opt.GraphsOption = True,
    fps: opt.FpsOption = 2.0,
    max_frames: opt.MaxFramesOption = 768,
    hwaccel: opt.HwaccelOption = "none",
    start: opt.StartOption = None,
    end: opt.EndOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=opt.OUTPUT_PANEL,
            help="Besides what is printed, write the JSON document, every sample in it, to FILE.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", rich_help_panel=opt.OUTPUT_PANEL, help="Draw the times (needs matplotlib)."
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    as_csv: Annotated[
        bool,
        typer.Option("--csv", rich_help_panel=opt.OUTPUT_PANEL, help="Print one line a row, for tables."),
    ] = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Time whole answers: the encoders, the selection, the prefill and the decoding, with all tokens and with
    each method at each ratio, in turns within one run.

    Medians of the repeats, and their spread. The tables go to stdout, progress to stderr. Exit code: 0 all
    right, 1 some row failed or did not fit, 2 wrong usage, 130 interrupted (what is done is shown).
    """
    outer: Terminal = ctx.obj
    outer.quiet, outer.verbose, outer.debug = quiet, verbose, debug
    if as_json and as_csv:
        raise UsageError("--json and --csv are two forms of one document: choose one")
    opt.check_range(start, end)
    files = tuple(media or ())
    typed = typed_names(ctx)
    swept = None if sweep is None else sweep_values(sweep)
    check_input(files, typed, swept)
    check_written(output, plot)
    kept = [float(value) for value in swept[1]] if swept and swept[0] == "ratio" else numbers(ratios)
    chosen = names(methods)
    fixed = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings, schedule)
    check_selection(preset, fixed)
    from seats_cli.lab.settings import expand

    if 1.0 in kept and chosen != ["full"]:
        outer.note("note: a ratio of 1 keeps every token: that is the row full")
    request = BenchRequest(
        files=files,
        clip=Synthetic(seconds, frames, fps, size, text_tokens),
        sampling={"fps": fps, "max_frames": max_frames, "start_s": start, "end_s": end},
        sweep=swept,
        settings=expand(chosen, kept, preset=preset, settings=fixed),
        against=against,
        new_tokens=new_tokens,
        repeats=repeats,
        warmup=warmup,
        check_flops=check_flops,
        model={
            "model": model,
            "device": device,
            "dtype": dtype,
            "load_format": load_format,
            "quantize": quantize,
            "device_map": device_map,
            "offline": offline,
            "compile": compile,
            "graphs": graphs,
            "hwaccel": hwaccel,
        },
        options={"methods": chosen, "ratios": kept, "preset": preset, "settings": fixed},
        form="json" if as_json else "csv" if as_csv else "table",
        output=output,
        plot=plot,
    )
    raise typer.Exit(run_bench(EvalTerminal.like(outer), request))


# ---- what was typed ---------------------------------------------------------------------------------------


def typed_names(ctx: typer.Context) -> dict[str, str]:
    """The options on the command line: parameter -> the option's longest name."""
    found = {}
    for parameter in ctx.command.params:
        where = ctx.get_parameter_source(parameter.name or "")
        if where is not None and where.name == "COMMANDLINE":
            found[parameter.name or ""] = parameter.opts[0]
    return found


def check_input(
    files: Sequence[Path], typed: dict[str, str], swept: tuple[str, tuple[float, ...]] | None
) -> None:
    """Raise UsageError for options of a synthetic clip beside files, and the other way round."""
    key = swept[0] if swept else None
    wrong = [typed[name] for name in (OF_NOISE if files else OF_FILES) if name in typed]
    if files and key in OF_NOISE:
        wrong.append(f"--sweep {key}")
    if wrong:
        of, given = ("of the synthetic clip", "files were given") if files else ("of files", "none is given")
        raise UsageError(f"{', '.join(wrong)}: {of}, but {given}", hint="leave out one or the other")
    both = {"seconds": "seconds", "frames": "frames", "ratio": "ratios"}.get(key or "")
    if both in typed:
        raise UsageError(f"{typed[both]} is both fixed and swept", hint=f"leave it to --sweep {key}=...")
    if files:
        from seats_cli.cli.ask_run import problem_of

        for path in files:
            problem = problem_of(str(path))
            if problem is not None:
                raise problem


def sweep_values(text: str) -> tuple[str, tuple[float, ...]]:
    """Key and ascending values from "seconds=16:1024", "seconds=16:1024:x4" or "seconds=16,64,100"."""
    key, equals, values = text.partition("=")
    if not equals or key not in SWEPT:
        raise typer.BadParameter(
            f"{text!r} is no sweep; accepted: one of {', '.join(SWEPT)}, then =FROM:TO, =FROM:TO:xFACTOR or "
            "=V,V,...",
            param_hint="--sweep",
        )
    parse = {
        "seconds": opt.number(above=0, most=MOST_SECONDS),
        "frames": opt.number(least=0, most=MOST_FRAMES, whole=True),
        "ratio": opt.number(above=0, most=1),
    }[key]
    try:
        found = _range(values, parse) if ":" in values else [parse(value) for value in values.split(",")]
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint="--sweep") from None
    unique = tuple(sorted(set(found)))
    if len(unique) > MOST_VALUES:
        raise typer.BadParameter(
            f"{len(unique)} values are too many; at most {MOST_VALUES}", param_hint="--sweep"
        )
    return key, unique


def _range(text: str, parse: Any) -> list[float]:
    first, last, *more = text.split(":")
    low, high = parse(first), parse(last)
    factor = 2.0
    if more:
        if len(more) > 1 or not more[0].startswith("x"):
            raise typer.BadParameter(f"{text!r} is not FROM:TO or FROM:TO:xFACTOR")
        factor = opt.number(least=1.1, most=1000)(more[0][1:])
    if not 0 < low <= high:
        raise typer.BadParameter(f"{text!r} does not go up from above 0")
    found = [low]
    while found[-1] * factor <= high * (1 + 1e-9):
        found.append(found[-1] * factor)
    return [parse(f"{round(value)}" if isinstance(low, int) else f"{value:.6g}") for value in found]


def check_written(output: Path | None, plot: Path | None) -> None:
    """Raise UsageError for files that could not be written at the end, before anything is measured."""
    if plot is not None:
        from seats_cli.lab.plot import check_plot

        check_plot(plot)
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"cannot write {output}: it is a folder")
    if not output.parent.is_dir():
        raise UsageError(f"cannot write {output}: there is no folder {output.parent}")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UsageError(f"cannot write {output}: no permission")
