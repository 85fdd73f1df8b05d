"""The run of `seats ask` over many files: what is left to do, who answers, where records go."""

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seats_cli.batch.output import AnswerFile, InOrder, Output, Stream, form_of, open_output
from seats_cli.batch.resume import Left, by_clip, left_of, with_keys
from seats_cli.batch.sources import Item
from seats_cli.cli import options as opt
from seats_cli.cli.ask_run import problem_of
from seats_cli.cli.batch_screen import BatchScreen
from seats_cli.cli.console import Terminal
from seats_cli.cli.eval_screen import counted
from seats_cli.cli.loading import (
    ended_like_ctrl_c,
    leaving_at_once,
    open_session,
    quieten_libraries,
    say_whose_answers,
)
from seats_cli.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from seats_cli.batch.decoders import Pace
    from seats_cli.batch.reading import Clip
    from seats_cli.batch.records import Asking, Record


@dataclass(frozen=True)
class BatchRequest:
    """One call of `seats ask` over many files, checked.

    model, asked, limits: keywords of ModelOptions, AskOptions and media.Limits
    form: None for what the output's name says
    """

    items: Sequence[Item]
    model: Mapping[str, Any]
    asked: Mapping[str, Any]
    limits: Mapping[str, Any]
    output: Path | None = None
    form: str | None = None
    overwrite: bool = False
    named_in: tuple[str, ...] = ()  # files that questions and names were read from
    retry_failed: bool = False
    fail_fast: bool = False
    unordered: bool = False
    workers: int | None = None
    readers: int | None = None
    batch_size: int | None = None
    ray: bool = False
    ray_address: str | None = None


def run_many(terminal: Terminal, request: BatchRequest) -> int:
    """Ask what has no record yet, write records as they come, say what came of it. Returns the exit code."""
    check_output(request)
    items = with_keys(request.items, request.model, request.asked)
    wanted = [item.key for item in items]
    with ExitStack() as stack:
        stack.enter_context(ended_like_ctrl_c())
        output = stack.enter_context(_opened(terminal, request))
        if isinstance(output, AnswerFile):
            stack.enter_context(terminal.before_leaving(output.close))
        if request.retry_failed and isinstance(output, AnswerFile):
            output.forget_failures(items)
        if not items:
            terminal.note("no file falls into this shard")
            if isinstance(output, AnswerFile):
                output.keep_empty()  # whoever joins the shards finds each
        left = left_of(items, output.known)
        _say_what_is_there(terminal, request, left, output, set(wanted))
        keeps_errors = _form(request) != "text"
        on_stdout = request.output is None
        screen = BatchScreen(terminal, len(left.items), keeps_errors=keeps_errors, on_stdout=on_stdout)
        try:
            code = _ask_all(terminal, request, left.items, output, screen)
            if code is None and isinstance(output, AnswerFile) and not request.unordered:
                output.put_in_order(wanted)
        finally:
            if screen.done or not left.items:
                screen.summary(left, retry=_retry_command(request))
    if code == opt.INTERRUPTED:
        told = (
            "the same command goes on from there" if request.output is not None else "-o FILE keeps answers"
        )
        terminal.note(f"interrupted; {told}")
    return code if code is not None else 1 if screen.failed or left.failed else 0


def check_output(request: BatchRequest) -> None:
    """Raise UsageError where records would be written over what they are made from."""
    if request.output is None or not request.output.exists():
        return
    for path in dict.fromkeys([*request.named_in, *(item.path for item in request.items)]):
        with suppress(OSError, ValueError):  # a file that is not there is no output either
            if os.path.samefile(path, request.output):
                raise UsageError(
                    f"-o {request.output} is one of the files that are read", hint="give -o a name of its own"
                )


def _ask_all(
    terminal: Terminal, request: BatchRequest, items: Sequence[Item], output: Output, screen: BatchScreen
) -> int | None:
    """Every item's record to the output, what was finished also where the run ends early; the exit code then,
    None at its end."""

    def write(record: "Record") -> None:
        output.append(record)
        screen.record(record)

    order = InOrder([item.key for item in items], write)
    put = write if request.unordered else order.put
    try:
        with closing(_records(terminal, request, items, screen)) as records:
            for record in records:
                put(record)
                if request.fail_fast and not record["ok"]:
                    order.flush()
                    return 1
    except KeyboardInterrupt:
        if not output.torn and not (request.output is None and terminal.streams_answers):  # no text after ^C
            with suppress(BrokenPipeError):  # who reads was stopped too
                order.flush()
        return opt.INTERRUPTED
    except Exception:
        if not output.torn:
            order.flush()
        raise
    return None


