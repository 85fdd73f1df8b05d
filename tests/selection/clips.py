"""Presets and clips for the tests of this room."""

from dataclasses import replace

from seats_cli.presets import Preset, Schedule, load_preset
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts

OMNI_7B = load_preset("omni-7b")
DEFAULT = SelectionOptions()
PAPER = SelectionOptions(window_relevance="raw", decode_cache="text", budgets="published")


def clip(n_grids: int = 64, n_audio: int = 1600, tokens_per_grid: int = 144, n_text: int = 60) -> ClipCounts:
    """A clip like the paper's: two grids and 50 audio tokens a window of two seconds."""
    n_video = n_grids * tokens_per_grid
    n_windows = max(-(-n_grids // 2), -(-n_audio // 50))
    return ClipCounts(n_video, n_audio, tokens_per_grid, n_windows, n_text)


def scheduled(preset: Preset = OMNI_7B, **changes: object) -> Preset:
    """The preset with another schedule."""
    return replace(preset, schedule=replace(preset.schedule, **changes))  # type: ignore[arg-type]


def with_layers(n_layers: int, schedule: Schedule) -> Preset:
    """A preset of another depth."""
    return replace(OMNI_7B, match=replace(OMNI_7B.match, n_layers=n_layers), schedule=schedule)
