"""The benchmark: rows in turn, numbers that follow from the samples, the stock path, what does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seats_cli.errors import DeviceError, PlanError, UsageError
from seats_cli.lab import bench as benchmark
from seats_cli.lab.bench import STOCK, Bench, BenchOptions, Row, Watcher, measure, unaltered
from seats_cli.lab.bench_document import as_csv, document, summary
from seats_cli.lab.bench_input import ClipSpec, Item, NoiseClip, filler, spec_shape, usual_spec
from seats_cli.lab.bench_runs import TIMES, RunResult, StockItem, count_flops, run_row
from seats_cli.lab.settings import Setting, expand
from seats_cli.session import AskOptions, ModelOptions, Session

SPEC = ClipSpec(seconds=4.0, frames=8, size=(84, 56))
WHOLE = Setting("full", 1.0)


@pytest.fixture(scope="module")
def session(tiny_checkpoint_path: Path) -> Session:
    """The tiny random checkpoint on the CPU."""
    return Session(ModelOptions(str(tiny_checkpoint_path), device="cpu", dtype="float32"))


@pytest.fixture
def preset(session: Session) -> Any:
    return session.setup(AskOptions()).preset


# ---- the clip ---------------------------------------------------------------------------------------------


def test_the_noise_is_the_same_each_time_and_no_two_windows_are_alike() -> None:
    one, other = NoiseClip(SPEC), NoiseClip(SPEC)
    frames = [window.frames for window in one.video_windows(3)]
    assert [len(window) for window in frames] == [3, 3, 2]
    whole = np.concatenate(frames)
    assert whole.shape == (8, 56, 84, 3)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, np.concatenate([w.frames for w in other.video_windows(8)]))
    assert len({frame.tobytes() for frame in whole}) == 8
    samples = np.concatenate(list(one.audio_blocks(7000)))
    assert samples.shape == (one.n_samples,) == (64000,)
    assert samples.dtype == np.float32
    assert 0.05 < samples.std() < 0.2


def test_a_long_clip_uses_its_noise_again_with_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seats_cli.lab.bench_input.POOL_BYTES", 3 * 84 * 56 * 3)
    monkeypatch.setattr("seats_cli.lab.bench_input.POOL_SAMPLES", 1000)
    clip = NoiseClip(SPEC)
    frames = np.concatenate([window.frames for window in clip.video_windows(4)])
    assert frames.shape[0] == 8
    assert len({frame.tobytes() for frame in frames}) == 8
    assert sum(len(block) for block in clip.audio_blocks(999)) == 64000


@pytest.mark.parametrize(
    ("spec", "grid", "n_audio"),
    [
        (SPEC, (4, 4, 6), 100),
        (ClipSpec(1.0, 3, (28, 28)), (2, 2, 2), 25),
        (ClipSpec(64.0, 128, (336, 336)), (64, 24, 24), 1600),
        (ClipSpec(2.0, 0, None), None, 50),
    ],
)
def test_tokens_follow_from_the_size_whatever_the_caps(
    session: Session, preset: Any, spec: ClipSpec, grid: Any, n_audio: int
) -> None:
    shape = spec_shape(session.adapter, spec, preset)
    assert shape.video_grid == grid
    assert shape.n_audio == n_audio


def test_caps_decide_where_no_size_is_given(session: Session, preset: Any) -> None:
    shape = spec_shape(session.adapter, ClipSpec(4.0, 8, None), preset)
    assert preset.caps.min_per_grid <= shape.tokens_per_grid <= preset.caps.max_per_grid


@pytest.mark.parametrize("frames", [0, 8])
def test_the_prompt_has_as_much_text_as_was_asked_for(session: Session, preset: Any, frames: int) -> None:
    for wanted in (25, 40, 333):
        item = Item(ClipSpec(4.0, frames, (56, 56), text_tokens=wanted))
        with item.opened(session.adapter, preset) as (_, shape):
            assert item.prompt(session.adapter, shape).layout.n_text == wanted
            with pytest.raises(UsageError, match="takes"):
                filler(session.adapter, shape, 3)


def test_a_clip_without_a_token_is_refused(session: Session, preset: Any) -> None:
    with pytest.raises(UsageError, match="become no token"):
        spec_shape(session.adapter, ClipSpec(0.01, 0, None), preset)


def test_the_usual_clip_on_cuda_is_that_of_the_published_timings() -> None:
    assert usual_spec("cuda") == ClipSpec(64.0, 128, (336, 336))
    assert usual_spec("cpu").seconds < 64


# ---- one run ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_stock_path_gives_the_logits_of_our_full_tokens(session: Session) -> None:
    item = Item(SPEC)
    stock = StockItem(session, item, WHOLE)
    found = session_logits(session, item)
    assert found.abs().max() > 1.0
    torch.testing.assert_close(stock.first_logits(), found, atol=1e-4, rtol=0)
    result = stock.time(3)
    assert len(result.token_ids) == 3
    assert result.token_ids[0] == int(found.argmax())
    assert {"encode_video", "encode_audio", "prefill", "per_token", "whole"} <= set(result.seconds)
    assert 0 < result.seconds["first_token"] < result.seconds["whole"]


def session_logits(session: Session, item: Item) -> torch.Tensor:
    """Our own prefill's logits on all tokens."""
    from seats_cli.engine.prefill import prefill
    from seats_cli.lab.bench_runs import _select, setup_of
    from seats_cli.measure.clock import Stopwatch
    from seats_cli.selection.methods import find_method

    setup = setup_of(session, WHOLE)
    with item.opened(session.adapter, setup.preset) as (source, shape):
        prompt = item.prompt(session.adapter, shape)
        plan, given = _select(session.adapter, setup, WHOLE, source, prompt, shape, Stopwatch())
    return prefill(session.adapter, find_method("full"), plan, given.embeddings, given.layout).logits


