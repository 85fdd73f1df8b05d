"""A benchmark's numbers as a document: medians, spread, what they are relative to, and every sample.

median     of the repeats; `low` and `high` are the quartiles (linear between neighbours)
spread     (high - low) / median
speedup    median of select + prefill of `full`, by the row's
limit      multiply-adds of full's prefill by the row's, both as the engine runs them (see `Facts.flops`):
           what `speedup` would be if all time went into arithmetic. `paper_limit`: as the paper counts both
fraction_of_limit  speedup / limit
over_transformers  median of the stock row by this row's, stage by stage; `answer` starts from tensors in
                   memory on both sides, and ends with the last token
"""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from seats_cli.lab.bench import SEATS, STOCK, Bench, Row
from seats_cli.lab.bench_input import ClipSpec, Item
from seats_cli.lab.bench_runs import TIMES, Facts
from seats_cli.lab.settings import FULL
from seats_cli.measure.clock import peak_memory
from seats_cli.measure.compute import audio_flops, vision_flops
from seats_cli.measure.report import TokenCounts, jsonable
from seats_cli.session import Session

SCHEMA_VERSION = 1
COMPARED = ("encode_video", "encode_audio", "select_prefill", "per_token", "answer")
Document = dict[str, Any]


def document(
    bench: Bench, session: Session, options: Mapping[str, Any], sweep: Mapping[str, Any] | None = None
) -> Document:
    """What --json prints, less the command and the date."""
    memory = peak_memory(session.adapter.device)
    found: Document = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "complete": bench.complete,
            "environment": {
                **jsonable(session.environment),
                "cuda": torch.version.cuda,
                "threads": torch.get_num_threads(),
            },
            "options": options,
            "input": {"sweep": sweep, "items": [item_record(item, session) for item in bench.items]},
            "memory": {"peak_bytes": memory.bytes, "source": memory.source},
            "rows": [
                row_record(row, beside(bench.rows, row, SEATS), beside(bench.rows, row, STOCK))
                for row in bench.rows
                if row.runs or row.error is not None  # an interruption leaves rows that never ran
            ],
        }
    )
    return found


def item_record(item: Item, session: Session) -> Document:
    """One input: what it is, its tokens, and what the encoders' arithmetic on it comes to."""
    source, adapter = item.source, session.adapter
    record: Document = {"name": item.name, "seconds": None, "frames": None, "seed": None, "tokens": None}
    record["video_decoder"] = item.video_decoder
    if isinstance(source, ClipSpec):
        record |= {"seconds": source.seconds, "frames": source.n_frames, "seed": source.seed}
    seen = item.seen
    if seen is None:
        return record
    shape, prompt = seen
    layout, n_image = prompt.layout, shape.n_image
    geometry = adapter.geometry
    return record | {
        "frames": 2 * shape.video_grid[0] if shape.video_grid else 0,
        "grid": shape.video_grid or shape.image_grid,
        "mel_frames": shape.audio_frames,
        "tokens": {
            "text": layout.n_text - n_image,
            "image": n_image,
            "video": layout.n_video,
            "audio": layout.n_audio,
            "total": len(layout),
        },
        "vision_flops": vision_flops(shape.video_grid, geometry) if shape.video_grid else 0,
        "audio_flops": audio_flops(shape.audio_frames, geometry) if shape.n_audio else 0,
    }


def beside(rows: Sequence[Row], row: Row, engine: str) -> Row | None:
    """The row with all tokens on the same input, by one engine; None where it never ran."""
    for other in rows:
        if (other.item, other.engine, other.setting.method) == (row.item, engine, FULL) and other.runs:
            return other
    return None


