"""A plan's document as tables: tokens and compute by layer, memory by moment, and whether it fits."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from seats_cli.cli.console import Table
from seats_cli.cli.tables import NONE, flops, human_bytes, percent, times_less

Document = Mapping[str, Any]

MOMENTS = {
    "encode": "encoders at work",
    "assemble": "sequence put together",
    "prefill": "prefill",
    "decode": "cache into decoding's buffers",
}


def plan_head(found: Document) -> Iterator[str]:
    """The model and the clip."""
    model, tokens, media = found["model"], found["tokens"], found["media"]
    quantised = f", {model['quantization']}" if model["quantization"] else ""
    yield f"{model['name']}: {model['parameters'] / 1e9:.2f} B parameters, {model['dtype']}{quantised}"
    before = tokens["before"]
    kinds = [f"{before[kind]} {kind}" for kind in ("video", "audio") if before[kind]]
    image = [f"{tokens['image']} image"] if tokens["image"] else []
    text = f"{before['text'] - tokens['image']} text"
    yield f"{media['path'] or 'a clip'}{_looked_at(media)}: {' + '.join([*kinds, *image, text])} tokens"


def _looked_at(media: Mapping[str, Any]) -> str:
    frames = media.get("frames", media.get("n_frames"))
    samples = media.get("samples", media.get("n_samples"))
    parts = [f"{frames} frames"] if frames else []
    parts += [f"{samples / 16000:.1f} s of sound"] if samples else []
    return f", {' and '.join(parts)}" if parts else ""


def plan_tables(found: Document) -> Iterator[Table]:
    """By layer, by cost, by memory."""
    yield layer_table(found)
    yield cost_table(found)
    yield memory_table(found)
    yield device_table(found)


def layer_table(found: Document) -> Table:
    """Tokens and compute of the layers, alike ones in one row."""
    tokens, compute, method = found["tokens"], found["compute"], found["method"]
    layers = list(zip(tokens["per_layer"], compute["per_layer"], strict=True))
    rows, first = [], 1
    for (left, each), alike in groupby(layers, key=lambda layer: (layer[0], layer[1])):
        last = first + len(list(alike)) - 1
        name = f"layers {first} to {last}" if last > first else f"layer {first}"
        counts = (str(left[kind]) for kind in ("video", "audio", "text", "total"))
        rows.append((name, *counts, flops(each), flops(each * (last - first + 1))))
        first = last + 1
    kept = f"kept: {percent(tokens['retention'])}, mean over layers" if tokens["retention"] else "no media"
    columns = ("", "video", "audio", "text", "total", "each", "together")
    return Table(f"tokens and compute by layer ({method['name']}; {kept})", columns, tuple(rows))


def cost_table(found: Document) -> Table:
    """What all tokens would cost, and what is left of it."""
    compute, memory = found["compute"], found["memory"]
    rows = [
        ("prefill compute", *_pair(compute["full_flops"], compute["kept_flops"], flops)),
        ("KV cache", *_pair(memory["kv_bytes_full"], memory["kv_bytes"], human_bytes)),
        ("vision encoder", "", flops(compute["vision_flops"]) if compute["vision_flops"] else NONE, ""),
        ("audio encoder", "", flops(compute["audio_flops"]) if compute["audio_flops"] else NONE, ""),
    ]
    return Table("cost", ("", "all tokens", "as asked", "gain"), tuple(rows))


def _pair(full: float, kept: float, shown: Any) -> tuple[str, str, str]:
    return shown(full), shown(kept), times_less(full, kept)


def memory_table(found: Document) -> Table:
    """The weights, each moment beside them, and the peak."""
    memory, weights = found["memory"], found["model"]["weight_bytes"]
    rows = [
        ("decoder layers", human_bytes(weights["decoder"])),
        ("embeddings and head", human_bytes(weights["outside"])),
        ("encoders", human_bytes(weights["encoders"])),
        ("weights", human_bytes(memory["weights_bytes"])),
    ]
    for name, words in MOMENTS.items():
        mark = " (the largest counts)" if name == memory["largest"] else ""
        rows.append((f"+ {words}{mark}", human_bytes(memory[f"{name}_bytes"])))
    rows.append(("peak, estimated", human_bytes(memory["peak_bytes"])))
    return Table("memory", ("", ""), tuple(rows))


def device_table(found: Document) -> Table:
    """What there is, and whether it is enough."""
    words = {True: "fits", False: "does not fit", None: "cannot tell"}
    rows = [
        (
            device["name"],
            NONE if device["free"] is None else human_bytes(device["free"]),
            words[device["fits"]],
        )
        for device in found["devices"]
    ]
    return Table("devices", ("", "free", ""), tuple(rows))


def plan_notes(found: Document) -> Iterator[str]:
    """Whether it fits, and what would."""
    context, memory = found["context"], found["memory"]
    if not context["fits"]:
        less = (
            "lower --ratio, --seconds, --frames or --max-new-tokens"
            if found["media"]["path"] is None
            else "lower --ratio, --max-frames, --fps or --max-new-tokens, or give --start and --end"
        )
        yield (
            f"too long for the model: {context['needed']} tokens with the answer, and its context holds "
            f"{context['length']}; {less}"
        )
    apart = (
        f", {human_bytes(memory['headroom_bytes'])} of each left to CUDA" if memory["headroom_bytes"] else ""
    )
    spread = found["options"]["device_map"] != "none"
    where = "spread over the devices" if spread else "on one device"
    if memory["fits"] is None:
        yield "whether it fits cannot be told: no device here says what it has free"
    elif memory["fits"]:
        yield f"{'it' if context['fits'] else 'its memory'} fits {where}{apart}"
    else:
        yield f"it does not fit {where}{apart}"
    if found["fits"] is False:
        for remedy in found["remedies"]:
            yield f"  {remedy['option']} would make it fit: {human_bytes(remedy['peak_bytes'])}"
        if not found["remedies"]:
            yield "  no single option that was tried would make it fit: combine them, or use a smaller model"
