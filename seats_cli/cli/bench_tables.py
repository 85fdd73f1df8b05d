"""A benchmark's document as tables of at most 80 columns: what is computed, what it takes, what is gained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from seats_cli.cli.console import Table
from seats_cli.cli.tables import NONE, percent

Row = Mapping[str, Any]
Document = Mapping[str, Any]
Cell = Callable[[Row], str]
Columns = Sequence[tuple[str, Cell]]

COMPARED = {
    "encode_video": "video",
    "encode_audio": "audio",
    "select_prefill": "prefill",
    "per_token": "token",
    "answer": "answer",
}


def bench_head(found: Document) -> Iterator[str]:
    """Where it ran, on what, and how often."""
    environment, options = found["environment"], found["options"]
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    name = environment["device_name"].partition(", ")[0] if threads else environment["device_name"]
    weights = ", random weights" if environment["random_weights"] else ""
    yield f"{environment['model']}{weights}, {environment['dtype']}, {environment['attention']} attention"
    cuda = f", CUDA {environment['cuda']}" if environment["cuda"] else ""
    versions = ", ".join(f"{key} {environment[key]}" for key in ("seats", "torch", "transformers"))
    yield f"{name}{threads}; {versions}{cuda}"
    for item in found["input"]["items"]:
        yield f"{item['name']}{_tokens(item)}"
    rounds = f"{options['repeats']} rounds after {options['warmup']} of warm-up, rows in turns"
    yield f"answers of {options['new_tokens']} tokens; {rounds}"
    yield "times: medians; spread: between the quartiles, in % of the median"


def _tokens(item: Mapping[str, Any]) -> str:
    tokens = item["tokens"]
    if tokens is None:
        return ""
    kinds = [f"{tokens[kind]} {kind}" for kind in ("video", "audio", "image", "text") if tokens[kind]]
    return f": {' + '.join(kinds)} tokens"


def bench_tables(found: Document) -> Iterator[Table]:
    """Tokens and compute, select and prefill, the answer; and against transformers where that ran."""
    rows, weights = found["rows"], ", random weights" if found["environment"]["random_weights"] else ""
    names = row_names(found)
    ours = [(name, row) for name, row in zip(names, rows, strict=True) if row["engine"] == "seats"]
    every = list(zip(names, rows, strict=True))
    yield _table(f"tokens and prefill compute{weights}", ours, compute_columns([row for _, row in ours]))
    yield _table(f"select and prefill, ms{weights}", every, prefill_columns(rows))
    yield _table(f"encoders and answer, ms{weights}", every, ANSWER_COLUMNS)
    if any(row["over_transformers"] for row in rows):
        columns = [
            (label, lambda row, key=key: times((row["over_transformers"] or {}).get(key)))
            for key, label in COMPARED.items()
        ]
        title = f"times faster than transformers, all from tensors in memory{weights}"
        yield _table(title, ours, columns)


def _table(title: str, rows: Sequence[tuple[str, Row]], columns: Columns) -> Table:
    lines = tuple((name, *(cell(row) for _, cell in columns)) for name, row in rows)
    return Table(title, ("", *(head for head, _ in columns)), lines)


def row_names(found: Document) -> list[str]:
    """A name for each row, with the value of a sweep or the file where there are several inputs."""
    names = []
    sweep, items = found["input"]["sweep"], found["input"]["items"]
    for row in found["rows"]:
        name = "transformers" if row["engine"] == "transformers" else row["method"]
        if name not in ("transformers", "full"):
            name += f" {row['ratio']:g}"
        if len(items) > 1 and sweep is not None:
            unit = " s" if sweep["key"] == "seconds" else ""
            name = f"{sweep['values'][row['item']]:g}{unit} {name}"
        elif len(items) > 1:
            name = f"{items[row['item']]['name'].rpartition('/')[2]} {name}"
        names.append(name)
    return names


# ---- columns ----------------------------------------------------------------------------------------------


def compute_columns(rows: Sequence[Row]) -> Columns:
    """What the language model is given and multiplies; counts in one unit, memory where it can be told."""
    most = max((row["compute"]["flops"] or 0 for row in rows), default=0)
    size, unit = next(
        ((10**power, unit) for power, unit in ((12, "TFLOPs"), (9, "GFLOPs")) if most >= 10**power),
        (10**6, "MFLOPs"),
    )
    columns: list[tuple[str, Cell]] = [
        ("enter", lambda row: NONE if row["tokens"] is None else str(row["tokens"]["entering"]["total"])),
        ("a layer", lambda row: NONE if row["tokens"] is None else f"{row['tokens']['mean_per_layer']:.0f}"),
        ("kept", lambda row: percent(row["retention"])),
        (unit, lambda row: _scaled(row["compute"]["flops"], size)),
        ("of full", lambda row: percent(row["compute"]["of_full"])),
        ("KV MiB", lambda row: _scaled(row["kv_bytes"], 2**20)),
    ]
    if any(row["peak_bytes"] for row in rows):
        columns.append(("peak GiB", lambda row: _scaled(row["peak_bytes"], 2**30)))
    if any(row["flop_check"] for row in rows):
        columns.append(("counted", lambda row: _scaled((row["flop_check"] or {}).get("counted"), size)))
        columns.append(("off by", _difference))
    return columns


def prefill_columns(rows: Sequence[Row]) -> Columns:
    """Stage I and the language model's prefill."""
    columns: list[tuple[str, Cell]] = [("select", _ms("select")), ("prefill", _ms("prefill"))]
    if any(row["seconds"]["prefill_device"] for row in rows):
        columns.append(("events", _ms("prefill_device")))
    return [
        *columns,
        ("both", _ms("select_prefill")),
        ("spread", _spread("select_prefill")),
        ("speedup", lambda row: times(row["speedup"])),
        ("limit", lambda row: times(row["compute"]["limit"])),
        ("reached", lambda row: percent(row["fraction_of_limit"])),
    ]


