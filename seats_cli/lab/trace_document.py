"""The document of a trace: from the records of questions to curves, and a saved one read again.

agreement      the share of questions whose greedy answer is, to the token, the one with all tokens
log_likelihood the mean over questions of the mean natural logarithm of that answer's token probabilities
probability    the mean over questions of the probability of that answer, its end included
accuracy       the mean over families of the share right, as `seats eval` has it; null unless every question
               has an answer to compare with
low, high      95% interval, bootstrap over clips, of the measure: accuracy where there is one, else agreement
full           in a row of a curve: the same with all tokens, over the same questions, without an interval
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from seats_cli.errors import UsageError
from seats_cli.lab.records import Record
from seats_cli.lab.results import Estimate, estimate, shares
from seats_cli.lab.tracing import CURVES, KINDS

SCHEMA_VERSION = 1
PLACES = {
    "removal": ("kind", "layer"),
    "choice": ("kind", "after_layer", "keep"),
    "entry": ("kind", "entry"),
}
LIKELIHOODS = ("log_likelihood", "probability")
NEEDED = ("n_layers", "measure", "model", "full", "counts", *CURVES)

Document = dict[str, Any]


def measure_of(records: Sequence[Record]) -> str:
    """What a trace of these questions is read by: "accuracy" if all have answers, else "agreement"."""
    return "accuracy" if all(record["expected"] for record in records) else "agreement"


def curves_of_records(records: Iterable[Record], n_layers: int) -> Document:
    """The measured part of a document, of the records without an error; at least one."""
    good = [record for record in records if record["error"] is None]
    measure = measure_of(good)
    clips = tuple(dict.fromkeys(record["clip"] for record in good))
    found: Document = {
        "n_layers": n_layers,
        "measure": measure,
        "samples": len(good),
        "clips": len(clips),
        "counts": {kind: _mean(record["tokens"][kind] for record in good) for kind in KINDS[:2]},
        "full": _row(clips, measure, [(record, record["full"]) for record in good]),
    }
    for curve, names in PLACES.items():
        points: dict[tuple[Any, ...], list[tuple[Record, Mapping[str, Any]]]] = {}
        for record in good:
            for outcome in record.get(curve, ()):
                place = tuple(outcome[name] for name in names)
                points.setdefault(place, []).append((record, outcome))
        order = sorted(points, key=lambda place: (KINDS.index(place[0]), *place[1:]))
        found[curve] = [
            {
                **dict(zip(names, place, strict=True)),
                **_row(clips, measure, points[place]),
                "full": _with_all_tokens(measure, [record for record, _ in points[place]]),
            }
            for place in order
        ]
    looks = [record["attention"] for record in good if record.get("attention")]
    found["attention"] = [
        {"layer": rows[0]["layer"], **{k: _mean(row[k] for row in rows) for k in ("video", "audio", "text")}}
        for rows in zip(*looks, strict=True)
    ]
    return found


def _row(
    clips: Sequence[str], measure: str, outcomes: Sequence[tuple[Record, Mapping[str, Any]]]
) -> dict[str, Any]:
    """One point's numbers over the questions that have it."""
    agreement = _share(clips, outcomes, lambda record, outcome: (outcome["agreement"], ""))
    value = agreement
    if measure == "accuracy":
        value = _share(clips, outcomes, lambda record, outcome: (outcome["correct"], record["family"]))
    return {
        "accuracy": value.value if measure == "accuracy" else None,
        "agreement": agreement.value,
        "log_likelihood": _mean(outcome["log_likelihood"] for _, outcome in outcomes),
        "probability": _mean(outcome["probability"] for _, outcome in outcomes),
        "low": value.low,
        "high": value.high,
        "n": len(outcomes),
    }


def _with_all_tokens(measure: str, records: Sequence[Record]) -> dict[str, Any]:
    """The measures of these questions' full-token answers."""
    full = [record["full"] for record in records]
    scored = [
        {"family": record["family"], "correct": outcome["correct"]}
        for record, outcome in zip(records, full, strict=True)
    ]
    return {
        "accuracy": _mean(shares(scored).values()) if measure == "accuracy" else None,
        **{key: _mean(outcome[key] for outcome in full) for key in ("agreement", *LIKELIHOODS)},
    }


