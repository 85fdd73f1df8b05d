"""`seats plan [MEDIA]`: what an answer would take, before a model is loaded or even there."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from seats_cli.batch.sources import check_file
from seats_cli.cli import options as opt
from seats_cli.cli.ask import check_selection
from seats_cli.cli.bench import INPUT_PANEL, MOST_FRAMES, MOST_SECONDS, parse_size, typed_names
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.cli.loading import leaving_at_once, quieten_libraries
from seats_cli.cli.plan_tables import plan_head, plan_notes, plan_tables
from seats_cli.errors import UsageError

QUESTION = "What happens in this clip?"
OF_NO_FILE = ("seconds", "frames", "size")
OF_FILES = ("start", "end")
# On one command line: what a config file or the environment says is a default.
CONTRADICTIONS = (("memory", "device"), ("frames", "fps"), ("frames", "max_frames"))


def plan(
    ctx: typer.Context,
    media: Annotated[
        Path | None,
        typer.Argument(
            metavar="MEDIA",
            show_default=False,
            help="A video, audio or image file. Without one, a clip of --seconds that there is not yet.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            parser=opt.number(above=0, most=MOST_SECONDS),
            rich_help_panel=INPUT_PANEL,
            help="Its length, sound included.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=opt.number(least=0, most=MOST_FRAMES, whole=True),
            rich_help_panel=INPUT_PANEL,
            show_default="--fps for each second, --max-frames at most",
            help="Its sampled frames, made even; 0 for sound alone.",
        ),
    ] = None,
    size: Annotated[
        Any,
        typer.Option(
            metavar="WxH",
            parser=parse_size,
            rich_help_panel=INPUT_PANEL,
            show_default="1280x720",
            help="Its frames' size in pixels, before they are resized as the preset says.",
        ),
    ] = None,
    question: Annotated[
        str,
        typer.Option(metavar="TEXT", rich_help_panel=opt.ANSWER_PANEL, help="What would be asked."),
    ] = QUESTION,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            parser=opt.number(above=0, most=1e6),
            rich_help_panel=opt.MODEL_PANEL,
            help="Plan for a GPU with so many GiB free, instead of the devices here.",
        ),
    ] = None,
    model: opt.ModelOption = opt.EMBEDDED_MODEL,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    quantize: opt.QuantizeOption = "none",
    device_map: opt.DeviceMapOption = "none",
    offline: opt.OfflineOption = False,
    compile: opt.CompileOption = True,
    graphs: opt.GraphsOption = True,
    ratio: opt.RatioOption = 0.10,
    method: opt.MethodOption = "seats",
    preset: opt.PresetOption = None,
    schedule: opt.ScheduleOption = None,
    settings: opt.SetOption = None,
    max_new_tokens: opt.MaxNewTokensOption = 256,
    system: opt.SystemOption = None,
    fps: opt.FpsOption = 2.0,
    max_frames: opt.MaxFramesOption = 768,
    start: opt.StartOption = None,
    end: opt.EndOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Say what an answer would take: tokens, compute and memory by layer and stage, whether that fits here,
    and which option would make it fit.

    No weights are loaded or downloaded: a config is enough, and of known models not even that. Exit code: 0
    it fits, or nobody can tell; 1 it does not fit; 2 wrong usage.
    """
    terminal: Terminal = ctx.obj
    terminal.quiet, terminal.verbose, terminal.debug = quiet, verbose, debug
    opt.check_range(start, end)
    typed = typed_names(ctx)
    check_source(media, seconds, typed)
    for one, other in CONTRADICTIONS:
        if one in typed and other in typed:
            raise UsageError(f"{typed[one]} and {typed[other]} contradict each other", hint="choose one")
    chosen = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings, schedule)
    check_selection(preset, chosen)
    quieten_libraries(terminal)
    with leaving_at_once(terminal):
        from seats_cli.lab.forecast import Planner, PlanRequest, clip_to_come, document
        from seats_cli.session import AskOptions, ModelOptions

    asked = AskOptions(
        ratio=ratio, method=method, preset=preset, settings=chosen, max_new_tokens=max_new_tokens,
        system=system, fps=fps, max_frames=max_frames, start_s=start, end_s=end,
    )  # fmt: skip
    options = ModelOptions(
        model=model, device=device, dtype=dtype, quantize=quantize, device_map=device_map, offline=offline,
        compile=compile, graphs=graphs,
    )  # fmt: skip
    pixels = None if size == "caps" else size
    to_come = partial(clip_to_come, frames=frames, size=pixels, fps=fps, max_frames=max_frames)
    place_bytes = None if memory is None else round(memory * 2**30)
    planner = Planner(options, place_bytes=place_bytes, log=terminal.detail)
    planned = (
        PlanRequest(str(media), question, asked)
        if seconds is None
        else PlanRequest(to_come(seconds), question, asked, to_come)
    )
    found = document(planner, planned, warn=terminal.warn)
    for remedy in found["remedies"] if frames is not None else ():  # which --max-frames would contradict
        remedy["option"] = remedy["option"].replace("--max-frames", "--frames")
    show(terminal, found, as_json=as_json)
    raise typer.Exit(1 if found["fits"] is False else 0)


def check_source(media: Path | None, seconds: float | None, typed: dict[str, str]) -> None:
    """Raise UsageError unless there is a file or a length, and no option of the other; MediaError for what
    needs no decoder to see."""
    if media is None and seconds is None:
        raise UsageError(
            "nothing to plan: neither a file nor --seconds",
            hint="try: seats plan clip.mp4 --model omni-7b, or: seats plan --seconds 600 --model omni-7b",
        )
    wrong = [typed[name] for name in (OF_FILES if media is None else OF_NO_FILE) if name in typed]
    if wrong:
        of, given = (
            ("files", "none is given") if media is None else ("a clip without a file", "one was given")
        )
        raise UsageError(f"{', '.join(wrong)}: of {of}, but {given}", hint="leave out one or the other")
    if media is not None:
        check_file(str(media))


def show(terminal: Terminal, found: dict[str, Any], *, as_json: bool) -> None:
    """The document, or its tables."""
    if as_json:
        terminal.document(found)
        return
    for line in plan_head(found):
        terminal.answer(line)
    for table in plan_tables(found):
        terminal.answer("")
        Terminal.report(terminal, table)
    terminal.answer("")
    for line in plan_notes(found):
        terminal.answer(line)
