"""What the commands share: option types with their checks, and the settings that a config file may hold.

Every check here needs no torch, so that a wrong value is an answer of milliseconds. Values come from, in this
order: the command line, SEATS_* variables, the config file, the defaults below.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer

from seats_cli.errors import UsageError

# The names of seats_cli.selection.methods.METHODS, which imports torch; a test keeps the two equal.
METHOD_NAMES = (
    "seats",
    "full",
    "random",
    "fixed",
    "fastv",
    "fastv-om",
    "visionzip",
    "visionzip-om",
    "divprune",
    "divprune-om",
    "dycoke",
    "omnizip",
)
SCHEDULES = ("auto", "paper", "calibrated")  # of seats_cli.selection.options.ScheduleSource, likewise
HWACCELS = ("none", "auto", "cuda")  # of seats_cli.media.nvdec.CHOICES, likewise
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of seats_cli.model.quantize.SCHEMES and seats_cli.model.placement.DEVICE_MAPS, likewise.
QUANTIZE_NAMES = ("none", "8bit", "4bit", "int8", "int4", "fp8")
DEVICE_MAPS = ("none", "auto", "balanced", "sequential")

EMBEDDED_MODEL = "tiny"
INTERRUPTED = 130  # exit code after Ctrl-C, as shells count it
SCHEMA_VERSION = 1  # measure.report.SCHEMA_VERSION, for records that are made without importing torch

MODEL_PANEL = "Model"
TOKENS_PANEL = "Which tokens are kept"
ANSWER_PANEL = "Answer"
CLIP_PANEL = "Clip"
OUTPUT_PANEL = "Output"


def number(
    *, above: float | None = None, least: float | None = None, most: float | None = None, whole: bool = False
) -> Callable[[str], float]:
    """A parser of finite numbers in a range, whose error says the value met and what is accepted."""
    limits = (("above", above), ("at least", least), ("at most", most))
    bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
    accepted = f"{'a whole number' if whole else 'a number'} {bounds}".rstrip()

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number; accepted: {accepted}") from None
        inside = (
            (above is None or value > above)
            and (least is None or value >= least)
            and (most is None or value <= most)
            and abs(value) != float("inf")
            and value == value
        )
        if not inside:
            raise typer.BadParameter(f"{text} is out of range; accepted: {accepted}")
        return value

    return parse


def parse_time(text: str) -> float:
    """Seconds from `12.5`, `mm:ss` or `h:mm:ss`; minutes and seconds after a colon stay below 60."""
    problem = typer.BadParameter(f"{text!r} is not a time; accepted: seconds (12.5), mm:ss, or h:mm:ss")
    fields = text.strip().split(":")
    if not 1 <= len(fields) <= 3 or not all(f.isascii() and f.isdigit() for f in fields[:-1]):
        raise problem
    last = fields[-1]
    if not last.isascii() or not last.replace(".", "", 1).isdigit():
        raise problem
    values = [float(field) for field in fields]
    if any(value >= 60 for value in values[1:]):
        raise problem
    seconds = 0.0
    for value in values:
        seconds = seconds * 60 + value
    return seconds


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`--set key=value` pairs as a mapping; the last of equal keys counts. BadParameter without `=`."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--set")
        settings[key.strip()] = value.strip()
    return settings


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A parser of names, whose error lists them."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def parse_device(text: str) -> str:
    """auto, cpu, mps, cuda, or cuda:N; whether it is there is for torch to say, later."""
    name, colon, index = text.partition(":")
    if name not in ("auto", "cpu", "mps", "cuda") or (colon and (name != "cuda" or not index.isdigit())):
        raise typer.BadParameter(f"{text!r} is not one of auto, cpu, mps, cuda, cuda:0, cuda:1, ...")
    return text


def check_range(start_s: float | None, end_s: float | None) -> None:
    """Raise BadParameter unless --start comes before --end."""
    if end_s is not None and (start_s or 0.0) >= end_s:
        begin = f"--start {start_s:g} s" if start_s is not None else "the clip's beginning"
        raise typer.BadParameter(f"{end_s:g} s does not come after {begin}", param_hint="--end")


def merged_settings(
    from_file: Mapping[str, str], pairs: Sequence[str] | None, schedule: str | None = None
) -> dict[str, str]:
    """Settings of the config file, over them `--schedule` and the pairs of `--set`, key by key. Raises
    UsageError where these two name different schedules."""
    named = {} if schedule is None else {"schedule": schedule}
    typed = parse_settings(pairs or ())
    if schedule is not None and typed.get("schedule", schedule) != schedule:
        raise UsageError(
            f"--schedule {schedule} and --set schedule={typed['schedule']} contradict each other",
            hint="leave out one of them (SEATS_SCHEDULE and the config file count as --schedule)",
        )
    return {**from_file, **named, **typed}


# --- model ------------------------------------------------------------------------------------------------
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="SEATS_MODEL",
        rich_help_panel=MODEL_PANEL,
        help="A checkpoint folder, a hub id such as Qwen/Qwen2.5-Omni-7B, or an alias: tiny (embedded), "
        "omni-3b, omni-7b, omni-30b.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        parser=parse_device,
        envvar="SEATS_DEVICE",
        rich_help_panel=MODEL_PANEL,
        help="auto, cpu, mps, cuda, or cuda:N.",
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        parser=one_of(DTYPES),
        envvar="SEATS_DTYPE",
        rich_help_panel=MODEL_PANEL,
        help="auto, float32, bfloat16, or float16.",
    ),
]
LoadFormatOption = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        parser=one_of(("auto", "dummy")),
        envvar="SEATS_LOAD_FORMAT",
        rich_help_panel=MODEL_PANEL,
        help="auto, or dummy: random weights of the model's shape, to try speed and memory without it.",
    ),
]
QuantizeOption = Annotated[
    str,
    typer.Option(
        metavar="SCHEME",
        parser=one_of(QUANTIZE_NAMES),
        envvar="SEATS_QUANTIZE",
        rich_help_panel=MODEL_PANEL,
        help="Load the decoder's weights in fewer bits: 8bit or 4bit (bitsandbytes), int8, int4 or fp8 "
        "(torchao). Checkpoints that are quantised already (GPTQ, AWQ) need no option.",
    ),
]
DeviceMapOption = Annotated[
    str,
    typer.Option(
        metavar="MAP",
        parser=one_of(DEVICE_MAPS),
        envvar="SEATS_DEVICE_MAP",
        rich_help_panel=MODEL_PANEL,
        help="auto, balanced or sequential: spread the weights over all GPUs, and over the host's memory "
        "what no GPU has room for (needs accelerate). none: one device, or all GPUs where no single one has "
        "room.",
    ),
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        envvar="SEATS_OFFLINE",
        rich_help_panel=MODEL_PANEL,
        help="Never reach for the network, as HF_HUB_OFFLINE=1 does.",
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        envvar="SEATS_COMPILE",
        rich_help_panel=MODEL_PANEL,
        help="Run the fast paths where they can run, or transformers' own modules throughout.",
    ),
]
GraphsOption = Annotated[
    bool,
    typer.Option(
        "--graphs/--no-graphs",
        envvar="SEATS_GRAPHS",
        rich_help_panel=MODEL_PANEL,
        help="On a GPU, decode with a CUDA graph, or layer by layer.",
    ),
]

# --- tokens -----------------------------------------------------------------------------------------------
RatioOption = Annotated[
    float,
    typer.Option(
        "--ratio",
        "-r",
        metavar="R",
        parser=number(above=0, most=1),
        envvar="SEATS_RATIO",
        rich_help_panel=TOKENS_PANEL,
        help="Share of the video and audio tokens to keep, on average over the layers: above 0, at most 1.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        parser=one_of(METHOD_NAMES),
        envvar="SEATS_METHOD",
        rich_help_panel=TOKENS_PANEL,
        help=f"How tokens are chosen: {', '.join(METHOD_NAMES)}.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        envvar="SEATS_PRESET",
        rich_help_panel=TOKENS_PANEL,
        help="Schedule and method options by name (paper: as published) or from a YAML file, instead of the "
        "checkpoint's own.",
    ),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEDULE",
        parser=one_of(SCHEDULES),
        envvar="SEATS_SCHEDULE",
        rich_help_panel=TOKENS_PANEL,
        help="Where tokens leave: paper (the published decay), calibrated (the best measured on this "
        "checkpoint, by seats calibrate), or auto: calibrated where the preset has it.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=TOKENS_PANEL,
        help="One method option, over the preset's; may be given several times.",
    ),
]

# --- answer -----------------------------------------------------------------------------------------------
MaxNewTokensOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=number(least=1, whole=True),
        envvar="SEATS_MAX_NEW_TOKENS",
        rich_help_panel=ANSWER_PANEL,
        help="Stop the answer after so many tokens.",
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        metavar="T",
        parser=number(least=0),
        envvar="SEATS_TEMPERATURE",
        rich_help_panel=ANSWER_PANEL,
        help="0 takes the likeliest token each time; above 0 samples.",
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="P",
        parser=number(above=0, most=1),
        envvar="SEATS_TOP_P",
        rich_help_panel=ANSWER_PANEL,
        help="When sampling, from the likeliest tokens that hold this much probability.",
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=number(least=0, most=2**63 - 1, whole=True),
        envvar="SEATS_SEED",
        rich_help_panel=ANSWER_PANEL,
        help="Seed of sampling and of --method random.",
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        envvar="SEATS_SYSTEM",
        rich_help_panel=ANSWER_PANEL,
        help="System prompt instead of the family's own.",
    ),
]

# --- clip -------------------------------------------------------------------------------------------------
FpsOption = Annotated[
    float,
    typer.Option(
        metavar="FPS",
        parser=number(above=0),
        envvar="SEATS_FPS",
        rich_help_panel=CLIP_PANEL,
        help="Frames to look at in a second of video.",
    ),
]
MaxFramesOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=number(least=2, whole=True),
        envvar="SEATS_MAX_FRAMES",
        rich_help_panel=CLIP_PANEL,
        help="Look at no more frames than this; longer clips are sampled more thinly.",
    ),
]
StartOption = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        parser=parse_time,
        rich_help_panel=CLIP_PANEL,
        help="Begin here: seconds, mm:ss, or h:mm:ss.",
    ),
]
EndOption = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        parser=parse_time,
        rich_help_panel=CLIP_PANEL,
        help="End here: seconds, mm:ss, or h:mm:ss.",
    ),
]

HwaccelOption = Annotated[
    str,
    typer.Option(
        metavar="WHERE",
        parser=one_of(HWACCELS),
        envvar="SEATS_HWACCEL",
        rich_help_panel=CLIP_PANEL,
        help="Decode video on the CPU (none), with an NVIDIA GPU's own decoder (cuda; what that cannot, the "
        "CPU does, with a warning), or on the model's GPU where it can (auto). The frames are the same.",
    ),
]

# --- output -----------------------------------------------------------------------------------------------
JsonOption = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT_PANEL, help="Print one JSON document instead of text."),
]
StatsOption = Annotated[
    bool | None,
    typer.Option(
        "--stats/--no-stats",
        envvar="SEATS_STATS",
        rich_help_panel=OUTPUT_PANEL,
        show_default="shown at a terminal",
        help="Show what it cost, on stderr.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        envvar="SEATS_QUIET",
        rich_help_panel=OUTPUT_PANEL,
        help="No notes, progress or table; warnings and errors stay.",
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        envvar="SEATS_VERBOSE",
        rich_help_panel=OUTPUT_PANEL,
        help="Say why each automatic choice was made.",
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", envvar="SEATS_DEBUG", rich_help_panel=OUTPUT_PANEL, help="Show the traceback of an error."
    ),
]