@torch.inference_mode()
def test_a_run_makes_exactly_the_tokens_asked_for_and_times_every_stage(session: Session) -> None:
    result = run_row(session, Item(SPEC), Setting("seats", 0.5), 7)
    assert len(result.token_ids) == 7
    assert set(TIMES) - set(result.seconds) == {"prefill_device"}  # there is no CUDA device here
    spent = result.seconds
    stages = ("encode_video", "encode_audio", "select", "prefill", "generate")
    assert spent["answer"] == pytest.approx(sum(spent[name] for name in stages))
    assert spent["select_prefill"] == pytest.approx(spent["select"] + spent["prefill"])
    assert spent["first_token"] < spent["whole"]
    assert result.facts is not None
    assert result.facts.retention == pytest.approx(0.5, abs=0.05)
    assert not result.facts.beyond_context


@torch.inference_mode()
def test_a_ratio_of_one_costs_what_full_costs(session: Session) -> None:
    full = run_row(session, Item(SPEC), WHOLE, 2)
    one = run_row(session, Item(SPEC), Setting("seats", 1.0), 2)
    assert one.facts == full.facts
    assert one.token_ids == full.token_ids
    assert full.facts is not None
    assert full.facts.retention == 1.0
    assert len(set(full.facts.per_layer)) == 1


@pytest.mark.parametrize(
    "setting", [WHOLE, Setting("seats", 0.3), Setting("fastv", 0.5)], ids=lambda s: s.name
)
@torch.inference_mode()
def test_the_formulas_count_what_pytorch_counts(family_path: Path, setting: Setting) -> None:
    """Also of a mixture, whose experts are grouped products; FastV cuts too early for Qwen3-Omni."""
    session = Session(ModelOptions(str(family_path), device="cpu", dtype="float32"))
    if setting.method == "fastv" and session.adapter.geometry.deepstack_layers:
        with pytest.raises(PlanError, match=r"after layer 1: .*deepstack"):
            count_flops(session, Item(SPEC), setting)
        return
    counted, formula = count_flops(session, Item(SPEC), setting)
    assert counted == pytest.approx(formula, rel=0.01)
    assert counted > 10**6


@torch.inference_mode()
def test_qwen3s_stock_path_says_what_ours_says(qwen3_path: Path) -> None:
    session = Session(ModelOptions(str(qwen3_path), device="cpu", dtype="float32", compile=False))
    for spec in (SPEC, ClipSpec(seconds=4.0, frames=0, size=None)):
        stock = StockItem(session, Item(spec), WHOLE).time(3)
        ours = run_row(session, Item(spec), WHOLE, 3)
        assert stock.token_ids == ours.token_ids
        assert int(StockItem(session, Item(spec), WHOLE).first_logits().argmax()) == ours.token_ids[0]
        assert {"encode_video", "encode_audio", "prefill", "per_token"} <= set(stock.seconds)


