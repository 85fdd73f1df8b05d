"""The memory model: its terms on small numbers, and its sum against peaks that were measured on a GPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seats_cli.engine.graph import ROUNDING
from seats_cli.measure.compute import layer_lengths
from seats_cli.measure.memory import (
    FLOAT32,
    MATMUL_WORKSPACE,
    Engine,
    Workload,
    audio_bytes,
    buffer_bytes,
    cache_bytes,
    decode_bytes,
    estimate,
    layer_bytes,
    prefill_bytes,
    vision_bytes,
)
from seats_cli.model.adapter import Geometry
from seats_cli.presets import load_preset
from seats_cli.selection.methods import find_method
from seats_cli.selection.options import configure
from seats_cli.selection.plan import ClipCounts

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "speed"
SMALL = Geometry(
    family="test", n_layers=3, hidden=4, n_heads=2, n_kv_heads=1, head_dim=2, mlp=10, vocab=7,
    context_length=100, patch=2, merge=2, temporal_patch=2, vision_layers=1, vision_hidden=6,
    vision_heads=2, vision_mlp=40, vision_full_layers=1, vision_window_patches=4, audio_layers=1,
    audio_hidden=5, audio_heads=1, audio_mlp=9, audio_chunk=4, mel_bins=3, audio_tokens_per_s=25,
    position_ids_per_s=25, seconds_per_window=2, tied_embeddings=False,
)  # fmt: skip
WORK = Workload(
    patches=16,
    window_patches=8,
    pixel_bytes=100,
    positions=12,
    held=20,
    entering=30,
    lengths=(30, 12, 5),
    new_tokens=3,
)
PLAIN = Engine(itemsize=2)


def test_each_moment_by_hand() -> None:
    # C = 3 * 2 * 2 * 2 = 24 numbers of a patch; 6 D + 4 I = 36 + 160
    assert vision_bytes(WORK, SMALL, PLAIN) == 100 + 16 * 24 * 2 + 16 * 2 * 196
    assert audio_bytes(WORK, SMALL, PLAIN) == 12 * 2 * (30 + 27)
    # 4 D + 2 D_q + 2 D_kv + 3 I = 16 + 8 + 4 + 30
    assert layer_bytes(30, SMALL, PLAIN) == 30 * 2 * 58
    of_token = 2 * 2 * 2  # keys and values of one token in one layer
    assert cache_bytes(WORK.lengths, SMALL, PLAIN) == 47 * of_token
    assert prefill_bytes(WORK, SMALL, PLAIN) == 30 * 4 * 2 + 30 * 2 * 58 + 30 * of_token
    assert buffer_bytes(WORK, SMALL, PLAIN) == 56 * of_token
    assert decode_bytes(WORK, SMALL, PLAIN) == (56 + 30) * of_token
    in_graph = replace(PLAIN, graph_rounds=16)
    assert buffer_bytes(WORK, SMALL, in_graph) == (48 + 16 + 16) * of_token
    assert decode_bytes(WORK, SMALL, in_graph) == (80 + 47) * of_token
    found = estimate(SMALL, 1000, WORK, PLAIN)
    assert found.encode == vision_bytes(WORK, SMALL, PLAIN) + 20 * 4 * 2
    assert found.peak == 1000 + MATMUL_WORKSPACE + max(found.moments.values())
    assert found.largest == "encode"
    assert found.peak - found.weights == found.working


def test_what_changes_a_moment() -> None:
    text = replace(PLAIN, text_cache=True)
    of_token = 8
    assert cache_bytes(WORK.lengths, SMALL, text) == 3 * 5 * of_token, "only what outlived every drop"
    assert layer_bytes(30, SMALL, replace(PLAIN, fused_text=False)) == 30 * 2 * 68
    assert layer_bytes(30, SMALL, replace(PLAIN, dequantised=999)) == 30 * 2 * 58 + 999
    mixture = replace(SMALL, active_experts=2)
    assert layer_bytes(30, mixture, PLAIN) == 30 * 2 * (28 + 2 * 3 * (4 + 10))
    # without the kernel, scores of 60 heads between 8 patches of each window, twice in float32
    many = replace(SMALL, vision_heads=60)
    scored = vision_bytes(WORK, many, replace(PLAIN, on_gpu=False))
    assert scored == 100 + 16 * 24 * 2 + 2 * FLOAT32 * 60 * 8 * 16 + 16 * 2 * 36
    assert vision_bytes(WORK, many, PLAIN) == vision_bytes(WORK, SMALL, PLAIN)
    with pytest.raises(ValueError, match="3 lengths for 2 layers"):
        estimate(replace(SMALL, n_layers=2), 0, WORK, PLAIN)


def measured_rows() -> list[Any]:
    """Every row of ours with a peak, in the order of its run."""
    found = []
    for name, new_tokens in (("7b-64s", 100), ("7b-sweep", 8), ("7b-20min", 4), ("7b-file", 8)):
        document = json.loads((MEASURED / f"{name}.json").read_text())
        for row in document["rows"]:
            if row["engine"] == "seats":
                item = document["input"]["items"][row["item"]]
                label = f"{name} {item['tokens']['total']} {row['method']} {row['ratio']}"
                found.append(pytest.param(document, row, item, new_tokens, name, id=label))
    return found


@pytest.mark.parametrize(("document", "row", "item", "new_tokens", "name"), measured_rows())
def test_the_estimate_is_near_what_was_measured(
    document: Any, row: Any, item: Any, new_tokens: int, name: str
) -> None:
    """Within 2% of the peak, and within 10% of what is not weights: the weights alone would flatter it."""
    preset = load_preset("qwen2.5-omni-7b")
    text, vision, audio = (preset.geometry[part] for part in ("text", "vision", "audio"))
    sizes = replace(
        SMALL, n_layers=28, hidden=text["hidden_size"], n_heads=28, n_kv_heads=4, head_dim=128,
        mlp=text["intermediate_size"], vocab=text["vocab_size"], patch=14,
        vision_hidden=vision["hidden_size"], vision_heads=vision["num_heads"],
        vision_mlp=vision["intermediate_size"],
        audio_hidden=audio["d_model"], audio_mlp=audio["encoder_ffn_dim"],
    )  # fmt: skip
    tokens, (grids, height, width) = item["tokens"], item["grid"]

    def lengths(method: str, ratio: float) -> tuple[int, ...]:
        options = configure(None, {}, model_type="qwen2_5_omni", n_layers=28, hidden_size=3584).options
        counts = ClipCounts(tokens["video"], tokens["audio"], height * width // 4, 1000, tokens["text"])
        return layer_lengths(find_method(method).plan(preset, ratio, counts, options), tokens["text"])

    def work(found: tuple[int, ...]) -> Workload:
        return Workload(
            patches=min(64, grids) * height * width,
            window_patches=2 * height * width,
            pixel_bytes=2 * min(64, grids) * 2 * 3 * height * width * 14 * 14,
            positions=min(25600, item["mel_frames"]) // 2,
            held=found[0] - tokens["text"],
            entering=found[0],
            lengths=found,
            new_tokens=new_tokens,
        )

    engine = Engine(itemsize=2, graph_rounds=ROUNDING)
    weights = 2 * document["environment"]["parameters"]
    found = estimate(sizes, weights, work(lengths(row["method"], row["ratio"])), engine)
    assert found.working == pytest.approx(row["peak_bytes"] - weights, rel=0.1)
    assert found.peak == pytest.approx(row["peak_bytes"], rel=0.02)
