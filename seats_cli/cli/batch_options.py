"""The options of `seats ask` for many files: where they come from, where records go, who answers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from seats_cli.cli.options import CLIP_PANEL, OUTPUT_PANEL, number, one_of
from seats_cli.errors import UsageError

SOURCES_PANEL = "Many files"
WORK_PANEL = "Many processors"
ENGINES = ("local", "ray")
FORMS = ("jsonl", "csv", "text")  # of seats_cli.batch.output; a test keeps them equal


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8): part 2 of 8, counted from 1."""
    first, slash, second = text.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise typer.BadParameter(f"{text!r} is not I/N, part I of N, counted from 1; accepted: 1/8 to 8/8")


# --- sources ----------------------------------------------------------------------------------------------
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        rich_help_panel=SOURCES_PANEL,
        help="Also the files that FILE lists, a line each, # before a comment; - reads the list from stdin, "
        "as - among MEDIA does.",
    ),
]
NullOption = Annotated[
    bool,
    typer.Option(
        "--null",
        "-0",
        rich_help_panel=SOURCES_PANEL,
        help="Names in the list end with NUL, as find -print0 writes them.",
    ),
]
RecursiveOption = Annotated[
    bool,
    typer.Option(
        "--recursive",
        rich_help_panel=SOURCES_PANEL,
        help="Folders with all their folders, but for hidden ones.",
    ),
]
GlobOption = Annotated[
    list[str] | None,
    typer.Option(
        "--glob",
        metavar="PATTERN",
        rich_help_panel=SOURCES_PANEL,
        show_default="names of media files",
        help="From folders only files whose names match, such as 'cam1_*.mp4'; may be given several times.",
    ),
]
ManifestOption = Annotated[
    Path | None,
    typer.Option(
        "--manifest",
        metavar="FILE",
        rich_help_panel=SOURCES_PANEL,
        help="A question a row instead of MEDIA and QUESTION: JSON Lines or CSV with media, question, and "
        "perhaps id, start, end, options; - reads JSON Lines from stdin.",
    ),
]
QuestionsOption = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        rich_help_panel=SOURCES_PANEL,
        help="Ask every question of FILE, a line each, about every file, instead of QUESTION; a file is read "
        "and encoded once for all of them; - reads them from stdin.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        rich_help_panel=SOURCES_PANEL,
        help="Only part I of N of the files, counted from 1: one part a job of an array, each with an -o of "
        "its own.",
    ),
]

# --- output -----------------------------------------------------------------------------------------------
JsonlOption = Annotated[
    bool,
    typer.Option(
        "--jsonl", rich_help_panel=OUTPUT_PANEL, help="A line of JSON an answer: short for --format jsonl."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        rich_help_panel=OUTPUT_PANEL,
        help="Add a record for each answer or failure to FILE. What FILE has already is not asked again.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        parser=one_of(FORMS),
        rich_help_panel=OUTPUT_PANEL,
        show_default="by FILE's ending, else jsonl; text on stdout",
        help="jsonl (docs/answers.schema.json), csv (the same in columns), or text.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUTPUT_PANEL, help="Empty FILE first.")
]
RetryFailedOption = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        rich_help_panel=OUTPUT_PANEL,
        help="Ask again what has failed in FILE; the new records take the places of the old.",
    ),
]
FailFastOption = Annotated[
    bool, typer.Option("--fail-fast", rich_help_panel=OUTPUT_PANEL, help="Stop at the first failure.")
]
UnorderedOption = Annotated[
    bool,
    typer.Option(
        "--unordered",
        rich_help_panel=OUTPUT_PANEL,
        help="Write records as they are finished, not in the order of the files.",
    ),
]