# ---- the rounds -------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the rows in the order that they ran; each run takes as many seconds as it is late."""
    names: list[str] = []
    facts = {}

    def run(session: Session, item: Item, setting: Setting, n_tokens: int, *, now: Any) -> RunResult:
        names.append(setting.name)
        if setting not in facts:
            with torch.inference_mode():
                facts[setting] = run_row(session, item, setting, 1).facts
        value = float(len(names))
        return RunResult(
            {"prefill": value, "select_prefill": value, "whole": 2 * value}, None, [1], facts[setting]
        )

    monkeypatch.setattr(benchmark, "run_row", run)
    return names


def test_rows_take_turns_after_the_warm_up(session: Session, log: list[str]) -> None:
    settings = expand(["seats", "random"], [0.5, 0.2])
    bench, progress = Bench([Item(SPEC)]), []
    measure(
        bench, lambda _: session, ModelOptions(), settings, BenchOptions(repeats=3, warmup=2),
        Watcher(progress=lambda done, total: progress.append((done, total))),
    )  # fmt: skip
    names = [setting.name for setting in settings]
    assert names[0] == "full at 1"
    assert log == names * 5
    assert [len(row.runs) for row in bench.rows] == [3] * 5
    assert [[order for _, order, _ in row.runs] for row in bench.rows] == [
        [k, k + 5, k + 10] for k in range(5)
    ]
    assert progress[0] == (0, 25)
    assert progress[-1] == (25, 25)
    assert bench.complete


def test_the_numbers_of_a_row_follow_from_its_samples(session: Session, log: list[str]) -> None:
    bench = Bench([Item(SPEC)])
    measure(
        bench, lambda _: session, ModelOptions(), expand(["seats"], [0.5]), BenchOptions(repeats=4, warmup=1)
    )
    found = document(bench, session, {})
    full, seats = found["rows"]
    assert [sample["prefill"] for sample in full["samples"]] == [3, 5, 7, 9]
    assert full["seconds"]["prefill"] == {"median": 6, "low": 4.5, "high": 7.5, "spread": 0.5}
    assert seats["seconds"]["prefill"]["median"] == 7
    assert full["speedup"] == 1.0
    assert seats["speedup"] == pytest.approx(6 / 7)
    limit = full["compute"]["flops"] / seats["compute"]["flops"]
    assert seats["compute"]["limit"] == pytest.approx(limit)
    assert seats["fraction_of_limit"] == pytest.approx(6 / 7 / limit)
    assert seats["seconds"]["encode_video"] is None
    assert found["input"]["items"][0]["tokens"]["video"] == 24


@pytest.mark.parametrize(
    ("values", "median", "low", "high"),
    [([3.0], 3, 3, 3), ([4.0, 2.0], 3, 2.5, 3.5), ([1.0, 9.0, 2.0], 2, 1.5, 5.5)],
)
def test_medians_and_quartiles(values: list[float], median: float, low: float, high: float) -> None:
    found = summary([*values, None])
    assert found is not None
    assert (found["median"], found["low"], found["high"]) == (median, low, high)
    assert summary([None]) is None


