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
from seats_cli.presets import Preset, RatioPair, load_preset
from seats_cli.selection.methods import METHODS
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan, Stage

OMNI_7B = LanguageGeometry(28, 3584, 28, 4, 128, 18944, 152064)
OMNI_30B = LanguageGeometry(48, 2048, 32, 4, 128, 768, 152064, experts=128, active_experts=8)
PAPER = SelectionOptions("paper", "raw", False, "text", "published")
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
    vision_mlp_products: int = 3
    deepstack_layers: int = 0
    audio_stem_width: int = 0
    audio_stem_frames: int = 0


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


def test_what_runs_of_a_mixture_has_wide_queries_and_a_router() -> None:
    wide = replace(SMALL, head_dim=8, mlp=5, experts=6, active_experts=2)
    published = 2 * 5 * 64 + 2 * 5 * 8 * 8 + 2 * 25 * 8 + 3 * 5 * 8 * 10
    assert layer_flops(5, wide) == published
    assert layer_flops(5, wide, as_run=True) == published + 2 * 5 * 8 * 8 + 2 * 25 * 8 + 5 * 8 * 6
    assert prefill_flops([5] * 3, SMALL, as_run=True) == prefill_flops([5] * 3, SMALL)


@pytest.mark.parametrize(
    ("preset", "geometry", "pair", "audio_per_s", "full", "kept"),
    [
        ("omni-7b", OMNI_7B, (0.06, 0.35), 25, 111.0, 12.2),
        ("omni-30b", OMNI_30B, (0.07, 0.45), 13, 47.2, 3.9),
    ],
)
def test_the_published_compute(
    preset: str,
    geometry: LanguageGeometry,
    pair: tuple[float, float],
    audio_per_s: int,
    full: float,
    kept: float,
) -> None:
    """One clip gives all four published totals: 128 frames of 4:3 in 130 tokens a grid (10 x 13), 135 s of
    sound, 80 tokens of text, and the published retention of each kind as it is, whatever the clip's total."""
    n_video, n_audio, n_text = 64 * 130, 135 * audio_per_s, 80
    ratio = (pair[0] * n_video + pair[1] * n_audio) / (n_video + n_audio)
    published = _published(load_preset(preset), ratio, pair)
    counts = ClipCounts(n_video, n_audio, tokens_per_grid=130, n_windows=64, n_text=n_text)
    options = replace(PAPER, tau=published.schedule.tau)
    found = METHODS["seats"].plan(published, ratio, counts, options)
    assert (found.retention_video, found.retention_audio) == pytest.approx(pair)
    whole = (n_text + n_video + n_audio,) * geometry.n_layers
    assert prefill_flops(whole, geometry) / 1e12 == pytest.approx(full, rel=0.01)
    spent = prefill_flops(layer_lengths(found, n_text), geometry)
    assert spent / 1e12 == pytest.approx(kept, rel=0.01)


def _published(preset: Preset, ratio: float, pair: tuple[float, float]) -> Preset:
    windows = preset.published_windows or preset.windows
    return replace(preset, ratio_table=(RatioPair(ratio, *pair),), windows=windows)


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


def test_the_deepstack_encoder_written_out() -> None:
    one = Encoders(
        vision_layers=2, vision_full_layers=2, vision_hidden=8, vision_mlp=16, hidden=32, patch=16,
        vision_mlp_products=2, deepstack_layers=3,
    )  # fmt: skip
    patches, per_grid = 2 * 24 * 24, 24 * 24
    blocks = 2 * patches * (4 * 64 + 2 * 8 * 16)
    attention = 2 * patches * 8 * 2 * per_grid
    mergers = 4 * (patches // 4 * (32 * 32 + 32 * 32))
    assert vision_flops((2, 24, 24), one) == blocks + attention + patches * 3 * 2 * 16 * 16 * 8 + mergers


def test_the_convolved_audio_encoder_written_out() -> None:
    one = Encoders(
        audio_layers=2, audio_hidden=8, audio_mlp=16, hidden=32, audio_chunk=26, mel_bins=128,
        audio_stem_width=4, audio_stem_frames=100,
    )  # fmt: skip

    def stem(t1: int, t2: int, t3: int) -> int:
        return 9 * 4 * 64 * t1 + 9 * 16 * 32 * t2 + 9 * 16 * 16 * t3 + t3 * 4 * 16 * 8

    positions = 3 * 13 + 4  # 330 mel frames
    dense = 2 * positions * (4 * 64 + 2 * 8 * 16)
    attention = 2 * 2 * 8 * (26**2 + 17**2)
    stems = 3 * stem(50, 25, 13) + stem(15, 8, 4)
    assert audio_flops(330, one) == stems + dense + attention + positions * 8 * (8 + 32)


def test_encoders_grow_in_step_with_the_clip() -> None:
    assert vision_flops((64, 24, 24), Encoders()) == 64 * vision_flops((1, 24, 24), Encoders())
    assert audio_flops(6400, Encoders()) == 32 * audio_flops(200, Encoders())
    assert vision_flops((0, 24, 24), Encoders()) == audio_flops(0, Encoders()) == 0


def test_a_models_geometry_fits() -> None:
    from seats_cli.model.adapter import Geometry

    names = set(Geometry.__dataclass_fields__)
    assert set(LanguageGeometry.__dataclass_fields__) <= names
    assert set(Encoders.__dataclass_fields__) <= names
