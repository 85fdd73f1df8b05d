"""A preset as a file: what `load_preset` reads back as the same preset."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from seats_cli.errors import UsageError
from seats_cli.presets import CalibratedRow, Preset


def write_preset(preset: Preset, path: Path, *, heading: str = "") -> None:
    """Write the YAML of a model preset. `heading`: lines of comment above it. Raises UsageError."""
    text = "".join(f"# {line}\n" for line in heading.splitlines())
    text += yaml.dump(preset_document(preset), Dumper=_Short, sort_keys=False, width=110, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the preset {path}: {error.strerror}") from None


def preset_document(preset: Preset) -> dict[str, Any]:
    """The mapping of a preset file: plain values under the keys that presets/__init__.py reads."""
    schedule, windows = asdict(preset.schedule), asdict(preset.windows)
    if preset.published_windows is not None:
        published = asdict(preset.published_windows)
        windows["published"] = {key: published[key] for key in published if key.startswith("audio_")}
    document: dict[str, Any] = {
        "kind": "model",
        "name": preset.name,
        "status": preset.status,
        "checkpoint": preset.checkpoint,
        "match": {
            "model_types": list(preset.match.model_types),
            "layers": preset.match.n_layers,
            "hidden_size": preset.match.hidden_size,
        },
        "schedule": {**schedule, "drop_layers": list(schedule["drop_layers"])},
        "stage_one": windows,
        "ratio_table": [asdict(row) for row in preset.ratio_table],
    }
    if preset.calibrated:
        document["calibrated"] = [_calibrated(row) for row in preset.calibrated]
    document["tokens"] = asdict(preset.caps)
    for key, values in (("options", preset.options), ("geometry", preset.geometry)):
        if values:
            document[key] = _plain(values)
    document["provenance"] = dict(preset.provenance)
    return document


def _calibrated(row: CalibratedRow) -> dict[str, Any]:
    drops = [{"after": drop.after_layer, "video": drop.video, "audio": drop.audio} for drop in row.drops]
    return {
        "ratio": row.ratio,
        "video": row.video,
        "audio": row.audio,
        "late_layer": row.late_layer,
        "drops": drops,
    }


def _plain(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values


class _Short(yaml.SafeDumper):
    """Block style outside, one line for whatever holds no mapping of its own: the shipped presets' look."""


def _represent(dumper: _Short, values: dict[str, Any]) -> yaml.Node:
    flat = all(not isinstance(value, dict) for value in values.values())
    few = len(values) <= 6 and sum(len(str(value)) for value in values.values()) < 80
    return dumper.represent_mapping("tag:yaml.org,2002:map", values, flow_style=flat and few)


_Short.add_representer(dict, _represent)