def test_a_row_that_does_not_fit_ends_neither_the_round_nor_the_sweep(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = benchmark.run_row, []

    def run(session: Session, item: Item, setting: Setting, n_tokens: int, **more: Any) -> RunResult:
        assert isinstance(item.source, ClipSpec)
        if setting.method == "full" and item.source.seconds > 4:
            raise torch.OutOfMemoryError("CUDA out of memory: 80 GiB")
        if setting.method == "random":
            raise PlanError("cannot be met", hint="raise --ratio")
        return real(session, item, setting, n_tokens, **more)

    monkeypatch.setattr(benchmark, "run_row", run)
    bench = Bench([Item(SPEC), Item(ClipSpec(6.0, 12, (56, 56)))])
    measure(
        bench, lambda _: session, ModelOptions(), expand(["seats", "random"], [0.5]),
        BenchOptions(repeats=2, warmup=1, new_tokens=2, check_flops=True), Watcher(failed=failed.append),
    )  # fmt: skip
    rows = document(bench, session, {}, {"key": "seconds", "values": [4, 6]})["rows"]
    assert [len(row["samples"]) for row in rows] == [2, 2, 0, 0, 2, 0]
    assert [row.setting.method for row in failed] == ["random", "full", "random"]
    assert isinstance(bench.rows[3].error, DeviceError)
    assert rows[2]["error"] == {"kind": "plan", "message": "cannot be met", "hint": "raise --ratio"}
    assert rows[1]["speedup"] is not None
    assert rows[4]["speedup"] is None  # nothing to compare with
    assert rows[4]["flop_check"]["relative_difference"] == pytest.approx(0, abs=0.01)
    assert rows[3]["flop_check"] is None
    assert len(as_csv({"rows": rows, **_outer(bench, session)}).splitlines()) == 7


def _outer(bench: Bench, session: Session) -> dict[str, Any]:
    found = document(bench, session, {})
    return {"input": found["input"], "environment": found["environment"]}


def test_what_no_input_would_help_ends_the_run(session: Session) -> None:
    bench = Bench([Item(ClipSpec(4.0, 8, (56, 56), text_tokens=2))])
    with pytest.raises(UsageError, match="--text-tokens 2"):
        measure(bench, lambda _: session, ModelOptions(), expand(["full"], [1.0]), BenchOptions())


def test_the_stock_rows_come_first_and_are_compared(session: Session) -> None:
    bench, order = Bench([Item(SPEC)]), []
    options = BenchOptions(repeats=2, warmup=1, new_tokens=2, against_stock=True)
    measure(
        bench,
        lambda model: order.append(model) or session,
        ModelOptions("x"),
        expand(["seats"], [0.5]),
        options,
    )
    assert order == [ModelOptions("x", compile=False, graphs=False), ModelOptions("x")]
    assert [(row.engine, len(row.runs)) for row in bench.rows] == [(STOCK, 2), ("seats", 2), ("seats", 2)]
    assert [number for _, number, _ in bench.rows[0].runs] == [0, 1]
    stock, full, seats = document(bench, session, {})["rows"]
    assert stock["over_transformers"] is None
    assert set(seats["over_transformers"]) == {
        "encode_video", "encode_audio", "select_prefill", "per_token", "answer",
    }  # fmt: skip
    ratio = stock["seconds"]["answer"]["median"] / full["seconds"]["answer"]["median"]
    assert full["over_transformers"]["answer"] == pytest.approx(ratio)


def test_fast_paths_are_off_for_the_stock_rows_where_there_are_such() -> None:
    assert unaltered(ModelOptions("x", dtype="float32")).model == "x"
    for name in benchmark.FAST_PATHS:
        assert not getattr(unaltered(ModelOptions("x")), name, False)


def test_what_fast_paths_alter_is_loaded_after_the_stock_rows(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "FAST_PATHS", ("offline",))  # any field that is on
    events: list[Any] = []
    monkeypatch.setattr(benchmark, "measure_stock", lambda *_: events.append("stock"))
    monkeypatch.setattr(benchmark, "measure_rows", lambda *_: events.append("ours"))

    def open_session(model: ModelOptions) -> Session:
        events.append(model.offline)
        return session

    for against in (True, False):
        options = BenchOptions(against_stock=against)
        measure(Bench([Item(SPEC)]), open_session, ModelOptions(offline=True), (WHOLE,), options)
    assert events == [False, "stock", True, "ours", True, "ours"]


def test_an_interruption_leaves_what_is_done(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = benchmark.run_row, []

    def run(*given: Any, **more: Any) -> RunResult:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(benchmark, "run_row", run)
    bench = Bench([Item(SPEC), Item(SPEC)])
    options = BenchOptions(repeats=2, warmup=1, new_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        measure(bench, lambda _: session, ModelOptions(), expand(["seats"], [0.5]), options)
    rows: list[Row] = bench.rows
    assert [len(row.runs) for row in rows] == [1, 0]
    found = document(bench, session, {})
    assert not found["complete"]
    assert [row["method"] for row in found["rows"]] == ["full"]
