"""Presets: what is known about a checkpoint before it is loaded, one YAML file a model.

A model preset says where a checkpoint's layers stop needing tokens (schedule), how a total ratio splits
between video and audio, the windows of stage I, token caps and the geometry for random weights, each with
its provenance. A style ("default", "paper") only sets options of selection. Nothing here imports torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from seats_cli.errors import UsageError
from seats_cli.presets.reading import Section, read_yaml

Status = Literal["published", "by rule", "calibrated"]

AnyRow = TypeVar("AnyRow", bound="RatioPair")

FOLDER = Path(__file__).parent
ALIASES: Mapping[str, str] = {
    "tiny": "tiny",
    "omni-3b": "Qwen/Qwen2.5-Omni-3B",
    "omni-7b": "Qwen/Qwen2.5-Omni-7B",
    "omni-30b": "Qwen/Qwen3-Omni-30B-A3B-Instruct",
}


@dataclass(frozen=True)
class Schedule:
    """Where tokens leave the LLM, layers 1-based: dropped after each of `drop_layers`, none left from
    `late_layer` on (None: some stay to the end). `entry_scale` is the paper's lambda, `tau` stage II's."""

    drop_layers: tuple[int, ...]
    late_layer: int | None
    entry_scale: float
    tau: float


@dataclass(frozen=True)
class RatioPair:
    """One row of a ratio table: at the total `ratio`, this mean retention of video and of audio."""

    ratio: float
    video: float
    audio: float


@dataclass(frozen=True)
class CalibratedDrop:
    """After layer `after_layer` (1-based), the fraction of each kind's tokens still there that stays."""

    after_layer: int
    video: float
    audio: float


@dataclass(frozen=True)
class CalibratedRow(RatioPair):
    """The best measured plan at one total: besides the split between the kinds, where tokens leave.

    How much enters follows: what meets the split with these `drops` and none left from `late_layer` on.
    """

    late_layer: int | None
    drops: tuple[CalibratedDrop, ...]


@dataclass(frozen=True)
class TokenCaps:
    """How many video tokens a grid (two frames) may have, and all grids together."""

    min_per_grid: int
    max_per_grid: int
    total: int


@dataclass(frozen=True)
class StageOneWindows:
    """Stage I's windows: `video_grids` grids, `audio_tokens` audio tokens; saliency of audio is attention
    within `audio_saliency_positions` positions of the encoder."""

    video_grids: int
    audio_tokens: int
    audio_saliency_positions: int


@dataclass(frozen=True)
class Match:
    """The checkpoints that a preset is for: any of these model_types, this depth and this width."""

    model_types: tuple[str, ...]
    n_layers: int
    hidden_size: int


@dataclass(frozen=True)
class Preset:
    """What is known about one checkpoint.

    status:      "published" (the paper's numbers), "by rule" (from the depth alone) or "calibrated"
        (measured)
    checkpoint:  hub id, or "" where the preset is for no particular one
    ratio_table: rows in ascending ratio
    calibrated:  the best measured plans, in ascending ratio; () where nobody measured
    published_windows: the paper's windows, where `windows` are others
    options:     options of selection that this preset sets, as `--set` would
    geometry:    sections of the thinker's config ("text", "vision", "audio", "thinker") for random weights
    provenance:  where each group of numbers comes from
    """

    name: str
    status: Status
    checkpoint: str
    match: Match
    schedule: Schedule
    windows: StageOneWindows
    ratio_table: tuple[RatioPair, ...]
    caps: TokenCaps
    options: Mapping[str, str]
    geometry: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, str]
    calibrated: tuple[CalibratedRow, ...] = ()
    published_windows: StageOneWindows | None = None

    @property
    def n_layers(self) -> int:
        """Decoder layers of the checkpoints that this preset is for."""
        return self.match.n_layers


@dataclass(frozen=True)
class Style:
    """A named set of options of selection, as `--set` would give them."""

    name: str
    about: str
    options: Mapping[str, str]


def resolve_model(name: str) -> str:
    """The hub id (or "tiny") behind an alias; anything else is returned as it is. Raises UsageError for an
    empty name, which would be the current folder."""
    if not name.strip():
        raise UsageError("the model's name is empty", hint="for example omni-7b, a folder or a hub id")
    return ALIASES.get(name, name)


def preset_names() -> tuple[str, ...]:
    """Names that `--preset` accepts besides a file, model presets and styles."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_preset(name_or_path: str | Path) -> Preset:
    """The model preset of that name, alias, checkpoint or file. Raises UsageError naming file and key."""
    loaded = load_any(name_or_path)
    if isinstance(loaded, Style):
        models = ", ".join(preset.name for preset in model_presets())
        raise UsageError(
            f"{name_or_path!r} sets options only; it is no model's preset", hint=f"models: {models}"
        )
    return loaded


def load_style(name_or_path: str | Path) -> Style:
    """The style of that name or file ("default", "paper")."""
    loaded = load_any(name_or_path)
    if isinstance(loaded, Preset):
        raise UsageError(f"{name_or_path!r} is a model's preset, not a style", hint="styles: default, paper")
    return loaded


def load_any(name_or_path: str | Path) -> Preset | Style:
    """What `--preset` names: a file if it looks like one, else a preset of this package."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return _read(Path(text))
    wanted = _key(text)
    if (FOLDER / f"{wanted}.yaml").is_file():
        return _read_shipped(wanted)
    checkpoint = resolve_model(text).lower()
    for preset in model_presets():
        if preset.checkpoint.lower() == checkpoint:
            return preset
    raise UsageError(
        f"no preset {text!r}", hint=f"accepted: a YAML file, or one of {', '.join(preset_names())}"
    )


