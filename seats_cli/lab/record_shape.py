"""Whether a line that an earlier run wrote has all that its readers look at: files get edited by hand."""

from collections.abc import Mapping
from typing import Any

from seats_cli.lab.records import Record

NUMBER, WORDS = (int, float), (str,)
SHAPE: Mapping[str, tuple[type, ...]] = {  # of every record: sweeps and traces
    "id": WORDS,
    "clip": WORDS,
    "family": WORDS,
    "expected": (list,),
    "settings": (dict,),
    "ratio": NUMBER,
}
ANSWERED: Mapping[str, tuple[type, ...]] = {"answer": WORDS, "tokens": (dict,)}
SCORED: Mapping[str, tuple[type, ...]] = {
    "correct": (bool,),
    "retention": NUMBER,
    "compute_ratio": NUMBER,
    "prefill_s": NUMBER,
    "generate_s": NUMBER,
}
TRACED = ("agreement", "log_likelihood", "probability")
CURVES: Mapping[str, tuple[str, ...]] = {  # of a trace's record: what each of their points says
    "removal": ("kind", "layer", *TRACED),
    "choice": ("kind", "after_layer", "keep", *TRACED),
    "entry": ("kind", "entry", *TRACED),
    "attention": ("layer", "video", "audio", "text"),
}


def is_whole(record: Record) -> bool:
    """Whether a record of a sweep or a trace has all its parts, each of its kind."""
    error = record.get("error")
    if not _has(record, SHAPE):
        return False
    if error is not None:
        return isinstance(error, dict) and _has(error, {"kind": WORDS, "message": WORDS}) and "hint" in error
    if not _has(record, ANSWERED) or not _has(record["tokens"], dict.fromkeys(("generated",), NUMBER)):
        return False
    if "full" not in record:
        return _has(record, SCORED) and isinstance(record.get("wer"), (*NUMBER, type(None)))
    points = [(name, record[name]) for name in CURVES if name in record]
    return (
        isinstance(record["full"], dict)
        and _has(record["full"], dict.fromkeys(TRACED, NUMBER))
        and _has(record["tokens"], dict.fromkeys(("video", "audio"), NUMBER))
        and all(isinstance(rows, list) for _, rows in points)
        and all(
            isinstance(row, dict) and row.keys() >= set(CURVES[name]) for name, rows in points for row in rows
        )
    )


def _has(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> bool:
    return all(isinstance(values.get(name), kind) for name, kind in kinds.items())