def of_full(document: Mapping[str, Any], row: Mapping[str, Any], measure: str, key: str = "") -> float:
    """A row's number (`key`: "low" or "high", not `measure`) by what full tokens reach on its questions.

    Raises UsageError where that is 0, or not known: older traces have it only of all questions together.
    """
    known = row.get("full")
    if known is None and row.get("n") == document["full"].get("n"):
        known = document["full"]
    if known is None:
        raise UsageError(
            f"this trace has points over {row.get('n')} of its {document['full'].get('n')} questions, and "
            "not what full tokens reach on those",
            hint="trace again with this version of seats",
        )
    if not known[measure]:
        raise UsageError(f"the {measure} with all tokens is 0 on the questions of a point of this trace")
    return float(row[key or measure] / known[measure])


def _share(
    clips: Sequence[str],
    outcomes: Sequence[tuple[Record, Mapping[str, Any]]],
    told: Callable[[Record, Mapping[str, Any]], tuple[bool, str]],
) -> Estimate:
    """The mean over families of the share for which it holds. `told`: (whether it holds, family)."""
    rows = []
    for record, outcome in outcomes:
        holds, family = told(record, outcome)
        rows.append({"clip": record["clip"], "family": family, "correct": holds})
    return estimate(clips, [rows], lambda values: values[0])


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


# ---- on disk ----------------------------------------------------------------------------------------------


def read_document(path: Path) -> Document:
    """A trace that `seats trace --json` printed. Raises UsageError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # the former says in which line
        raise UsageError(f"{path} is not JSON: {error}", hint=_WRITTEN_BY) from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version is None or not all(key in value for key in NEEDED):
        raise UsageError(f"{path} is no trace", hint=_WRITTEN_BY)
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path} is a trace of version {version}; this seats reads {SCHEMA_VERSION}")
    problem = _problem(value)
    if problem:
        raise UsageError(f"{path} is a damaged trace: {problem}", hint=_WRITTEN_BY)
    return dict(value)


def _problem(document: Mapping[str, Any]) -> str:
    """What is missing in a trace, or of the wrong kind, and where; "" where nothing is."""
    measure, n_layers = document["measure"], document["n_layers"]
    if measure not in ("accuracy", "agreement"):
        return f"measure is {measure!r}"
    if not isinstance(n_layers, int) or n_layers < 1:
        return f"n_layers is {n_layers!r}"
    numbers = (measure, "probability", "n")
    model = document["model"]
    if not isinstance(model, dict) or not all(isinstance(model.get(k), str) for k in ("name", "model_type")):
        return "model has no name or no model_type"
    for name in ("options", "environment"):
        if not isinstance(document.get(name, {}), dict):
            return f"{name} is no object"
    found = (
        _lacking("model", model, ("layers", "hidden_size"))
        or _lacking("full", document["full"], numbers)
        or _lacking("counts", document["counts"], KINDS[:2])
        or _lacking("the document", document, ("samples", "clips"))
        or ("" if {"low", "high"} <= document["full"].keys() else "full: low or high is missing")
    )
    for curve in CURVES:
        rows = document[curve]
        if not isinstance(rows, list):
            return f"{curve} is no list"
        places = PLACES.get(curve, ("layer",))
        needed = numbers if curve in PLACES else ("video", "audio", "text")
        for number, row in enumerate(rows, 1):
            where = f"{curve}, row {number}"
            found = found or _lacking(where, row, [*(name for name in places if name != "kind"), *needed])
            if not found and "kind" in places and row.get("kind") not in KINDS:
                found = f"{where}: kind is {row.get('kind')!r}"
            if not found and row.get("full") is not None and curve in PLACES:
                found = _lacking(f"{where}: full", row["full"], (measure, "probability"))
            if not found and curve == "removal" and not {"low", "high"} <= row.keys():
                found = f"{where}: low or high is missing"
    return found


def _lacking(where: str, values: Any, names: Iterable[str]) -> str:
    """Which of `names` is no finite number in `values`."""
    if not isinstance(values, dict):
        return f"{where}: no object with keys"
    for name in names:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            return f"{where}: {name} is " + ("missing" if name not in values else f"{value!r}, not a number")
    for name in ("low", "high"):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{where}: {name} is {value!r}, not a number"
    return ""


_WRITTEN_BY = "a trace is what `seats trace --json` prints"
