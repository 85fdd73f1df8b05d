"""A model preset made from a trace: `seats ask --preset FILE` uses it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seats_cli import __version__
from seats_cli.errors import UsageError
from seats_cli.lab.boundaries import Boundaries
from seats_cli.presets import (
    CalibratedRow,
    Match,
    Preset,
    Schedule,
    load_any,
    load_preset,
    match_preset,
    resolve_model,
    writing,
)

TAKEN_OVER = ("stage_one", "ratio_table", "tokens", "geometry")  # of the base's provenance


def base_preset(document: Mapping[str, Any]) -> Preset:
    """The preset that a traced checkpoint ran with: the one asked for if it is a model's, else its match.

    Raises UsageError where a file that was asked for is gone, or not that preset any more.
    """
    model, asked = document["model"], document.get("options", {}).get("preset")
    matching = match_preset(model["model_type"], model["layers"], model["hidden_size"])
    if asked is None:
        return matching
    traced_with = model.get("preset", matching.name)
    try:
        known = load_any(asked)
    except UsageError as error:
        raise UsageError(
            f"the preset that this trace was made with cannot be read: {error}",
            hint=f"put {asked} back, or trace again",
        ) from None
    if isinstance(known, Preset):
        return known
    if traced_with != matching.name:  # a style leaves the checkpoint its match
        raise UsageError(
            f"this trace was made with the model preset {traced_with!r}, and {asked} is none any more",
            hint=f"put {asked} back, or trace again",
        )
    return matching


def traced_preset(
    document: Mapping[str, Any],
    base: Preset,
    schedule: Schedule,
    calibrated: Sequence[CalibratedRow] = (),
    provenance: Mapping[str, str] | None = None,
) -> Preset:
    """A preset for the traced checkpoint: `schedule` and `calibrated` rows are its own, the rest is `base`'s.

    document: the trace. provenance: sentences by group of numbers, by default a trace's own
    (`trace_provenance`); those of what is taken over from `base` are added. A checkpoint that is not `base`'s
    own (fine-tuned, say) gives the preset its name.
    """
    model = document["model"]
    name, family = str(model["name"]), model["model_type"]
    said = dict(trace_provenance(document) if provenance is None else provenance)
    rest = {key: base.provenance[key] for key in TAKEN_OVER if key in base.provenance}
    rest = rest or {"the rest": f"as preset {base.name}"}
    if schedule == base.schedule and "schedule" not in said and "schedule" in base.provenance:
        rest = {"schedule": base.provenance["schedule"], **rest}
    own = bool(base.checkpoint) and resolve_model(name) in (base.checkpoint, base.name)
    return replace(
        base,
        name=base.name if own else Path(name).name or "traced",
        status="calibrated",
        checkpoint=base.checkpoint if own else _hub_id(name),
        match=Match(
            base.match.model_types if family in base.match.model_types else (family,),
            model["layers"],
            model["hidden_size"],
        ),
        schedule=schedule,
        calibrated=tuple(sorted(calibrated, key=lambda row: row.ratio)),
        provenance=said | rest,
    )


def trace_provenance(document: Mapping[str, Any], boundaries: Boundaries | None = None) -> dict[str, str]:
    """Where a traced schedule comes from: the command, its date, model, questions and measure.

    Boundaries that were not found have no schedule, and none is said to be measured.
    """
    environment = document.get("environment", {})
    n_samples, n_clips = document["samples"], document["clips"]
    found = {
        "schedule": f"measured by removing tokens layer by layer ({n_samples} questions, {n_clips} clips)",
        "command": str(document.get("command", "not from a command line")),
        "date": str(document.get("date", "unknown")),
        "model": _model_words(document["model"]["name"], environment),
        "measure": str(document["measure"]),
        "seats": str(environment.get("seats", __version__)),
    }
    if boundaries is not None:
        if not boundaries.found:
            del found["schedule"]
        found["measure"] = f"{boundaries.measure}, tolerance {boundaries.tolerance:g}"
        if boundaries.notes:
            found["notes"] = "; ".join(boundaries.notes)
    return found


def write_traced(path: Path, preset: Preset) -> Preset:
    """Write a preset, and load it as a proof. Raises UsageError where it cannot be written."""
    heading = f"Written by `seats trace`; use it as --preset {path.name}."
    writing.write_preset(preset, path, heading=heading)
    return load_preset(path)


def _hub_id(name: str) -> str:
    """The checkpoint's hub id where the model was named by one; "" for a folder."""
    return name if name.count("/") == 1 and not Path(name).expanduser().exists() else ""


def _model_words(name: str, environment: Mapping[str, Any]) -> str:
    parts = [name]
    if environment.get("revision"):
        parts.append(f"revision {environment['revision']}")
    parts += [str(environment[key]) for key in ("dtype", "device_name") if environment.get(key)]
    return ", ".join(parts)