def _ms(name: str) -> Cell:
    def cell(row: Row) -> str:
        found = row["seconds"][name]
        return NONE if found is None else milliseconds(found["median"])

    return cell


def _spread(name: str) -> Cell:
    def cell(row: Row) -> str:
        found = row["seconds"][name]
        return NONE if found is None or len(row["samples"]) < 2 else f"{100 * found['spread']:.0f}%"

    return cell


ANSWER_COLUMNS: Columns = (
    ("video", _ms("encode_video")),
    ("audio", _ms("encode_audio")),
    ("first", _ms("first_token")),
    ("token", _ms("per_token")),
    ("tokens/s", lambda row: NONE if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}"),
    ("whole", _ms("whole")),
    ("spread", _spread("whole")),
    ("speedup", lambda row: times(row["whole_speedup"])),
)


def milliseconds(value: float) -> str:
    """Seconds as milliseconds, with a decimal below a hundred and two below ten."""
    ms = 1000 * value
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}"


def times(factor: float | None) -> str:
    """A factor as "8.10x"."""
    return NONE if factor is None else f"{factor:.2f}x"


def _scaled(value: float | None, size: float) -> str:
    return NONE if value is None else f"{value / size:.2f}"


def _difference(row: Row) -> str:
    found = row["flop_check"]
    return NONE if found is None else f"{100 * found['relative_difference']:+.2f}%"


# ---- notes ------------------------------------------------------------------------------------------------


def bench_notes(found: Document) -> Iterator[str]:
    """What stands under the tables: how to read them, and the rows that failed."""
    rows = found["rows"]
    yield ""
    yield "select + prefill are compared with full's; limit: full's multiply-adds by the row's. first, whole:"
    yield "from the clip (frames in memory, or a file) to the first and to the last token; token: each after"
    yield "the first."
    if any(row["over_transformers"] for row in rows):
        yield "transformers ran first, on patches and mel frames that lay on the device: its processor is not"
        yield "timed. answer: ours is encoders + select + prefill + decoding, theirs a whole generate."
    beyond = [name for name, row in zip(row_names(found), rows, strict=True) if row["beyond_context"]]
    if beyond:
        yield f"beyond what the model was made for, timed all the same: {', '.join(beyond)}"
    for name, row in zip(row_names(found), rows, strict=True):
        if row["error"] is not None:
            yield f"{name}: not possible: {row['error']['message']}"