# --- who answers ------------------------------------------------------------------------------------------
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        parser=number(least=1, whole=True),
        rich_help_panel=WORK_PANEL,
        show_default="one a GPU where there are several, else this process alone",
        help="Answer in N processes, each with a copy of the model, on the GPUs in turns. A file that kills "
        "its process is tried once more, alone, and is then a failure like others.",
    ),
]
ReadersOption = Annotated[
    int | None,
    typer.Option(
        "--readers",
        metavar="N",
        parser=number(least=0, whole=True),
        rich_help_panel=WORK_PANEL,
        show_default="on a GPU one a core but one, at most 16, or 4 with --hwaccel or under 40 GiB; else 0",
        help="Decode N clips at a time, each in a process of its own: a file that crashes it or hangs fails "
        "alone. 0: in the process that answers, one clip ahead.",
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        parser=number(least=1, whole=True),
        rich_help_panel=WORK_PANEL,
        show_default="16 where a CUDA graph decodes, 8 in under 40 GiB, else 1",
        help="Decode up to N answers together, on a GPU with --graphs.",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        parser=one_of(ENGINES),
        rich_help_panel=WORK_PANEL,
        show_default="local",
        help="local: this machine. ray: a Ray cluster, a model a GPU, or as many as --workers says (pip "
        "install 'seats-cli[ray]').",
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        rich_help_panel=WORK_PANEL,
        show_default="a cluster of this machine, for this run",
        help="With --engine ray: HOST:PORT of a cluster whose hosts see the files under the same names; auto "
        "for the one that this host is part of.",
    ),
]
LimitsOption = Annotated[
    str | None,
    typer.Option(
        "--limits",
        metavar="KEY=VALUE,...",
        envvar="SEATS_LIMITS",
        rich_help_panel=CLIP_PANEL,
        show_default="size=256GiB,duration=24h,pixels=100M,frames=5M,seconds=3600,stall=120",
        help="Refuse files that are larger or (the part asked about) longer, or have larger pictures, more "
        "frames, or need more seconds to decode than this, or stall a process of --readers for so many; none "
        "for no limits.",
    ),
]
_UNITS = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    **{f"{prefix}b": 1000.0**power for power, prefix in enumerate(("", "k", "m", "g", "t"))},
    **{f"{prefix}ib": 1024.0**power for power, prefix in enumerate(("", "k", "m", "g", "t"))},
}
_TIMES = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_LIMITS = {  # what is typed: the field of media.Limits, and its units
    "size": ("size_bytes", _UNITS),
    "duration": ("duration_s", _TIMES),
    "pixels": ("pixels", _UNITS),
    "frames": ("frames", _UNITS),
    "seconds": ("decode_s", _TIMES),
    "stall": ("stall_s", _TIMES),
}


def parse_limits(text: str | None) -> dict[str, float | None]:
    """Keywords of media.Limits from "size=10GB,duration=2h"; what is not named keeps its default. A value, or
    all of them, may be none: no limit. Raises BadParameter."""
    if text is None:
        return {}
    if text.strip().lower() == "none":
        return {field: None for field, _ in _LIMITS.values()}
    found: dict[str, float | None] = {}
    for pair in text.split(","):
        name, equals, value = (part.strip().lower() for part in pair.partition("="))
        if not equals or name not in _LIMITS:
            raise typer.BadParameter(
                f"{pair.strip()!r} is not KEY=VALUE with a key of {', '.join(_LIMITS)}", param_hint="--limits"
            )
        field, units = _LIMITS[name]
        accepted = "none, a number above 0, a number with one of " + ", ".join(unit for unit in units if unit)
        if field in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--limits")
        digits = re.match(r"[0-9.]*", value)
        assert digits is not None  # it matches anything
        try:
            most = None if value == "none" else float(digits[0]) * units[value[digits.end() :].strip()]
        except (ValueError, KeyError):
            most = 0.0
        if most is not None and most <= 0:
            raise typer.BadParameter(
                f"{value!r} is no value of {name}; accepted: {accepted}", param_hint="--limits"
            )
        found[field] = most
    return found


def check_output(
    output: Path | None, form: str | None, *, jsonl: bool, overwrite: bool, retry_failed: bool
) -> None:
    """Raise UsageError for options of the output that do not go together."""
    if jsonl and form not in (None, "jsonl"):
        raise UsageError(f"--jsonl and --format {form} contradict each other: choose one")
    if output is not None and str(output) == "-":
        raise UsageError("-o - is no file", hint="leave -o out: --jsonl or --format writes to stdout")
    if output is None and (overwrite or retry_failed):
        raise UsageError(f"{'--overwrite' if overwrite else '--retry-failed'} is about a file: give -o FILE")
    if overwrite and retry_failed:
        raise UsageError("--overwrite leaves nothing that --retry-failed could try again: choose one")


def typed(given: Sequence[tuple[str, object]]) -> list[str]:
    """The names of the options that were given, of (name, value) pairs."""
    return [name for name, value in given if value not in (None, False, [])]