def row_record(row: Row, full: Row | None, stock: Row | None = None) -> Document:
    """One row. What does not apply, or is not known, is null."""
    setting, facts = row.setting, row.runs[0][2].facts if row.runs else None
    base = full.runs[0][2].facts if full is not None else None
    times = {name: summary([run.seconds.get(name) for _, _, run in row.runs]) for name in TIMES}
    speedup = _ratio(_median_of(full, "select_prefill"), _median(times["select_prefill"]))
    limit = _ratio(base.flops, facts.flops) if base and facts else None
    per_token = _median(times["per_token"])
    return {
        "item": row.item,
        "engine": row.engine,
        "method": setting.method,
        "ratio": setting.ratio,
        "preset": setting.preset,
        "settings": dict(setting.settings),
        "error": None
        if row.error is None
        else {"kind": row.error.kind, "message": str(row.error), "hint": row.error.hint},
        "tokens": _tokens(facts),
        "retention": facts.retention if facts else None,
        "beyond_context": facts.beyond_context if facts else None,
        "compute": {
            "flops": facts.flops if facts else None,
            "of_full": _ratio(facts.flops, base.flops) if base and facts else None,
            "limit": limit,
            "paper_flops": facts.paper_flops if facts else None,
            "paper_limit": _ratio(base.paper_flops, facts.paper_flops) if base and facts else None,
        },
        "flop_check": _check(row.counted),
        "seconds": times,
        "tokens_per_s": None if not per_token else 1 / per_token,
        "speedup": speedup,
        "fraction_of_limit": _ratio(speedup, limit),
        "whole_speedup": _ratio(_median_of(full, "whole"), _median(times["whole"])),
        "over_transformers": None
        if stock is None or row is stock or not row.runs
        else {name: _ratio(_median_of(stock, name), _median(times[name])) for name in COMPARED},
        "kv_bytes": facts.kv_bytes if facts else None,
        "peak_bytes": row.peak_bytes,
        "samples": [
            {"repeat": number, "order": order, "peak_bytes": run.peak_bytes, **run.seconds}
            for number, order, run in row.runs
        ],
    }


def _tokens(facts: Facts | None) -> Document | None:
    if facts is None:
        return None
    lengths = [sum(counts) for counts in facts.per_layer]
    return {
        "before": jsonable(TokenCounts.of(facts.before)),
        "entering": jsonable(TokenCounts.of(facts.per_layer[0])),
        "mean_per_layer": sum(lengths) / len(lengths),
        "last_layer": lengths[-1],
    }


def _check(counted: tuple[int, int] | None) -> Document | None:
    if counted is None:
        return None
    found, formula = counted
    return {"counted": found, "formula": formula, "relative_difference": found / formula - 1}


def summary(values: Sequence[float | None]) -> Document | None:
    """Median, quartiles and spread of what is known; None where nothing is."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive") if len(known) > 1 else known * 3
    return {"median": middle, "low": low, "high": high, "spread": (high - low) / middle if middle else 0.0}


def _median(found: Mapping[str, float] | None) -> float | None:
    return None if found is None else found["median"]


def _median_of(row: Row | None, name: str) -> float | None:
    return None if row is None else _median(summary([run.seconds.get(name) for _, _, run in row.runs]))


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


# ---- for tables ------------------------------------------------------------------------------------------


def as_csv(found: Document) -> str:
    """A line a row under a line of names; a time's median, quartiles as three columns, in seconds."""
    text = io.StringIO()
    writer: Any = None
    for row in found["rows"]:
        item, environment = found["input"]["items"][row["item"]], found["environment"]
        flat: Document = {
            "input": item["name"],
            "seconds": item["seconds"],
            "frames": item["frames"],
            **{key: row[key] for key in ("engine", "method", "ratio", "preset")},
            "settings": " ".join(f"{key}={value}" for key, value in row["settings"].items()),
            "random_weights": environment["random_weights"],
            "model": environment["model"],
            "device": environment["device_name"],
            "dtype": environment["dtype"],
            "repeats": len(row["samples"]),
            "error": (row["error"] or {}).get("message"),
            "tokens": (row["tokens"] or {}).get("before", {}).get("total"),
            "tokens_entering": (row["tokens"] or {}).get("entering", {}).get("total"),
            "tokens_mean_per_layer": (row["tokens"] or {}).get("mean_per_layer"),
            "retention": row["retention"],
            **row["compute"],
            "flops_counted": (row["flop_check"] or {}).get("counted"),
            "speedup": row["speedup"],
            "fraction_of_limit": row["fraction_of_limit"],
            "whole_speedup": row["whole_speedup"],
            "tokens_per_s": row["tokens_per_s"],
            "kv_bytes": row["kv_bytes"],
            "peak_bytes": row["peak_bytes"],
        }
        for name in TIMES:
            known = row["seconds"][name] or {}
            flat |= {f"{name}_s": known.get("median")}
            flat |= {f"{name}_s_{end}": known.get(end) for end in ("low", "high")}
        if writer is None:
            writer = csv.DictWriter(text, list(flat), lineterminator="\n")
            writer.writeheader()
        writer.writerow(flat)
    return text.getvalue()