def _records(
    terminal: Terminal, request: BatchRequest, items: Sequence[Item], screen: BatchScreen
) -> Generator["Record", None, None]:
    """The records of all items, as they are finished. Where no file can be opened no model is loaded."""
    problems = {path: problem for path in {item.path for item in items} if (problem := problem_of(path))}
    if problems:
        from seats_cli.batch.records import failure

        for item in items:
            if item.path in problems:
                yield failure(item, _asking(request), problems[item.path])
    readable = [item for item in items if item.path not in problems]
    if readable:
        yield from _answers(terminal, request, list(by_clip(readable)), screen)


def _answers(
    terminal: Terminal, request: BatchRequest, clips: "Sequence[Clip]", screen: BatchScreen
) -> Iterator["Record"]:
    """The records of clips that are there, by whoever was asked to answer."""
    with ExitStack() as stack:
        if request.ray:
            answers = gather_by_ray(terminal, request, stack)
        else:
            answers = gather(terminal, request, len(clips), stack)
        screen.begin()
        with screen.shown():
            yield from answers(clips, screen)


Answers = Callable[["Sequence[Clip]", BatchScreen], Iterator["Record"]]


def alone(terminal: Terminal, request: BatchRequest, n_clips: int, stack: ExitStack) -> Answers:
    """The session of this process; the stack ends the processes that decode for it."""
    with leaving_at_once(terminal):
        from seats_cli.batch.decoders import decoders
    pace = _pace(terminal, request, n_clips)
    openers = stack.enter_context(decoders(pace))  # they start while the model is loaded
    session = open_session(terminal, request.model, request.limits, note=terminal.detail)
    from seats_cli.batch.reading import Listener
    from seats_cli.batch.streams import one_core_each
    from seats_cli.batch.team import answered, described

    stack.enter_context(one_core_each(session.adapter.device))
    asking = _asking(request)
    _say_what_is_asked(terminal, request, described(session, asking))
    return lambda clips, screen: answered(
        session, clips, asking, pace, openers=openers, listener=Listener(stage=screen.stage)
    )


def gather(terminal: Terminal, request: BatchRequest, n_clips: int, stack: ExitStack) -> Answers:
    """As many processes as were asked for, else one a GPU where there are several; else this one. The stack
    ends them."""
    quieten_libraries(terminal)
    with leaving_at_once(terminal):
        from seats_cli.batch.devices import choose_workers
        from seats_cli.batch.reading import Listener
        from seats_cli.batch.team import AnsweringCrew

        model = request.model
        devices = choose_workers(request.workers, n_clips, model)
    if request.workers is None and not (len(devices) > 1 and devices[0].startswith("cuda")):
        return alone(terminal, request, n_clips, stack)
    terminal.detail(f"{counted(len(devices), 'worker')} on {', '.join(dict.fromkeys(devices))}")
    pace = _pace(terminal, request, n_clips, devices)
    try:
        crew = AnsweringCrew(devices, _asking(request), warn=terminal.warn, log=terminal.detail, pace=pace)
    except DeviceError as error:
        if request.workers is not None:
            raise
        terminal.warn(f"no GPU has room for a model of its own: {error} Going on in one process.")
        return alone(terminal, request, n_clips, stack)
    stack.enter_context(crew)
    _say_what_is_asked(terminal, request, crew.described)
    warn = _warner(terminal)
    return lambda clips, screen: crew.answers(clips, Listener(stage=screen.stage, warn=warn))


def _say_what_is_asked(terminal: Terminal, request: BatchRequest, model: Mapping[str, bool]) -> None:
    """`model`: see `team.described`."""
    if (request.batch_size or 1) > 1 and not model["decodes_together"]:
        terminal.warn(
            f"--batch-size {request.batch_size} has no effect: "
            "answers are decoded together in a CUDA graph only"
        )
    say_whose_answers(terminal, is_embedded=model["is_embedded"], random_weights=model["random_weights"])