@cache
def model_presets() -> tuple[Preset, ...]:
    """The model presets of this package."""
    loaded = (_read_shipped(name) for name in preset_names())
    return tuple(preset for preset in loaded if isinstance(preset, Preset))


def match_preset(model_type: str, n_layers: int, hidden_size: int) -> Preset:
    """The preset for a checkpoint with this config, or one by rule from its depth (status "by rule")."""
    for preset in model_presets():
        match = preset.match
        if model_type in match.model_types and (n_layers, hidden_size) == (match.n_layers, match.hidden_size):
            return preset
    return preset_by_rule(model_type, n_layers, hidden_size)


def preset_by_rule(model_type: str, n_layers: int, hidden_size: int) -> Preset:
    """A preset for a checkpoint that has none: schedule from its depth, the rest from its family's."""
    family = "qwen3_omni_30b_a3b" if model_type.startswith("qwen3") else "qwen2_5_omni_7b"
    relative = load_preset(family)
    return Preset(
        name=f"by rule for {n_layers} layers",
        status="by rule",
        checkpoint="",
        match=Match((model_type,), n_layers, hidden_size),
        schedule=schedule_by_rule(n_layers, relative.schedule),
        windows=relative.windows,
        published_windows=relative.published_windows,
        ratio_table=relative.ratio_table,
        caps=relative.caps,
        options={},
        geometry={},
        provenance={
            "schedule": "by the 50%/80% rule, not published",
            "the rest": f"as preset {relative.name}",
        },
    )


def schedule_by_rule(n_layers: int, like: Schedule) -> Schedule:
    """Drop layers at 56, 64 and 72% of the depth, late layers from 84% on; lambda and tau as in `like`.

    The paper's rule is words: never prune the first half, prune to about 80%, then only text. These four
    fractions are evenly spaced and give both published schedules (28 and 48 layers) exactly. Shallow networks
    get as many drop layers as fit before the late ones, and a lambda that lets enough in to reach the ratio.
    Source: docs/method.md, "Which layers".
    """
    late = round(0.84 * n_layers)
    late_layer = late if late >= 2 else None
    last_useful = (late_layer or n_layers + 1) - 2
    drops = sorted({round(fraction * n_layers) for fraction in (0.56, 0.64, 0.72)})
    drop_layers = tuple(layer for layer in drops if 1 <= layer <= last_useful)
    # tokens live through late - 1 of the layers only, so they must enter at this multiple of their mean or
    # more
    least_scale = ceil(100 * n_layers / (late_layer - 1)) / 100 if late_layer else 1.0
    return Schedule(drop_layers, late_layer, max(like.entry_scale, least_scale), like.tau)


def _key(name: str) -> str:
    return name.lower().replace(".", "_").replace("-", "_")


@cache
def _read_shipped(name: str) -> Preset | Style:
    return _read(FOLDER / f"{name}.yaml")


def _read(path: Path) -> Preset | Style:
    """A preset's file, read again only when it has changed: a sweep asks for it at every question."""
    try:
        state = path.stat()
    except OSError:
        return _read_file(path)
    return _read_version(path, path.absolute(), state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=64)
def _read_version(path: Path, *_: object) -> Preset | Style:
    return _read_file(path)


def _read_file(path: Path) -> Preset | Style:
    file = read_yaml(path)
    if file.text("kind", "model") == "style":
        file.expect_only(("kind", "name", "about", "options"))
        return Style(file.text("name"), file.text("about", ""), _options(file))
    if file.text("kind", "model") != "model":
        raise file.wrong("kind", "'model' or 'style'")
    return _read_model(file)


def _read_model(file: Section) -> Preset:
    file.expect_only(
        (
            "kind",
            "name",
            "status",
            "checkpoint",
            "match",
            "schedule",
            "stage_one",
            "ratio_table",
            "calibrated",
            "tokens",
            "options",
            "geometry",
            "provenance",
        )
    )
    status = file.text("status")
    if status not in get_args(Status):
        raise file.wrong("status", f"one of {', '.join(get_args(Status))}")
    match = file.section("match")
    match.expect_only(("model_types", "layers", "hidden_size"))
    n_layers = match.whole("layers", "from 1 up", lambda value: value >= 1)
    windows, published_windows = _windows(file.section("stage_one"))
    return Preset(
        name=file.text("name"),
        status=status,  # type: ignore[arg-type]  # checked against Status just above
        checkpoint=file.text("checkpoint", ""),
        match=Match(match.texts("model_types"), n_layers, match.whole("hidden_size", "from 1 up", _positive)),
        schedule=_schedule(file.section("schedule"), n_layers),
        windows=windows,
        published_windows=published_windows,
        ratio_table=_ratio_table(file),
        calibrated=_calibrated(file, n_layers),
        caps=_caps(file.section("tokens")),
        options=_options(file),
        geometry={
            key: file.section("geometry").section(key).values for key in file.section("geometry").values
        },
        provenance={key: str(value) for key, value in file.section("provenance").values.items()},
    )


