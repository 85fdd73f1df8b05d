"""`seats ask MEDIA... QUESTION`: check what was typed, then answer a few files, or a batch of many."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from seats_cli.cli import batch_options as many
from seats_cli.cli import options as opt
from seats_cli.cli.ask_run import Request, answer_all
from seats_cli.cli.batch_run import BatchRequest, run_many
from seats_cli.cli.batch_sources import Sources, check, files_of, items_of
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.errors import UsageError


class AskCommand(TyperCommand):
    """A command whose usage line says in which order the arguments come."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after `seats ask` in the usage line."""
        return ["[OPTIONS]", "MEDIA...", "QUESTION"]


def ask(
    ctx: typer.Context,
    media: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MEDIA",
            show_default=False,
            help="Video, audio or image files, folders of them, or - for a list on stdin.",
        ),
    ] = None,
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", show_default=False, help="The last argument: what to ask.")
    ] = "",
    model: opt.ModelOption = opt.EMBEDDED_MODEL,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    load_format: opt.LoadFormatOption = "auto",
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
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            rich_help_panel=opt.TOKENS_PANEL,
            help="Answer again with all tokens and show both costs side by side.",
        ),
    ] = False,
    max_new_tokens: opt.MaxNewTokensOption = 256,
    temperature: opt.TemperatureOption = 0.0,
    top_p: opt.TopPOption = 1.0,
    seed: opt.SeedOption = 0,
    system: opt.SystemOption = None,
    fps: opt.FpsOption = 2.0,
    max_frames: opt.MaxFramesOption = 768,
    hwaccel: opt.HwaccelOption = "none",
    start: opt.StartOption = None,
    end: opt.EndOption = None,
    limits: many.LimitsOption = None,
    list_from: many.FromOption = None,
    null: many.NullOption = False,
    recursive: many.RecursiveOption = False,
    globs: many.GlobOption = None,
    questions: many.QuestionsOption = None,
    manifest: many.ManifestOption = None,
    shard: many.ShardOption = None,
    as_json: opt.JsonOption = False,
    jsonl: many.JsonlOption = False,
    output: many.OutputOption = None,
    form: many.FormatOption = None,
    overwrite: many.OverwriteOption = False,
    retry_failed: many.RetryFailedOption = False,
    fail_fast: many.FailFastOption = False,
    unordered: many.UnorderedOption = False,
    workers: many.WorkersOption = None,
    readers: many.ReadersOption = None,
    batch_size: many.BatchSizeOption = None,
    engine: many.EngineOption = None,
    ray_address: many.RayAddressOption = None,
    stats: opt.StatsOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Answer questions about files: one, several, folders of them, or what a list or a manifest names.

    The answer goes to stdout, or a record for each with -o FILE, everything else to stderr. The same command
    with -o goes on where it was stopped. Exit code: 0 all answered, 1 something failed, 2 wrong usage,
    130 interrupted.
    """
    terminal: Terminal = ctx.obj
    terminal.quiet, terminal.verbose, terminal.debug = quiet, verbose, debug
    if questions is not None and question:
        media, question = [*(media or ()), question], ""
    sources = Sources(
        tuple(media or ()),
        question,
        list_from=list_from,
        null=null,
        recursive=recursive,
        globs=tuple(globs or ()),
        manifest=manifest,
        questions=questions,
        shard=None if shard is None else many.parse_shard(shard),
        output=output,
    )
    check(sources)
    opt.check_range(start, end)
    allowed = many.parse_limits(limits)
    chosen = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings, schedule)
    check_selection(preset, chosen)
    if compare and method == "full":
        raise UsageError("--compare sets a method beside full tokens; it says nothing with --method full")
    if config is not None:
        terminal.detail(f"options from {config}")
    for_model = {
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
    }
    asked = {
        "ratio": ratio,
        "method": method,
        "preset": preset,
        "settings": chosen,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "system": system,
        "fps": fps,
        "max_frames": max_frames,
        "start_s": start,
        "end_s": end,
    }
    batch = many.typed(
        [
            ("--jsonl", jsonl),
            ("--output", output),
            ("--format", form),
            ("--overwrite", overwrite),
            ("--retry-failed", retry_failed),
            ("--fail-fast", fail_fast),
            ("--unordered", unordered),
            ("--workers", workers),
            ("--readers", readers),
            ("--batch-size", batch_size),
            ("--engine", engine),
            ("--ray-address", ray_address),
        ]
    )
    if as_json or compare or not (batch or sources.many):
        alone = "--json" if as_json else "--compare"
        check_alone(alone, batch, sources)
        request = Request(
            media=tuple(files_of(terminal, sources)),
            question=question,
            model=for_model,
            asked=asked,
            limits=allowed,
            as_json=as_json,
            stats=stats if stats is not None else terminal.is_watched and not (quiet or as_json),
            compare=compare,
        )
        raise typer.Exit(answer_all(terminal, request))
    many.check_output(output, form, jsonl=jsonl, overwrite=overwrite, retry_failed=retry_failed)
    if ray_address is not None and engine != "ray":
        raise UsageError("--ray-address is the address of --engine ray: give both")
    many_asked = BatchRequest(
        items_of(terminal, sources),
        for_model,
        asked,
        allowed,
        output=output,
        form="jsonl" if jsonl else form,
        overwrite=overwrite,
        named_in=sources.files,
        retry_failed=retry_failed,
        fail_fast=fail_fast,
        unordered=unordered,
        workers=workers,
        readers=readers,
        batch_size=batch_size,
        ray=engine == "ray",
        ray_address=ray_address,
    )
    raise typer.Exit(run_many(terminal, many_asked))


def check_alone(name: str, batch: Sequence[str], sources: Sources) -> None:
    """Raise UsageError for what goes with one question about files only, where it is a batch."""
    if batch:
        raise UsageError(
            f"{name} and {batch[0]} are two forms of output", hint=f"choose one: {batch[0]} for many"
        )
    for option in ("manifest", "questions", "shard"):
        if getattr(sources, option) is not None:
            raise UsageError(f"{name} is about one question, not --{option}", hint="--jsonl for many")


def check_selection(preset: str | None, settings: Mapping[str, str]) -> None:
    """Raise UsageError for a preset or a setting that does not exist, before anything heavy is imported."""
    if preset is not None:
        from seats_cli.presets import load_any

        load_any(preset)
    if settings:
        from seats_cli.selection.options import parse_settings

        parse_settings(settings)
