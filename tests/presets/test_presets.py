"""Presets: what ships is complete and as published, and a broken file is told where."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seats_cli.errors import UsageError
from seats_cli.presets import (
    ALIASES,
    FOLDER,
    Preset,
    RatioPair,
    Schedule,
    Style,
    load_any,
    load_preset,
    load_style,
    match_preset,
    model_presets,
    preset_names,
    resolve_model,
    schedule_by_rule,
)


def test_the_published_numbers() -> None:
    small, large = load_preset("omni-7b"), load_preset("omni-30b")
    assert small.schedule == Schedule((16, 18, 20), 24, 1.4, 0.1)
    assert large.schedule == Schedule((27, 31, 35), 40, 1.4, 0.3)
    pairs = [(0.10, 0.06, 0.35), (0.15, 0.10, 0.45), (0.25, 0.20, 0.55), (0.35, 0.30, 0.65)]
    assert small.ratio_table == tuple(RatioPair(*pair) for pair in pairs)
    pairs = [(0.10, 0.07, 0.45), (0.15, 0.12, 0.50), (0.25, 0.22, 0.60), (0.35, 0.32, 0.70)]
    assert large.ratio_table == tuple(RatioPair(*pair) for pair in pairs)
    assert small.status == large.status == "published"
    assert (small.caps.min_per_grid, small.caps.max_per_grid, small.caps.total) == (128, 144, 24576)


@pytest.mark.parametrize("preset", model_presets(), ids=lambda preset: preset.name)
def test_every_model_preset_says_where_its_numbers_are_from(preset: Preset) -> None:
    assert {"schedule", "stage_one", "ratio_table", "tokens"} <= set(preset.provenance)
    published = preset.provenance["schedule"].startswith("published")
    assert published == (preset.status == "published")
    if preset.status == "by rule":
        assert "by the 50%/80% rule" in preset.provenance["schedule"]


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_find_their_preset(alias: str) -> None:
    assert load_preset(alias).checkpoint == resolve_model(alias)


def test_other_names_are_left_alone() -> None:
    assert resolve_model("/some/where") == "/some/where"
    assert resolve_model("Qwen/Qwen2.5-Omni-7B") == "Qwen/Qwen2.5-Omni-7B"


@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-omni-7b",
        "qwen2_5_omni_7b",
        "omni-7b",
        "Qwen/Qwen2.5-Omni-7B",
        str(FOLDER / "qwen2_5_omni_7b.yaml"),
    ],
)
def test_names_of_one_preset(name: str) -> None:
    assert load_preset(name).name == "qwen2.5-omni-7b"


@pytest.mark.parametrize("preset", model_presets(), ids=lambda preset: preset.name)
def test_a_config_finds_its_preset(preset: Preset) -> None:
    for model_type in preset.match.model_types:
        assert match_preset(model_type, preset.match.n_layers, preset.match.hidden_size) is preset


def test_a_config_without_preset_gets_the_rule() -> None:
    made = match_preset("qwen2_5_omni_thinker", 40, 1000)
    assert made.status == "by rule"
    assert made.n_layers == 40
    assert made.schedule == Schedule((22, 26, 29), 34, 1.4, 0.1)
    assert "not published" in made.provenance["schedule"]
    assert match_preset("qwen3_omni_moe", 20, 64).schedule.tau == 0.3


@pytest.mark.parametrize("preset", model_presets(), ids=lambda preset: preset.name)
def test_the_rule_gives_the_shipped_schedules(preset: Preset) -> None:
    assert schedule_by_rule(preset.n_layers, preset.schedule) == preset.schedule


@pytest.mark.parametrize("n_layers", range(1, 100))
def test_the_rule_leaves_the_first_half_alone(n_layers: int) -> None:
    made = schedule_by_rule(n_layers, Schedule((), None, 1.4, 0.1))
    assert all(n_layers / 2 <= layer < n_layers for layer in made.drop_layers)
    if made.late_layer is not None:
        assert made.late_layer <= n_layers
        assert all(layer < made.late_layer - 1 for layer in made.drop_layers)
        assert made.entry_scale * (made.late_layer - 1) / n_layers >= 1


def test_styles() -> None:
    assert load_style("paper").options["budgets"] == "published"
    assert load_style("default").options["merge"] == "on"
    assert isinstance(load_any("paper"), Style)
    with pytest.raises(UsageError, match="no model's preset"):
        load_preset("paper")
    with pytest.raises(UsageError, match="not a style"):
        load_style("tiny")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UsageError, match="no preset 'omni-9b'") as caught:
        load_preset("omni-9b")
    for name in preset_names():
        assert name in (caught.value.hint or "")


def test_reading_presets_imports_no_torch() -> None:
    code = "import sys, seats_cli.presets as p; p.model_presets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def broken(tmp_path: Path, **changes: object) -> Path:
    """The 7B preset's file with values changed, keys as `section__key`; None takes the key away."""
    values = yaml.safe_load((FOLDER / "qwen2_5_omni_7b.yaml").read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = values
        for section in sections:
            place = place[section]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule__late_layer": 29}, "schedule.late_layer: expected a whole number from 2 to 28, got 29"),
        (
            {"schedule__late_layer": None},
            "schedule.late_layer: expected a whole number from 2 to 28, or null",
        ),
        ({"schedule__drop_layers": [18, 16]}, "schedule.drop_layers: expected ascending layers from 1 to 27"),
        ({"schedule__drop_layers": [16, 28]}, "schedule.drop_layers"),
        ({"schedule__drop_layers": "16"}, "schedule.drop_layers: expected a list of whole numbers, got '16'"),
        ({"schedule__tau": 0}, "schedule.tau: expected a number above 0, got 0"),
        ({"schedule__entry_scale": 0.5}, "schedule.entry_scale: expected a number from 1 up"),
        ({"schedule__entry_scale": True}, "schedule.entry_scale"),
        ({"schedule__lambda": 1.4}, "schedule: unknown key 'lambda'"),
        ({"ratio_table": []}, "ratio_table: expected at least one row"),
        (
            {"ratio_table": [{"ratio": 0.1, "video": 2, "audio": 1}]},
            r"ratio_table\[0\].video: expected a number",
        ),
        ({"ratio_table": [{"ratio": 0.1, "video": 0.1}]}, r"ratio_table\[0\].audio: missing"),
        ({"match": None}, "match.layers: missing"),
        ({"match__layers": "28"}, "match.layers: expected a whole number from 1 up, got '28'"),
        ({"match": 3}, "match: expected a mapping, got 3"),
        ({"stage_one__video_grids": 0}, "stage_one.video_grids"),
        ({"tokens__max_per_grid": 64}, "tokens.max_per_grid: expected a whole number from min_per_grid"),
        ({"status": "measured"}, "status: expected one of published, by rule, calibrated"),
        ({"name": None}, "name: missing; expected a string"),
        ({"kind": "plan"}, "kind: expected 'model' or 'style'"),
        ({"late": 3}, "unknown key 'late'"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = broken(tmp_path, **changes)
    with pytest.raises(UsageError, match=message) as caught:
        load_preset(path)
    assert str(path) in caught.value.message


def test_an_unchanged_copy_is_no_error(tmp_path: Path) -> None:
    assert load_preset(broken(tmp_path)) == load_preset("omni-7b")


def test_a_null_late_layer_is_none(tmp_path: Path) -> None:
    path = broken(tmp_path)
    path.write_text(path.read_text().replace("late_layer: 24", "late_layer: null"))
    assert load_preset(path).schedule.late_layer is None


def test_files_that_are_no_presets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no preset file"):
        load_preset(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="expected a mapping"):
        load_preset(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(UsageError, match="is not YAML"):
        load_preset(tmp_path / "bad.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read the preset"):
        load_preset(tmp_path / "bytes.yaml")
