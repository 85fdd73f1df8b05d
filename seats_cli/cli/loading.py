"""The model is loaded: everything heavy is imported from here on, once all that was typed is checked."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from seats_cli.cli import options as opt
from seats_cli.cli.console import Terminal

if TYPE_CHECKING:
    from seats_cli.session import Session

EMBEDDED_NOTICE = (
    "note: this is the small embedded model: it only knows its own toy world (docs/demo-model.md). "
    "For real clips: --model Qwen/Qwen2.5-Omni-7B"
)


def open_session(
    terminal: Terminal,
    model: Mapping[str, Any],
    limits: Mapping[str, Any],
    *,
    note: Callable[[str], None] | None = None,
) -> "Session":
    """Load the model. Everything heavy is imported from here on, once all that was typed is checked.

    model, limits: keywords of ModelOptions and of media.Limits
    note: who gets the counts of each clip, instead of a person."""
    with terminal.progress() as on_stage:
        if on_stage is not None:
            on_stage("load", 0, 0)
        quieten_libraries(terminal)
        with leaving_at_once(terminal):
            from seats_cli.session import Limits, ModelOptions, Session

        return Session(
            ModelOptions(**model),
            log=terminal.detail,
            note=note or terminal.note,
            warn=terminal.warn,
            limits=Limits(**limits),
        )


def say_whose_answers(terminal: Terminal, *, is_embedded: bool, random_weights: bool) -> None:
    """What a person should know of the model before they believe it."""
    if is_embedded:
        terminal.note(EMBEDDED_NOTICE)
    if random_weights:
        terminal.warn("random weights (--load-format dummy): costs are real, the words mean nothing")


@contextmanager
def leaving_at_once(terminal: Terminal) -> Iterator[None]:
    """Ctrl-C ends the process then and there: an exception inside a library's native start-up can abort it.

    What has to be done before that has been given to `Terminal.before_leaving`."""

    def leave(*_: object) -> None:
        terminal.leave()
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
