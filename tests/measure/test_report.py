"""The report: its published shape, and its arithmetic by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from seats_cli import __version__
from seats_cli.measure import report as reporting
from seats_cli.measure.clock import FIRST_TOKEN, PeakMemory, Stopwatch
from seats_cli.measure.report import Report, TokenCounts, jsonable
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import DropStep, Plan, Stage

BEFORE = (10, 80, 20)
LAYERS = ((10, 40, 16), (10, 40, 16), (10, 10, 8), (10, 0, 0))
CUTS = ((2, (10, 10, 8)), (3, (10, 0, 0)))

# What `--json` has promised. Adding a key is fine; a key that goes or moves needs a new schema_version.
COUNTS = {"text": int, "video": int, "audio": int, "total": int}
SCHEMA: dict[str, Any] = {
    "schema_version": int,
    "media": {"path": str},
    "question": str,
    "answer": str,
    "method": {
        "name": str,
        "preset": str,
        "entry": {"video": float, "audio": float},
        "stage_1_window": {"video": int, "audio": int},
        "drops": [{"after_layer": int, "keep_video": float, "keep_audio": float}],
        "late_layer": int,
        "expected_retention": float,
        "options": {
            "window_relevance": str, "merge": bool, "decode_cache": str, "budgets": str, "tau": float,
            "entry_scale": float, "seed": int, "audio_windows": str,
        },
        "notes": [str],
    },
    "tokens": {
        "before": COUNTS, "after_stage_1": COUNTS, "drops": [{"after_layer": int, "left": COUNTS}],
        "end": COUNTS, "per_layer": [COUNTS], "generated": int, "finish_reason": str,
    },
    "retention": {
        "asked": {"overall": float, "video": float, "audio": float},
        "reached": {"overall": float, "video": float, "audio": float},
    },
    "compute": {"full_flops": int, "kept_flops": int, "ratio": float},
    "timing": {
        "stages": {"prefill": float}, "load_s": float, "time_to_first_token_s": float, "tokens_per_s": float,
        "total_s": float,
    },
    "memory": {"kv_bytes": int, "kv_bytes_full": int, "peak_bytes": int, "peak_source": str},
    "environment": {
        "seats": str, "python": str, "torch": str, "transformers": str, "av": str, "platform": str,
        "device": str, "device_name": str, "dtype": str, "attention": str, "model": str, "revision": str,
        "family": str, "parameters": int, "random_weights": bool, "quantization": type(None),
    },
    "options": {"ratio": float},
}  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    return Plan(
        method="seats",
        preset="by hand",
        ratio=0.37,
        n_layers=4,
        n_video=80,
        n_audio=20,
        n_windows=2,
        tokens_per_grid=20,
        retention_video=0.28,
        retention_audio=0.5,
        entry_video=0.5,
        entry_audio=0.8,
        video_window=40,
        audio_window=10,
        drops=(DropStep(2, 0.25, 0.5),),
        late_layer=4,
        stages=(Stage("stage I", 0, 40, 16), Stage("after layer 2", 2, 10, 8), Stage("late", 3, 0, 0)),
        expected_retention=0.325,
        options=SelectionOptions(),
        needs_saliency=True,
        score_layers=(2,),
        notes=("why",),
    )


@pytest.fixture
def report(plan: Plan) -> Report:
    moment = [0.0]
    clock = Stopwatch(now=lambda: moment[0])
    with clock.stage("prefill"):
        moment[0] = 3.0
    with clock.stage("generate"):
        moment[0] = 3.5
        clock.mark(FIRST_TOKEN)
        moment[0] = 7.0
    moment[0] = 9.0
    return Report(
        schema_version=reporting.SCHEMA_VERSION,
        media={"path": "clip.mp4"},
        question="what?",
        answer="this",
        method=reporting.method_record(plan),
        tokens=reporting.token_report(BEFORE, LAYERS, CUTS, 5, "stop"),
        retention=reporting.retention_report(plan, BEFORE, LAYERS),
        compute=reporting.compute_report(1000, 250),
        timing=reporting.timing_report(clock, 8, 12.0),
        memory=reporting.memory_report(10, 40, PeakMemory(500, "process")),
        environment=reporting.environment_report(
            device=torch.device("cpu"),
            dtype="float32",
            attention="sdpa",
            model="m",
            revision="abc",
            family="qwen2_5_omni",
            parameters=7,
            random_weights=False,
        ),
        options={"ratio": 0.37},
    )


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        assert set(schema) <= set(value), where
        for key, inner in schema.items():
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        assert value, where
        for item in value:
            _check(item, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, where


def test_the_published_shape(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert list(document) == list(SCHEMA)
    _check(document, SCHEMA, "report")
    for name in ("tokens", "retention", "compute", "timing", "memory", "environment", "method"):
        assert set(document[name]) == set(SCHEMA[name]), name


def test_retention_is_the_mean_over_layers(report: Report) -> None:
    reached = report.retention.reached
    assert reached.video == (40 + 40 + 10 + 0) / (80 * 4)
    assert reached.audio == (16 + 16 + 8 + 0) / (20 * 4)
    assert reached.overall == (90 + 40) / (100 * 4)
    assert report.retention.asked == reporting.Ratios(0.37, 0.28, 0.5)


def test_a_kind_that_is_absent_has_no_retention(plan: Plan) -> None:
    silent = tuple((text, video, 0) for text, video, _ in LAYERS)
    reached = reporting.retention_report(replace(plan, n_audio=0), (10, 80, 0), silent)
    assert reached.reached.audio is None
    assert reached.asked.audio is None
    assert reached.reached.overall == reached.reached.video
    nothing = reporting.retention_report(plan, (10, 0, 0), ((10, 0, 0),) * 4)
    assert nothing.asked == nothing.reached == reporting.Ratios(None, None, None)


def test_tokens_at_every_point(report: Report) -> None:
    assert report.rows() == (
        ("before", TokenCounts(10, 80, 20, 110)),
        ("after stage I", TokenCounts(10, 40, 16, 66)),
        ("after layer 2", TokenCounts(10, 10, 8, 28)),
        ("after layer 3", TokenCounts(10, 0, 0, 10)),
        ("end", TokenCounts(10, 0, 0, 10)),
    )
    assert [layer.total for layer in report.tokens.per_layer] == [66, 66, 28, 10]


def test_a_cut_behind_the_last_layer_is_the_end() -> None:
    tokens = reporting.token_report((4, 6, 0), ((4, 6, 0),), ((1, (4, 2, 0)),), 1, "length")
    assert tokens.end == TokenCounts(4, 2, 0, 6)
    assert tokens.per_layer[-1] == TokenCounts(4, 6, 0, 10)


def test_timing(report: Report) -> None:
    assert report.timing.stages == {"prefill": 3.0, "generate": 4.0}
    assert report.timing.time_to_first_token_s == 3.5
    assert report.timing.tokens_per_s == 8 / 4.0
    assert report.timing.total_s == 9.0
    assert report.timing.load_s == 12.0


def test_no_speed_without_steps() -> None:
    timing = reporting.timing_report(Stopwatch(), 0, 0.0)
    assert timing.tokens_per_s is None
    assert timing.time_to_first_token_s is None


def test_compute_is_a_ratio(report: Report) -> None:
    assert report.compute.ratio == 0.25


def test_versions_are_those_installed(report: Report) -> None:
    assert report.environment.seats == __version__
    assert report.environment.torch == torch.__version__


@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), object(), {1: 2}, {1, 2}, torch.zeros(1), b"x"]
)
def test_only_json_gets_into_json(wrong: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        jsonable({"deep": [wrong]})


def test_the_report_is_frozen(report: Report) -> None:
    with pytest.raises(AttributeError):
        report.answer = "that"  # type: ignore[misc]