def gather_by_ray(terminal: Terminal, request: BatchRequest, stack: ExitStack) -> Answers:
    """Actors of a Ray cluster; the stack lets go of it."""
    quieten_libraries(terminal)
    with leaving_at_once(terminal):
        from seats_cli.batch.decoders import OVERTAKE, Pace
        from seats_cli.batch.ray_engine import RayTeam
        from seats_cli.batch.reading import Listener

    # What the cluster has is not known here: nothing is chosen for it, and each reader gets a thread.
    overtake = None if request.unordered else OVERTAKE
    pace = Pace(request.readers or 0, request.batch_size or 1, threads=1, overtake=overtake)
    team = stack.enter_context(
        RayTeam(_asking(request), address=request.ray_address, actors=request.workers, pace=pace)
    )
    terminal.detail(f"ray: {counted(team.size, 'actor')} at {request.ray_address or 'this machine'}")
    model = request.model
    say_whose_answers(
        terminal,
        is_embedded=model["model"] == opt.EMBEDDED_MODEL,
        random_weights=model["load_format"] == "dummy",
    )
    warn = _warner(terminal)
    return lambda clips, screen: team.answers(clips, Listener(stage=screen.stage, warn=warn))


def _warner(terminal: Terminal) -> Callable[[str, str | None], None]:
    def warn(message: str, path: str | None) -> None:
        if path is not None:
            message = message.removeprefix(f"{os.path.basename(path)}: ")
        terminal.warn(message if path is None or path in message else f"{path}: {message}")

    return warn


def _pace(
    terminal: Terminal, request: BatchRequest, n_clips: int, devices: Sequence[str] | None = None
) -> "Pace":
    """`devices`: of the workers, None without any."""
    model = request.model
    with leaving_at_once(terminal):
        from seats_cli.batch.decoders import choose_pace
        from seats_cli.batch.devices import on_gpu, on_small_gpu, shared_gpu
        from seats_cli.media.nvdec import why_not

        first = (devices or (model["device"],))[0]
        by_gpu = model["hwaccel"] != "none" and why_not(int(first.partition(":")[2] or 0)) is None
        pace = choose_pace(
            request.readers,
            request.batch_size,
            on_gpu=on_gpu(model["device"]),
            graphs=model["compile"] and model["graphs"] and not shared_gpu(devices or ()),
            hwaccel=model["hwaccel"] if by_gpu else "none",
            n_clips=n_clips,
            small_gpu=on_small_gpu(first),
            sharing=len(devices or (None,)),
            on_one_gpu=max(Counter(devices or (None,)).values()),
            unordered=request.unordered,
        )
    whose = " each" if devices else ""
    terminal.detail(f"clips decoded at once by processes: {pace.readers}{whose}")
    terminal.detail(f"answers decoded together: {pace.slots}{whose}")
    return pace


def _asking(request: BatchRequest) -> "Asking":
    from seats_cli.batch.records import Asking

    return Asking(request.model, request.asked, request.limits)


# ---- the output -------------------------------------------------------------------------------------------


def _form(request: BatchRequest) -> str:
    return form_of(request.output, request.form)


def _opened(terminal: Terminal, request: BatchRequest) -> Output:
    form = _form(request)
    if form == "text" and len({item.question for item in request.items}) > 1:
        form = "text with questions"
    if request.output is None:
        return Stream(form, terminal.record)
    return open_output(request.output, form, warn=terminal.warn, overwrite=request.overwrite)


def _say_what_is_there(
    terminal: Terminal, request: BatchRequest, left: Left, output: Output, wanted: set[str]
) -> None:
    if left.repeated:
        terminal.note(f"{counted(left.repeated, 'question')} named more than once: asked once")
    if left.done:
        terminal.note(f"{request.output} has {left.done} of {left.done + len(left.items)} answers already")
    others = len(output.known.keys() - wanted)
    if others:
        what = f"{counted(others, 'record')} of other files, questions, models or settings"
        terminal.note(f"{request.output} also has {what}: left alone")


def _retry_command(request: BatchRequest) -> str | None:
    """What to type to ask again what has failed; None where nothing was kept."""
    if request.output is None:
        return None
    if "ask" not in sys.argv:
        return "the same command with --retry-failed"
    typed = [word for word in sys.argv[1:] if word not in ("--retry-failed", "--overwrite")]
    piped = "... | " if "-" in typed else ""  # what came on stdin has to come again
    return piped + shlex.join(["seats", *typed, "--retry-failed"])
