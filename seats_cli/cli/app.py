"""The `seats` command: which commands there are, and what happens to errors and interruptions."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from seats_cli import __version__
from seats_cli.cli import ask, bench, calibrate, demo, doctor, eval, plan, trace
from seats_cli.cli.console import Terminal, printable
from seats_cli.cli.options import INTERRUPTED
from seats_cli.errors import SeatsError, unexpected


class SeatsGroup(TyperGroup):
    """The command group: turns every error into a message and an exit code, and a traceback with --debug."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for; commands find the Terminal as `ctx.obj`."""
        terminal = ctx.obj = Terminal()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            terminal.end_answer()
            terminal.note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except SeatsError as error:
            terminal.error(error)
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer ends quietly when the reader of a pipe has gone
        except typer.TyperException as error:  # typer shows it, with what was typed in it
            error.message = printable(error.message)
            raise
        except Exception as error:
            terminal.error(unexpected(error))
            raise typer.Exit(1) from None
        finally:
            terminal.stop_progress()


def build_app(*, decorated: bool) -> typer.Typer:
    """The command line; `decorated` draws help and usage errors with rich, for a person at a terminal."""
    app = typer.Typer(
        name="seats",
        cls=SeatsGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if decorated else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(seats)
    about_ask = "Answer a question about video and audio files."
    app.command("ask", cls=ask.AskCommand, short_help=about_ask)(ask.ask)
    app.command("plan", short_help="Say what an answer would take, without a model.")(plan.plan)
    app.command("bench", short_help="Time answers: all tokens beside each method.")(bench.bench)
    app.command("eval", short_help="Measure how often methods answer right.")(eval.evaluate)
    app.command("trace", short_help="Measure which layers read the clip.")(trace.trace)
    app.command("calibrate", short_help="Find a checkpoint's best plan at each ratio.")(calibrate.calibrate)
    app.command("demo", short_help="Render a clip with known answers.")(demo.demo)
    app.command("doctor", short_help="Show what is installed and what is missing.")(doctor.doctor)
    return app


def show_version(value: bool) -> None:
    """Print the version and end."""
    if value:
        Terminal().answer(f"seats {__version__}")
        raise typer.Exit


def seats(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Ask questions about video and audio files, answered on this machine by a Qwen-Omni model that reads
    only the tokens that matter (SEATS, arXiv 2605.20035)."""


def open_closed_streams() -> None:
    """Let streams that were closed for this process (`>&-`) lead nowhere, before a file of ours, an output
    perhaps, gets the number of one and whatever a library prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code: 0 all right, 1 some item failed, 2 usage, 130 stopped."""
    open_closed_streams()
    decorated = sys.stdout.isatty() and sys.stderr.isatty()
    try:
        build_app(decorated=decorated)(list(arguments), prog_name="seats")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0
