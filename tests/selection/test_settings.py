"""What people may set, and what they read when they may not."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seats_cli.errors import PlanError, UsageError
from seats_cli.presets import StageOneWindows, load_style
from seats_cli.selection.options import SelectionOptions, Setup, configure, parse_settings


def setup(preset: str | None = None, **settings: str) -> Setup:
    return configure(preset, settings, model_type="qwen2_5_omni", n_layers=28, hidden_size=3584, seed=5)


def test_all_settings() -> None:
    texts = {
        "schedule": "calibrated",
        "window_relevance": "raw",
        "merge": "on",
        "decode_cache": "text",
        "budgets": "published",
        "tau": "0.3",
        "entry_scale": "1.75",
        "audio_windows": "published",
    }
    found = replace(SelectionOptions(), **parse_settings(texts))
    assert found == SelectionOptions(
        "calibrated", "raw", True, "text", "published", 0.3, 1.75, 0, "published"
    )


@pytest.mark.parametrize(
    ("key", "text", "hint"),
    [
        ("schedule", "best", "auto, paper, calibrated"),
        ("window_relevance", "flat", "raw, normalised"),
        ("merge", "yes", "on, off"),
        ("decode_cache", "Text", "text, layerwise"),
        ("budgets", "", "exact, published"),
        ("audio_windows", "long", "seconds, published"),
        ("tau", "0", "a number from 0.0001 up"),
        ("tau", "warm", "a number"),
        ("tau", "inf", "a number"),
        ("entry_scale", "0.5", "a number from 1 up"),
        ("entry_scale", "nan", "a number"),
    ],
)
def test_values_that_are_not_accepted(key: str, text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{key}={text}") as caught:
        parse_settings({key: text})
    assert hint in (caught.value.hint or "")


def test_an_unknown_key_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unknown setting 'taw'") as caught:
        parse_settings({"taw": "1"})
    assert caught.value.hint == (
        "accepted: schedule=auto|paper|calibrated, window_relevance=raw|normalised, merge=on|off, "
        "decode_cache=text|layerwise, budgets=exact|published, audio_windows=seconds|published, "
        "tau=NUMBER from 0.0001 up, entry_scale=NUMBER from 1 up"
    )


def test_the_default_style_is_the_default_options() -> None:
    assert replace(SelectionOptions(), **parse_settings(load_style("default").options)) == SelectionOptions()


def test_the_paper_style_is_as_published() -> None:
    found = setup("paper").options
    assert found == SelectionOptions(
        "paper", "raw", False, "text", "published", tau=0.1, entry_scale=1.4, seed=5,
        audio_windows="published",
    )  # fmt: skip


def test_published_audio_windows_are_the_preset_s() -> None:
    def windows(preset: str | None) -> StageOneWindows:
        made = configure(preset, {}, model_type="qwen3_omni_moe", n_layers=48, hidden_size=2048)
        return made.preset.windows

    assert windows(None) == StageOneWindows(2, 26, 26)  # 2 s of 13 tokens a second
    assert windows("paper") == StageOneWindows(2, 50, 52)
    assert setup("paper").preset.windows == setup().preset.windows == StageOneWindows(2, 50, 100)


def test_settings_go_over_the_style() -> None:
    found = setup("paper", budgets="exact", tau="0.2").options
    assert (found.budgets, found.tau, found.decode_cache) == ("exact", 0.2, "text")


def test_the_schedule_brings_its_own_temperature() -> None:
    found = configure(None, {}, model_type="qwen3_omni_moe", n_layers=48, hidden_size=2048)
    assert found.preset.name == "qwen3-omni-30b-a3b"
    assert found.options.tau == 0.3


def test_a_checkpoint_without_preset_is_told_so() -> None:
    found = configure(None, {}, model_type="qwen2_5_omni", n_layers=20, hidden_size=64)
    assert found.preset.status == "by rule"
    assert any("by rule, not published" in note for note in found.notes)
    assert not any("by rule" in note for note in setup().notes)


def test_a_preset_of_another_depth_is_refused() -> None:
    with pytest.raises(PlanError, match="made for 36 layers; this checkpoint has 28"):
        setup("omni-3b")


def test_a_preset_file_may_set_options(tmp_path: Path) -> None:
    from seats_cli.presets import FOLDER

    text = (FOLDER / "qwen2_5_omni_7b.yaml").read_text() + "\noptions: {merge: on, tau: 0.02}\n"
    (tmp_path / "mine.yaml").write_text(text)
    found = setup(str(tmp_path / "mine.yaml"), tau="0.5")
    assert found.options.merge
    assert found.options.tau == 0.5


def test_planning_imports_no_torch() -> None:
    code = "import sys, seats_cli.selection.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