def _windows(section: Section) -> tuple[StageOneWindows, StageOneWindows | None]:
    """The windows, and the published ones where the file states others."""
    audio = ("audio_tokens", "audio_saliency_positions")

    def sizes(where: Section, keys: Sequence[str]) -> Iterator[int]:
        return (where.whole(key, "from 1 up", lambda value: value >= 1) for key in keys)

    section.expect_only(("video_grids", *audio, "published"))
    windows = StageOneWindows(*sizes(section, ("video_grids", *audio)))
    if "published" not in section.values:
        return windows, None
    published = section.section("published")
    published.expect_only(audio)
    return windows, StageOneWindows(windows.video_grids, *sizes(published, audio))


def _positive(value: float) -> bool:
    return isfinite(value) and value > 0


def _schedule(section: Section, n_layers: int) -> Schedule:
    section.expect_only(("drop_layers", "late_layer", "entry_scale", "tau"))
    drop_layers = section.wholes("drop_layers")
    if any(not 1 <= layer < n_layers for layer in drop_layers) or list(drop_layers) != sorted(
        set(drop_layers)
    ):
        raise section.wrong("drop_layers", f"ascending layers from 1 to {n_layers - 1}")
    late_layer = _late_layer(section, n_layers)
    return Schedule(
        drop_layers,
        late_layer,
        section.number("entry_scale", "from 1 up", lambda value: isfinite(value) and value >= 1),
        section.number("tau", "above 0", _positive),
    )


def _late_layer(section: Section, n_layers: int) -> int | None:
    if "late_layer" not in section.values:
        raise section.wrong("late_layer", f"a whole number from 2 to {n_layers}, or null")
    if section.values["late_layer"] is None:
        return None
    return section.whole("late_layer", f"from 2 to {n_layers}", lambda value: 2 <= value <= n_layers)


def _ratio_table(file: Section) -> tuple[RatioPair, ...]:
    rows = []
    for row in file.sections("ratio_table"):
        row.expect_only(("ratio", "video", "audio"))
        rows.append(RatioPair(*_fractions(row, ("ratio", "video", "audio"))))
    if not rows:
        raise UsageError(f"{file.at('ratio_table')}: expected at least one row")
    return tuple(_ascending(file.at("ratio_table"), rows))


def _calibrated(file: Section, n_layers: int) -> tuple[CalibratedRow, ...]:
    rows = []
    for row in file.sections("calibrated") if "calibrated" in file.values else ():
        row.expect_only(("ratio", "video", "audio", "late_layer", "drops"))
        late_layer = _late_layer(row, n_layers)
        last, drops = (late_layer or n_layers + 1) - 2, []
        for drop in row.sections("drops"):
            drop.expect_only(("after", "video", "audio"))
            after = drop.whole("after", f"from 1 to {last}", range(1, last + 1).__contains__)
            video, audio = (
                drop.number(key, "from 0 to 1", lambda value: 0 <= value <= 1) for key in ("video", "audio")
            )
            drops.append(CalibratedDrop(after, video, audio))
        layers = [drop.after_layer for drop in drops]
        if layers != sorted(set(layers)):
            raise row.wrong("drops", "each layer once, ascending")
        ratio, video, audio = _fractions(row, ("ratio", "video", "audio"))
        rows.append(CalibratedRow(ratio, video, audio, late_layer, tuple(drops)))
    return tuple(_ascending(file.at("calibrated"), rows))


def _fractions(row: Section, keys: Sequence[str]) -> Iterator[float]:
    return (row.number(key, "above 0 and at most 1", lambda value: 0 < value <= 1) for key in keys)


def _ascending(where: str, rows: list[AnyRow]) -> list[AnyRow]:
    rows.sort(key=lambda row: row.ratio)
    ratios = [row.ratio for row in rows]
    if len(set(ratios)) < len(ratios):
        raise UsageError(f"{where}: expected every ratio once, got {ratios}")
    return rows


def _caps(section: Section) -> TokenCaps:
    section.expect_only(("min_per_grid", "max_per_grid", "total"))
    least = section.whole("min_per_grid", "from 1 up", _positive)
    most = section.whole("max_per_grid", f"from min_per_grid ({least}) up", lambda value: value >= least)
    return TokenCaps(least, most, section.whole("total", f"from {most} up", lambda value: value >= most))


def _options(file: Section) -> dict[str, str]:
    """Options as text, which the selection room parses and checks just as it does `--set`."""
    values = file.section("options").values
    return {key: _as_setting(value) for key, value in values.items()}


def _as_setting(value: object) -> str:
    # YAML 1.1 reads a bare `on` or `off` as a truth value
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
