"""What is written is what is read."""

from dataclasses import replace
from pathlib import Path

import pytest

from seats_cli.errors import UsageError
from seats_cli.presets import CalibratedDrop, CalibratedRow, load_preset, model_presets
from seats_cli.presets.writing import write_preset

ROWS = (
    CalibratedRow(0.05, 0.0467, 0.0584, 9, ()),
    CalibratedRow(0.25, 0.2, 0.38, None, (CalibratedDrop(3, 0.5, 0.0), CalibratedDrop(6, 0.1, 1.0))),
)


@pytest.mark.parametrize("name", [preset.name for preset in model_presets()])
def test_every_shipped_preset_survives(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    write_preset(preset, tmp_path / "p.yaml")
    assert load_preset(tmp_path / "p.yaml") == preset


def test_calibrated_rows_and_options_survive(tmp_path: Path) -> None:
    preset = replace(
        load_preset("tiny"), calibrated=ROWS, options={"merge": "on", "tau": "0.2"}, status="calibrated"
    )
    write_preset(preset, tmp_path / "p.yaml", heading="Measured.\nTwice.")
    text = (tmp_path / "p.yaml").read_text()
    assert text.startswith("# Measured.\n# Twice.\nkind: model\n")
    assert load_preset(tmp_path / "p.yaml") == preset


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the preset"):
        write_preset(load_preset("tiny"), tmp_path / "no" / "p.yaml")
