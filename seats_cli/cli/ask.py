"""`seats ask MEDIA... QUESTION`: check what was typed, answer file by file, show what it cost."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from seats_cli.cli import options as opt
from seats_cli.cli.config import SETTINGS_KEY, ConfigOption
from seats_cli.cli.console import Terminal
from seats_cli.errors import MediaError, SeatsError, UsageError, unexpected

if TYPE_CHECKING:
    from seats_cli.session import Answer, Session

EMBEDDED_NOTICE = (
    "note: this is the small embedded model: it only knows its own toy world (docs/demo-model.md). "
    "For real clips: --model Qwen/Qwen2.5-Omni-7B"
)
EXAMPLE = 'seats ask clip.mp4 "what is said?"'


class AskCommand(TyperCommand):
    """A command whose usage line says in which order the arguments come."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after `seats ask` in the usage line."""
        return ["[OPTIONS]", "MEDIA...", "QUESTION"]


@dataclass(frozen=True)
class Request:
    """One call of `seats ask`, checked. `model` and `asked` are keywords of ModelOptions and AskOptions."""

    media: tuple[str, ...]
    question: str
    model: Mapping[str, Any]
    asked: Mapping[str, Any]
    as_json: bool
    stats: bool
    compare: bool


def ask(
    ctx: typer.Context,
    media: Annotated[
        list[str] | None,
        typer.Argument(metavar="MEDIA", show_default=False, help="Video, audio or image files, one or more."),
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
    start: opt.StartOption = None,
    end: opt.EndOption = None,
    as_json: opt.JsonOption = False,
    stats: opt.StatsOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    debug: opt.DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Answer one question about each of the files, one after the other.

    The answer goes to stdout, everything else to stderr. Exit code: 0 all answered, 1 some file failed,
    2 wrong usage, 130 interrupted.
    """
    terminal: Terminal = ctx.obj
    terminal.quiet, terminal.verbose, terminal.debug = quiet, verbose, debug
    check_arguments(media or (), question)
    opt.check_range(start, end)
    chosen = opt.merged_settings(ctx.meta.get(SETTINGS_KEY, {}), settings, schedule)
    check_selection(preset, chosen)
    if compare and method == "full":
        raise UsageError("--compare sets a method beside full tokens; it says nothing with --method full")
    if config is not None:
        terminal.detail(f"options from {config}")
    request = Request(
        media=tuple(media or ()),
        question=question,
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
        },
        asked={
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
        },
        as_json=as_json,
        stats=stats if stats is not None else terminal.is_watched and not (quiet or as_json),
        compare=compare,
    )
    raise typer.Exit(answer_all(terminal, request))


def check_arguments(media: Sequence[str], question: str) -> None:
    """Raise UsageError unless there are files first and a question last."""
    if not question:
        problem = "no question: the last argument is empty" if media else "files and a question are missing"
        raise UsageError(problem, hint=EXAMPLE)
    if not media:
        missing = "the question is missing" if os.path.exists(question) else "files or a question are missing"
        raise UsageError(f"only one argument, {question!r}: {missing}", hint=f"files first, then: {EXAMPLE}")
    if not question.strip():
        raise UsageError("the question, the last argument, is blank", hint=EXAMPLE)
    if os.path.isfile(question):
        raise UsageError(
            f"the last argument is the question, but {question!r} is a file",
            hint=f"files first, then: {EXAMPLE}",
        )


def check_selection(preset: str | None, settings: Mapping[str, str]) -> None:
    """Raise UsageError for a preset or a setting that does not exist, before anything heavy is imported."""
    if preset is not None:
        from seats_cli.presets import load_any

        load_any(preset)
    if settings:
        from seats_cli.selection.options import parse_settings

        parse_settings(settings)


def check_file(path: str) -> None:
    """Raise MediaError for what needs no decoder to see: absent, a folder, empty, unreadable, a URL."""
    if "://" in path:
        raise MediaError(f"{path} is an address, not a file", hint="only local files are read: download it")
    if not os.path.exists(path):
        raise MediaError(f"no such file: {path}")
    if os.path.isdir(path):
        raise MediaError(f"{path} is a folder, not a media file", hint=f"name its files: {path}/*.mp4")
    if not os.access(path, os.R_OK):
        raise MediaError(f"no permission to read {path}")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise MediaError(f"{path} is empty (0 bytes)")


def answer_all(terminal: Terminal, request: Request) -> int:
    """Answer file by file; one that fails is told on stderr, then comes the next. Returns the exit code."""
    failures = {path: problem for path in request.media if (problem := problem_of(path)) is not None}
    session = None
    if len(failures) < len(set(request.media)):  # else nothing needs the model, nor torch
        session = open_session(terminal, request.model)
        if session.is_embedded:
            terminal.note(EMBEDDED_NOTICE)
        if session.random_weights:
            terminal.warn("random weights (--load-format dummy): costs are real, the words mean nothing")
    results: list[dict[str, Any]] = []
    code = 0
    several = len(request.media) > 1
    try:
        for path in request.media:
            terminal.subject = path if several else None
            try:
                if session is None or path in failures:
                    raise failures[path]
                results.append(answer_one(terminal, session, request, path, header=several))
            except (UsageError, BrokenPipeError):
                raise
            except Exception as error:
                shown = error if isinstance(error, SeatsError) else unexpected(error)
                terminal.end_answer()
                terminal.error(shown, about=path)
                results.append(failure_record(path, request.question, shown))
                code = 1 if several else shown.exit_code
    finally:  # also after Ctrl-C: what is done is kept
        if request.as_json and results:
            whole = {"schema_version": opt.SCHEMA_VERSION, "results": results}
            terminal.document(whole if several else results[0])
    return code


def problem_of(path: str) -> MediaError | None:
    """What `check_file` has against a file."""
    try:
        check_file(path)
    except MediaError as error:
        return error
    return None


def failure_record(path: str, question: str, error: SeatsError) -> dict[str, Any]:
    """The JSON of a file that could not be answered."""
    return {
        "schema_version": opt.SCHEMA_VERSION,
        "media": {"path": path},
        "question": question,
        "error": {"kind": error.kind, "message": str(error), "hint": error.hint},
    }


def open_session(terminal: Terminal, model: Mapping[str, Any]) -> "Session":
    """Load the model. Everything heavy is imported from here on, once all that was typed is checked."""
    with terminal.progress() as on_stage:
        if on_stage is not None:
            on_stage("load", 0, 0)
        quieten_libraries(terminal)
        with leaving_at_once(terminal):
            from seats_cli.session import ModelOptions, Session

        return Session(ModelOptions(**model), log=terminal.detail, note=terminal.note, warn=terminal.warn)


@contextmanager
def leaving_at_once(terminal: Terminal) -> Iterator[None]:
    """Ctrl-C ends the process then and there: an exception inside a library's native start-up can abort it.

    Nothing has been answered or opened yet, so there is nothing to keep."""

    def leave(*_: object) -> None:
        terminal.stop_progress()
        terminal.note("interrupted")
        terminal.err.flush()
        os._exit(opt.INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    signals = [signal.SIGINT]
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # see `ended_like_ctrl_c`
        signals.append(signal.SIGTERM)
    before = [signal.signal(number, leave) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does, so that no temporary folder stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quieten_libraries(terminal: Terminal) -> None:
    """Keep transformers' advice and the hub's bars off stderr, unless the user's variables ask for them."""
    if not terminal.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if terminal.quiet or not terminal.is_watched:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def answer_one(
    terminal: Terminal, session: "Session", request: Request, path: str, *, header: bool
) -> dict[str, Any]:
    """Answer about one file: the words to stdout, the table to stderr. Returns the JSON of the report."""
    from seats_cli.cli.tables import report_tables
    from seats_cli.session import AskOptions

    asked = AskOptions(**request.asked)
    if request.compare:  # whatever runs first pays for starting up; let it be a run that does not count
        run_hidden(
            terminal, session, path, request.question, AskOptions(**{**request.asked, "max_new_tokens": 2})
        )
    heading = f"==> {path} <==\n" if header else ""

    def show(text: str) -> None:
        nonlocal heading  # comes with the first word: a file that fails has none
        terminal.answer_piece(heading + text)
        heading = ""

    streamed = terminal.streams_answers and not request.as_json
    with terminal.progress() as on_stage:
        answer = session.ask(
            path, request.question, asked, on_text=show if streamed else None, on_stage=on_stage
        )
    if not request.as_json:
        show("" if streamed else f"{answer.text}\n")
        terminal.end_answer()
    if answer.report.tokens.finish_reason == "length":
        terminal.warn(f"the answer was cut off at --max-new-tokens {request.asked['max_new_tokens']}")
    elif not answer.text.strip():
        terminal.warn("the model ended its answer without a word")
    record = answer.report.to_json()
    full = None
    if request.compare:
        everything = AskOptions(**{**request.asked, "method": "full", "ratio": 1.0})
        full = run_hidden(terminal, session, path, request.question, everything)
        record = {**record, "full": full.report.to_json()}
    if request.stats or (request.compare and not (request.as_json or terminal.quiet)):
        for table in report_tables(answer.report, full.report if full is not None else None):
            terminal.table(table)
        if full is not None and full.text != answer.text:
            terminal.note(f"with all tokens: {full.text}")
    return record


def run_hidden(terminal: Terminal, session: "Session", path: str, question: str, asked: Any) -> "Answer":
    """An answer whose words are not shown: the other side of a comparison."""
    with terminal.progress() as on_stage, terminal.hushed():
        return session.ask(path, question, asked, on_stage=on_stage)
