"""What a sweep compares: methods x ratios x variants, each different setting once.

No torch here, so that the command line can refuse what was typed before anything heavy is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from seats_cli.errors import UsageError
from seats_cli.presets import Preset, Style, load_any
from seats_cli.selection.options import parse_settings

FULL = "full"
PRESET = "preset"  # the one key of --vary that is no setting
SCHEDULE, ENTRY_SCALE, AUDIO_WINDOWS = "schedule", "entry_scale", "audio_windows"

# The settings that a method's choice depends on; one that is not listed is taken to depend on all of them.
# The schedule also says how the kinds share a ratio, and that holds for all methods alike.
READS: Mapping[str, frozenset[str]] = {
    FULL: frozenset(),
    "fixed": frozenset({SCHEDULE, AUDIO_WINDOWS, "merge"}),
    **dict.fromkeys(("fastv", "fastv-om"), frozenset({SCHEDULE, AUDIO_WINDOWS, "decode_cache"})),
    **dict.fromkeys(
        ("random", "visionzip", "visionzip-om", "divprune", "divprune-om", "dycoke", "omnizip"),
        frozenset({SCHEDULE, AUDIO_WINDOWS}),
    ),
}


@dataclass(frozen=True)
class Setting:
    """One row of the table: how tokens are chosen for every question of the sweep.

    preset, settings: as asked, without what says nothing to this method; settings are sorted pairs
    """

    method: str
    ratio: float
    preset: str | None = None
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """In a few words, for messages: "seats at 0.1, merge=on"."""
        extras = [f"preset={self.preset}"] if self.preset else []
        extras += [f"{key}={value}" for key, value in self.settings]
        return ", ".join([f"{self.method} at {self.ratio:g}", *extras])

    def value(self, key: str) -> str | None:
        """What this setting has for a key of --vary; None where the key says nothing to its method."""
        return self.preset if key == PRESET else dict(self.settings).get(key)


def expand(
    methods: Sequence[str],
    ratios: Sequence[float],
    *,
    preset: str | None = None,
    settings: Mapping[str, str] | None = None,
    vary: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Setting, ...]:
    """`full` first, then ratio by ratio every method in each variant that makes a difference to it.

    vary: key -> values; every combination is a variant. A ratio of 1 keeps everything and is `full`. Raises
    UsageError for an unknown preset, setting or value, a key that is both fixed and varied, or presets that
    give clips different numbers of tokens.
    """
    fixed, vary = dict(settings or {}), dict(vary or {})
    twice = [key for key in vary if key in fixed or (key == PRESET and preset is not None)]
    if twice:
        raise UsageError(
            f"{twice[0]} is both fixed and varied", hint=f"leave it to --vary {twice[0]}=... alone"
        )
    if preset is not None:
        load_any(preset)
    parse_settings(fixed)
    for key, values in vary.items():
        for value in values:
            if key == PRESET:
                load_any(value)
            else:
                parse_settings({key: value})
    _refuse_other_caps(vary.get(PRESET, ()))
    found = {told(FULL, 1.0, preset, {})}
    rows = list(found)
    for ratio, method in product(ratios, methods):
        for values in product(*vary.values()):
            varied = dict(zip(vary, values, strict=True))
            chosen = varied.pop(PRESET, preset)
            row = told(method, ratio, chosen, {**fixed, **varied})
            if ratio < 1 and method != FULL and row not in found:
                found.add(row)
                rows.append(row)
    return tuple(rows)


def other_caps(preset: str) -> UsageError:
    """What is wrong with a preset whose caps are not those of the sweep's other rows."""
    return UsageError(
        f"preset {preset} has other token caps: its rows would not start from the same tokens as the others, "
        "and % of full would mean nothing",
        hint=f"run it apart, with full tokens of its own: --preset {preset}",
    )


def _refuse_other_caps(presets: Sequence[str]) -> None:
    models = [(name, loaded) for name in presets if isinstance(loaded := load_any(name), Preset)]
    for name, loaded in models[1:]:
        if loaded.caps != models[0][1].caps:
            raise other_caps(name)


def told(method: str, ratio: float, preset: str | None, settings: Mapping[str, str]) -> Setting:
    """The setting without what says nothing to its method. A model's preset says something to every method:
    it has windows, ratios of the kinds and caps; a style has only options."""
    read = READS.get(method)
    if read is not None and SCHEDULE in read and ENTRY_SCALE in settings:
        settings = {**settings, SCHEDULE: _schedule_of(preset, settings)}
    kept = {key: value for key, value in settings.items() if read is None or key in read}
    if preset is not None and read is not None:
        loaded = load_any(preset)
        if isinstance(loaded, Style) and not set(loaded.options) & read:
            preset = None
    return Setting(method, ratio, preset, tuple(sorted(kept.items())))


def _schedule_of(preset: str | None, settings: Mapping[str, str]) -> str:
    """The schedule that an entry scale comes to: the paper's, unless the settings or else the preset name one
    other than "auto". A method without an entry scale follows, so that all share a ratio alike."""
    of_preset = {} if preset is None else load_any(preset).options
    named = settings.get(SCHEDULE, of_preset.get(SCHEDULE, "auto"))
    return "paper" if named == "auto" else named
