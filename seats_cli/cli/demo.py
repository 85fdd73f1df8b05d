"""`seats demo OUT.mp4`: a clip of the toy world that the embedded model knows, with questions and answers."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from seats_cli.cli.console import Terminal
from seats_cli.cli.options import number
from seats_cli.errors import UsageError


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The clip to write, *.mp4.")],
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            parser=number(least=0, most=2**63 - 1, whole=True),
            help="Each seed is another clip.",
        ),
    ] = 0,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            parser=number(least=8, most=64),
            help="Length of the clip: 8 to 64, in steps of 0.5.",
        ),
    ] = 16.0,
    size: Annotated[
        int,
        typer.Option(
            metavar="PX",
            parser=number(least=64, most=512, whole=True),
            help="Width and height of the frames: even, 64 to 512.",
        ),
    ] = 336,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Render a clip as an ordinary H.264 and AAC file, and OUT.json beside it with questions and answers.

    The paths of both go to stdout. The same options give the same clip.
    """
    terminal: Terminal = ctx.obj
    terminal.debug = debug
    sidecar = out.with_suffix(".json")
    check_target(out, sidecar, overwrite=overwrite)

    with terminal.progress() as on_stage:
        if on_stage is not None:
            on_stage("render", 0, round(seconds))
        from seats_cli.demo.write import write_clip

        document = write_clip(
            out,
            seed,
            seconds,
            size=size,
            on_progress=lambda done: on_stage("render", round(done), round(seconds)) if on_stage else None,
        )
    terminal.answer(str(out))
    terminal.answer(str(sidecar))
    for question in document["questions"][:1]:
        terminal.note(f"try: {shlex.join(['seats', 'ask', str(out), question['question']])}")


def check_target(out: Path, sidecar: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless the clip and its questions can be written there."""
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"{out} does not end in .mp4", hint="the clip is H.264 and AAC in an MP4 file")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")
    for path in (out, sidecar):
        if path.is_dir():
            raise UsageError(f"{path} is a folder")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists", hint="--overwrite replaces it")
