"""A report as tables: what was kept, and what it cost."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from seats_cli.cli.console import Table

if TYPE_CHECKING:
    from seats_cli.measure.report import Report

NONE = "-"  # does not apply to this clip, or is not known
BLANK = ""


def report_tables(report: "Report", full: "Report | None" = None) -> list[Table]:
    """Tokens and costs of one answer; with `full`, the same question's run on all tokens stands beside it."""
    tables = [token_table(report), cost_table(report) if full is None else comparison_table(report, full)]
    if report.environment.random_weights:
        tables = [Table(f"{table.title}, random weights", table.columns, table.rows) for table in tables]
    return tables


def token_table(report: "Report") -> Table:
    """Tokens per kind from the whole prompt to the last layer, and the retention that this comes to."""
    rows = [
        (label, *(str(count) for count in (left.video, left.audio, left.text, left.total)))
        for label, left in report.rows()
    ]
    for label, ratios in (
        ("kept, asked", report.retention.asked),
        ("kept, reached", report.retention.reached),
    ):
        rows.append((label, percent(ratios.video), percent(ratios.audio), NONE, percent(ratios.overall)))
    title = f"tokens ({report.method['name']}, kept: mean over layers)"
    return Table(title, ("", "video", "audio", "text", "total"), tuple(rows))


def cost_table(report: "Report") -> Table:
    """What one answer cost, and what the whole prompt would have cost where that is known."""
    compute, memory, timing = report.compute, report.memory, report.timing
    rows = [
        pair("prefill compute", compute.full_flops, compute.kept_flops, flops),
        pair("KV cache", memory.kv_bytes_full, memory.kv_bytes, human_bytes),
    ]
    rows.append(("load model (once)", BLANK, seconds(timing.load_s), BLANK))
    for stage, spent in timing.stages.items():
        rows.append((stage.replace("_", " "), BLANK, seconds(spent), BLANK))
    rows += [
        ("first token after", BLANK, seconds(timing.time_to_first_token_s), BLANK),
        ("in all", BLANK, seconds(timing.total_s), BLANK),
        ("generated", BLANK, speed(timing.tokens_per_s), BLANK),
        ("peak memory", BLANK, maybe_bytes(memory.peak_bytes), BLANK),
    ]
    return Table(f"cost ({where(report)})", ("", "all tokens", "spent", "gain"), tuple(rows))


def comparison_table(report: "Report", full: "Report") -> Table:
    """Both runs side by side: all tokens, the method, and how many times less the method took."""
    name = str(report.method["name"])
    rows = [
        pair("prefill compute", full.compute.kept_flops, report.compute.kept_flops, flops),
        pair("KV cache", full.memory.kv_bytes, report.memory.kv_bytes, human_bytes),
    ]
    for stage in dict.fromkeys([*full.timing.stages, *report.timing.stages]):
        sides = (full.timing.stages.get(stage), report.timing.stages.get(stage))
        rows.append(pair(stage.replace("_", " "), *sides, seconds))
    first = (full.timing.time_to_first_token_s, report.timing.time_to_first_token_s)
    rows += [
        pair("first token after", *first, seconds),
        pair("in all", full.timing.total_s, report.timing.total_s, seconds),
        ("generated", speed(full.timing.tokens_per_s), speed(report.timing.tokens_per_s), NONE),
        peak_pair(report, full),
        ("same answer", NONE, "yes" if full.answer == report.answer else "no", NONE),
    ]
    title = f"cost, one warm run of each ({where(report)})"
    return Table(title, ("", "full", name, "gain"), tuple(rows))


def pair(
    label: str, full: float | None, kept: float | None, shown: Callable[[float], str]
) -> tuple[str, str, str, str]:
    """One row of a comparison; a side that does not apply is a dash."""
    cells = [NONE if value is None else shown(value) for value in (full, kept)]
    gain = NONE if full is None or kept is None else times_less(full, kept)
    return (label, cells[0], cells[1], gain)


def peak_pair(report: "Report", full: "Report") -> tuple[str, str, str, str]:
    """Both peaks. On a host it is the process's own peak, which a later run cannot lower: no gain is told."""
    row = pair("peak memory", full.memory.peak_bytes, report.memory.peak_bytes, human_bytes)
    return row if report.environment.device.startswith("cuda") else (*row[:3], NONE)


def where(report: "Report") -> str:
    """Model, device and dtype in a few words."""
    environment = report.environment
    return f"{environment.model}, {environment.device_name or environment.device}, {environment.dtype}"


def times_less(full: float, kept: float) -> str:
    """`full` / `kept` as a factor."""
    return f"{full / kept:.2f}x" if kept > 0 else NONE


def percent(share: float | None) -> str:
    """0.1 as "10.0%"."""
    return NONE if share is None else f"{100 * share:.1f}%"


def seconds(value: float | None) -> str:
    """Seconds, in milliseconds below one second."""
    if value is None:
        return NONE
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def speed(tokens_per_s: float | None) -> str:
    """Tokens a second."""
    return NONE if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def flops(count: float) -> str:
    """Multiply-adds in the largest unit that leaves a number of at least one."""
    for exponent, unit in ((12, "TFLOPs"), (9, "GFLOPs"), (6, "MFLOPs")):
        if count >= 10**exponent:
            return f"{count / 10**exponent:.2f} {unit}"
    return f"{count:.0f} FLOPs"


def maybe_bytes(count: int | None) -> str:
    """Bytes, or a dash where the platform does not tell."""
    return NONE if count is None else human_bytes(count)


def human_bytes(count: float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
