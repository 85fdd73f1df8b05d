"""What is counted, against sums written out and the paper's own totals."""

from dataclasses import dataclass, replace

import pytest

from seats_cli.measure.compute import (
    LanguageGeometry,
    audio_flops,
    kv_bytes,
    layer_counts,
    layer_flops,
    layer_lengths,
    mean_retention,
    prefill_flops,
    score_flops,
    text_cache_lengths,
    vision_flops,
)
from seats_cli.presets import load_preset
from seats_cli.selection.methods import METHODS
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan, Stage

OMNI_7B = LanguageGeometry(28, 3584, 28, 4, 128, 18944, 152064)
SMALL = LanguageGeometry(n_layers=3, hidden=8, n_heads=2, n_kv_heads=1, head_dim=4, mlp=10, vocab=7)
COUNTS = ClipCounts(n_video=64 * 144, n_audio=1600, tokens_per_grid=144, n_windows=32, n_text=60)


@dataclass(frozen=True)
class Encoders:
    """Sizes of the two encoders of Qwen2.5-Omni-7B."""

    hidden: int = 3584
    patch: int = 14
    merge: int = 2
    temporal_patch: int = 2
    vision_layers: int = 32
    vision_hidden: int = 1280
    vision_mlp: int = 3420
    vision_full_layers: int = 4
    vision_window_patches: int = 64
    audio_layers: int = 32
    audio_hidden: int = 1280
    audio_mlp: int = 5120
    audio_chunk: int = 100
    mel_bins: int = 128


def plan(method: str = "seats", ratio: float = 0.1) -> Plan:
    return METHODS[method].plan(load_preset("omni-7b"), ratio, COUNTS, SelectionOptions())


def test_one_layer_written_out() -> None:
    assert layer_flops(5, SMALL) == 2 * 5 * 64 + 2 * 5 * 8 * 4 + 2 * 25 * 8 + 3 * 5 * 8 * 10


def test_a_prefill_is_its_layers_and_the_head() -> None:
    layers = layer_flops(9, SMALL) + layer_flops(4, SMALL) + layer_flops(2, SMALL)
    assert prefill_flops([9, 4, 2], SMALL) == layers + 2 * 8 * 7
    assert prefill_flops([9, 4, 2], SMALL, head_tokens=1) == layers + 8 * 7
    with pytest.raises(ValueError, match="2 lengths for 3 layers"):
        prefill_flops([9, 4], SMALL)


def test_a_mixture_counts_the_experts_that_run() -> None:
    dense = replace(SMALL, mlp=30)
    assert layer_flops(5, replace(SMALL, mlp=10, active_experts=3)) == layer_flops(5, dense)
    assert layer_flops(5, replace(SMALL, mlp=10, active_experts=2, shared_mlp=10)) == layer_flops(5, dense)


def test_tokens_of_each_layer() -> None:
    stages = [Stage("stage I", 0, 50, 20), Stage("after layer 2", 2, 10, 5), Stage("late", 3, 0, 0)]
    assert layer_counts(stages, 5, (100, 40)) == ((50, 20), (50, 20), (10, 5), (0, 0), (0, 0))
    assert layer_counts([], 2, (100, 40)) == ((100, 40), (100, 40))
    assert mean_retention(layer_counts(stages, 5, (100, 40)), (100, 40)) == (70 + 70 + 15) / (5 * 140)
    assert mean_retention([(0, 0)] * 5, (0, 0)) == 1.0


def test_the_published_saving_at_ten_percent() -> None:
    """The paper's 111.0 to 12.2 TFLOPs: 9.1 times less, on a clip whose full cost is that."""
    counts = ClipCounts(n_video=72 * 144, n_audio=1240, tokens_per_grid=144, n_windows=36, n_text=130)
    found = METHODS["seats"].plan(load_preset("omni-7b"), 0.1, counts, SelectionOptions())
    full = prefill_flops((counts.n_text + counts.n_video + counts.n_audio,) * 28, OMNI_7B)
    assert full / 1e12 == pytest.approx(111.0, rel=0.02)
    assert prefill_flops(layer_lengths(found, counts.n_text), OMNI_7B) < full / 8


def test_expected_lengths_follow_the_plan() -> None:
    lengths = layer_lengths(plan(), COUNTS.n_text)
    assert len(lengths) == 28
    assert list(lengths) == sorted(lengths, reverse=True)
    assert lengths[23:] == (60,) * 5
    assert lengths[22] > 60
    assert layer_lengths(plan("full"), 60) == (60 + COUNTS.n_video + COUNTS.n_audio,) * 28


def test_cache_bytes() -> None:
    assert kv_bytes([3, 2, 1], SMALL, 2) == 6 * 2 * 4 * 2
    seats = plan()
    assert text_cache_lengths(seats, 60) == (60,) * 28
    assert text_cache_lengths(plan("full"), 60) == (60 + COUNTS.n_video + COUNTS.n_audio,) * 28
    fixed = plan("fixed")
    assert text_cache_lengths(fixed, 60) == layer_lengths(fixed, 60)
    text, layerwise, full = (
        kv_bytes(lengths, OMNI_7B, 2)
        for lengths in (
            text_cache_lengths(seats, 60),
            layer_lengths(seats, 60),
            layer_lengths(plan("full"), 60),
        )
    )
    assert text < layerwise < full / 8


def test_scores_cost_next_to_nothing() -> None:
    assert score_flops(1500, OMNI_7B) < layer_flops(1500, OMNI_7B) / 100


def test_the_vision_encoder_written_out() -> None:
    one = Encoders(vision_layers=2, vision_full_layers=1, vision_hidden=8, vision_mlp=16, hidden=32)
    patches, per_grid = 2 * 24 * 24, 24 * 24
    blocks = 2 * patches * (4 * 64 + 3 * 8 * 16)
    attention = 2 * patches * 8 * (per_grid + 64)
    embedding = patches * 3 * 2 * 14 * 14 * 8
    merger = patches // 4 * (32 * 32 + 32 * 32)
    assert vision_flops((2, 24, 24), one) == blocks + attention + embedding + merger


def test_encoders_grow_in_step_with_the_clip() -> None:
    assert vision_flops((64, 24, 24), Encoders()) == 64 * vision_flops((1, 24, 24), Encoders())
    assert audio_flops(6400, Encoders()) == 32 * audio_flops(200, Encoders())
    assert vision_flops((0, 24, 24), Encoders()) == audio_flops(0, Encoders()) == 0


def test_a_models_geometry_fits() -> None:
    from seats_cli.model.adapter import Geometry

    names = set(Geometry.__dataclass_fields__)
    assert set(LanguageGeometry.__dataclass_fields__) <= names
    assert set(Encoders.__dataclass_fields__) <= names
