"""What a method may be told: the options of selection, their defaults and how `--set key=value` is read.

No torch here, so that the command line can check a setting before anything heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, get_args

from seats_cli.errors import PlanError, UsageError
from seats_cli.presets import Preset, Style, load_any, load_style, match_preset

WindowRelevance = Literal["raw", "normalised"]
DecodeCache = Literal["text", "layerwise"]
Budgets = Literal["exact", "published"]
AudioWindows = Literal["seconds", "published"]
ScheduleSource = Literal["auto", "paper", "calibrated"]


@dataclass(frozen=True)
class SelectionOptions:
    """Every choice of the method that a user can make (docs/method.md, "Published choices and ours").

    schedule:     where in the network tokens leave, and how the kinds share the ratio: "calibrated" is the
        preset's best measured plan at the ratio, "paper" its drop layers with the published decay, "auto" the
        calibrated one where the preset has it.
    window_relevance: "raw" puts the windows' mean attention through the softmax as it is (published);
        "normalised" first makes it a share of all windows' attention: the budget follows the question.
    merge:        average each token dropped by stage I into the kept token most similar to it.
    decode_cache: "text" clears every layer's cache of what was dropped later (published); "layerwise" leaves
        each layer the keys and values of the tokens that it processed.
    budgets:      "exact" meets the total to the token; "published" may overshoot it through its floors.
    tau:          temperature of the softmax over windows, > 0.
    entry_scale:  how many times its mean retention a kind enters the LLM with (the paper's lambda), >= 1;
        of the paper's schedule only.
    seed:         of the methods that draw at random.
    audio_windows: stage I's windows of sound: "seconds" makes them 2 s long in every family; "published"
        takes the paper's 50 tokens also where these are 4 s (Qwen3-Omni).
    """

    schedule: ScheduleSource = "auto"
    window_relevance: WindowRelevance = "normalised"
    merge: bool = True
    decode_cache: DecodeCache = "layerwise"
    budgets: Budgets = "exact"
    tau: float = 0.1
    entry_scale: float = 1.4
    seed: int = 0
    audio_windows: AudioWindows = "seconds"


@dataclass(frozen=True)
class Setup:
    """What a run selects with: the preset and options that `configure` settled on, and why."""

    preset: Preset
    options: SelectionOptions
    notes: tuple[str, ...]


def parse_settings(settings: Mapping[str, str]) -> dict[str, Any]:
    """`--set key=value` pairs as values for `dataclasses.replace(SelectionOptions(), **values)`.

    Raises UsageError for an unknown key or a value that is not accepted, listing what is.
    """
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key in _WORDS:
            values[key] = _parse_word(key, text)
        elif key in _NUMBERS:
            values[key] = _parse_number(key, text)
        else:
            raise UsageError(f"unknown setting {key!r}", hint=f"accepted: {accepted_settings()}")
    return values


def accepted_settings() -> str:
    """Every key of `--set` with the values it takes, for messages and help."""
    words = [f"{key}={'|'.join(accepted)}" for key, accepted in _WORDS.items()]
    return ", ".join([*words, *(f"{key}=NUMBER {accepted}" for key, (accepted, _) in _NUMBERS.items())])


def configure(
    preset: str | None,
    settings: Mapping[str, str],
    *,
    model_type: str,
    n_layers: int,
    hidden_size: int,
    seed: int = 0,
) -> Setup:
    """The preset and options of one run, from `--preset`, `--set` and the checkpoint's config.

    preset: None, a style ("default", "paper"), a model preset's name, or a YAML file of either kind. Options
    are the defaults, then the style's, then the model preset's, then `settings`. Raises UsageError for
    unknown names and settings, PlanError for a preset made for another depth.
    """
    chosen = load_any(preset) if preset is not None else load_style("default")
    if isinstance(chosen, Style):
        style, model = chosen, match_preset(model_type, n_layers, hidden_size)
        why = f"matches {model_type} with {n_layers} layers of width {hidden_size}"
    else:
        style, model = load_style("default"), chosen
        why = "asked for"
    if model.n_layers != n_layers:
        raise PlanError(
            f"preset {model.name} is made for {model.n_layers} layers; this checkpoint has {n_layers}",
            hint="leave --preset out, or give a preset whose match.layers is this checkpoint's",
        )
    scheduled = SelectionOptions(tau=model.schedule.tau, entry_scale=model.schedule.entry_scale, seed=seed)
    merged = {**style.options, **model.options, **settings}
    notes = [f"preset {model.name}: {why}", f"options: {style.name}"]
    options = replace(scheduled, **parse_settings(merged))
    if options.schedule == "calibrated" and not model.calibrated:
        raise PlanError(
            f"preset {model.name} has no calibrated schedule",
            hint="use --schedule paper, or make one: seats trace, then seats calibrate (docs/guide.md)",
        )
    if options.schedule == "auto":
        source: ScheduleSource = "calibrated" if model.calibrated else "paper"
        if "entry_scale" in settings and source == "calibrated":
            source = "paper"
            notes.append("schedule paper: entry_scale is an option of it")
        options = replace(options, schedule=source)
    if options.audio_windows == "published" and model.published_windows is not None:
        model = replace(model, windows=model.published_windows)
    if options.schedule == "paper" and model.status == "by rule":
        notes.append(f"the schedule of {model.name} is by rule, not published")
    return Setup(model, options, tuple(notes))


_WORDS: Mapping[str, tuple[str, ...]] = {
    "schedule": get_args(ScheduleSource),
    "window_relevance": get_args(WindowRelevance),
    "merge": ("on", "off"),
    "decode_cache": get_args(DecodeCache),
    "budgets": get_args(Budgets),
    "audio_windows": get_args(AudioWindows),
}
_NUMBERS: Mapping[str, tuple[str, float]] = {  # what is accepted, and the bound below which it is not
    "tau": ("from 0.0001 up", 0.0001),
    "entry_scale": ("from 1 up", 1.0),
}


def _parse_word(key: str, text: str) -> str | bool:
    if text not in _WORDS[key]:
        raise UsageError(f"{key}={text}: not accepted", hint=f"{key} is one of {', '.join(_WORDS[key])}")
    return text == "on" if key == "merge" else text


def _parse_number(key: str, text: str) -> float:
    accepted, least = _NUMBERS[key]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and value >= least):
        raise UsageError(f"{key}={text}: not accepted", hint=f"{key} is a number {accepted}")
    return value
