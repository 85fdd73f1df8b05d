"""Options that eval, trace and calibrate share: which questions are asked, and by how many processes."""

from pathlib import Path
from typing import Annotated

import typer

from seats_cli.cli import options as opt
from seats_cli.errors import UsageError

SPLITS = ("dev", "test", "ood")  # of seats_cli.lab.suite; a test keeps the two equal
SUITE_PANEL = "Built-in suite"

ManifestArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="MANIFEST",
        show_default=False,
        help="Questions, one JSON object a line: media, question, answer (seats trace also does without); "
        "options, family, id, start and end where they apply. Without one, the built-in suite.",
    ),
]
ClipsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=opt.number(least=1, most=10**4, whole=True),
        rich_help_panel=SUITE_PANEL,
        show_default="40; 20 to trace and calibrate",
        help="Clips of the suite, each with about 14 questions.",
    ),
]
SuiteSeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        parser=opt.number(least=0, most=2**53, whole=True),
        rich_help_panel=SUITE_PANEL,
        show_default="0",
        help="Seed of the first clip; the next ones follow.",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        metavar="SPLIT",
        parser=opt.one_of(SPLITS),
        rich_help_panel=SUITE_PANEL,
        show_default="test; dev to trace and calibrate",
        help="dev to choose by, test to report, ood for voices of another kind.",
    ),
]
SecondsOption = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        parser=opt.number(least=8, most=64),
        rich_help_panel=SUITE_PANEL,
        show_default="16",
        help="Length of a clip: 8 to 64, in steps of 0.5.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=opt.number(least=1, most=256, whole=True),
        rich_help_panel=opt.MODEL_PANEL,
        show_default="one a GPU; for a small model one a CPU core, at most 8",
        help="Processes, each with a model of its own; they share the clips.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        envvar="SEATS_QUIET",
        rich_help_panel=opt.OUTPUT_PANEL,
        help="No notes or progress; the document on stdout, warnings and errors stay.",
    ),
]

Suite = tuple[int, int, str, float]  # clips, seed of the first, split, seconds


def chosen_suite(
    manifest: Path | None,
    clips: int | None,
    seed: int | None,
    split: str | None,
    seconds: float | None,
    usual: Suite,
) -> Suite:
    """The suite's options with `usual` where nothing was typed. Raises UsageError beside a manifest, and
    BadParameter for a length that no clip has."""
    typed = {"--clips": clips, "--seed": seed, "--split": split, "--seconds": seconds}
    given = [name for name, value in typed.items() if value is not None]
    if manifest is not None and given:
        raise UsageError(
            f"{', '.join(given)}: of the built-in suite, but a manifest was given",
            hint="leave out one or the other",
        )
    if seconds is not None and seconds % 0.5:
        raise typer.BadParameter(f"{seconds:g} is no multiple of 0.5", param_hint="--seconds")
    return (
        usual[0] if clips is None else clips,
        usual[1] if seed is None else seed,
        usual[2] if split is None else split,
        usual[3] if seconds is None else seconds,
    )
