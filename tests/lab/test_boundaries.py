"""Where layers stop reading the clip, and the preset that is written from it."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lab.tracing import document
from seats_cli.errors import UsageError
from seats_cli.lab.boundaries import Boundaries, blocks_of, drop_layers, never_falling, propose
from seats_cli.lab.preset_file import (
    base_preset,
    trace_provenance,
    traced_preset,
    write_traced,
)
from seats_cli.presets import (
    CalibratedDrop,
    CalibratedRow,
    Schedule,
    load_preset,
    schedule_by_rule,
)
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts
from seats_cli.selection.planning import staged_plan

LIKE = Schedule((8, 9, 10), 12, 1.4, 0.1)


def test_the_three_blocks_of_a_curve() -> None:
    curve = [0.1, 0.1, 0.12, 0.2, 0.4, 0.6, 0.75, 0.85, 0.89, 0.895, 0.9, 0.9, 0.9, 0.9]
    found = propose(document(curve))
    assert (found.shallow_end, found.late_layer) == (5, 9)  # 0.5 is half of the way; 0.89 is within 0.01
    assert found.drop_layers == (6, 7)
    assert found.notes == ()
    assert blocks_of(found, 14) == [("shallow", 1, 5), ("middle", 6, 8), ("late", 9, 14)]
    assert propose(document(curve), 0.05).late_layer == 8
    assert propose(document(curve), 0.0).late_layer == 11


@pytest.mark.parametrize(("n_layers", "late"), [(28, 24), (48, 40), (36, 30)])
def test_half_of_the_depth_gives_the_published_drop_layers(n_layers: int, late: int) -> None:
    rule = schedule_by_rule(n_layers, LIKE)
    assert rule.late_layer == late
    assert drop_layers(n_layers // 2, late, n_layers) == rule.drop_layers


def test_drop_layers_fit_between_the_blocks() -> None:
    for n_layers in (2, 5, 14, 36):
        for shallow in range(1, n_layers + 1):
            for late in [*range(shallow + 1, n_layers + 1), None]:
                last = n_layers if late is None else late - 1
                found = drop_layers(shallow, late, n_layers)
                assert list(found) == sorted(set(found))
                assert len(found) == min(3, max(0, last - shallow - 1))
                assert all(shallow < layer < last for layer in found)


def test_never_falling_is_the_nearest_that_never_falls() -> None:
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.random() for _ in range(6)]
        found = never_falling(values)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
        distance = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
        for _ in range(200):  # no other rising sequence is nearer
            other = sorted(rng.random() for _ in range(6))
            assert distance <= sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) + 1e-12


def test_one_noisy_point_decides_nothing() -> None:
    curve = [0.1] * 5 + [0.9] * 9
    lucky = [*curve[:1], 0.9, *curve[2:]]  # by chance, nothing is lost from layer 2 on
    assert propose(document(lucky)).late_layer == propose(document(curve)).late_layer == 6
    assert propose(document(lucky)).shallow_end == 5
    unlucky = [*curve[:12], 0.87, curve[13]]
    assert propose(document(unlucky), 0.02).late_layer == 6
    assert propose(document(unlucky)).late_layer == 6  # smoothed over its neighbours, 0.004 is missing


def test_a_curve_that_never_recovers_has_no_late_layer() -> None:
    found = propose(document([0.1 + 0.05 * layer for layer in range(14)]))
    assert found.late_layer is None
    assert found.notes == (
        "removing all tokens costs more than 0.01 accuracy even from layer 14 on: no late layer",
    )
    assert found.drop_layers[-1] < 14
    assert [name for name, *_ in blocks_of(found, 14)] == ["shallow", "middle"]
    steep = propose(document([0.1] * 14))
    assert (steep.shallow_end, steep.late_layer, steep.drop_layers) == (14, None, ())
    assert steep.schedule(14, LIKE).entry_scale == 1.0  # what enters stays


def test_answers_that_need_no_clip_tell_nothing() -> None:
    for curve in ([0.895] * 14, [0.95, *[0.9] * 13]):
        found = propose(document(curve))
        assert (found.shallow_end, found.late_layer, found.drop_layers) == (None, None, ())
        assert "do not need the clip" in found.notes[0]
        assert blocks_of(found, 14) == []
        with pytest.raises(UsageError, match="no schedule in this trace: removing every token costs"):
            found.schedule(14, LIKE)


def test_a_tolerance_beyond_half_of_the_loss_leaves_no_middle() -> None:
    found = propose(document([0.885, 0.891, 0.891, *[0.9] * 11]), 0.01)
    assert (found.shallow_end, found.late_layer, found.drop_layers) == (1, 2, ())


def test_layers_between_those_traced_are_not_guessed() -> None:
    found = propose(document({1: 0.1, 4: 0.2, 8: 0.9, 12: 0.9}, n_layers=14))
    assert (found.shallow_end, found.late_layer) == (7, 8)
    assert "the late layer and the shallow end may lie earlier" in found.notes[0]
    early = propose(document({1: 0.1, 3: 0.2, 4: 0.6}, n_layers=14))
    assert (early.shallow_end, early.late_layer) == (3, None)
    assert early.notes[0].endswith("even from layer 4 on: no late layer among those traced")
    assert propose(document({1: 0.1, 7: 0.2, 8: 0.9, 12: 0.9}, n_layers=14)).notes == ()


def test_without_answers_the_curve_is_agreement() -> None:
    found = propose(document([0.1] * 7 + [1.0] * 7, full=1.0, measure="agreement"))
    assert (found.measure, found.late_layer) == ("agreement", 8)


def test_without_a_removal_curve_there_is_nothing_to_see() -> None:
    with pytest.raises(UsageError, match="no removal curve"):
        propose(document([0.1] * 14, removal=[]))


def test_every_proposal_can_be_planned_with() -> None:
    base, counts = load_preset("tiny"), ClipCounts(1024, 400, 64, 8, 30)
    for shallow in range(1, 15):
        for late in [*range(shallow + 1, 15), None]:
            drops = drop_layers(shallow, late, 14)
            schedule = Boundaries("accuracy", 0.01, shallow, late, drops, (), ()).schedule(14, base.schedule)
            options = SelectionOptions(schedule="paper", entry_scale=schedule.entry_scale)
            for ratio in (0.05, 0.1, 0.35):
                plan = staged_plan("seats", replace(base, schedule=schedule), ratio, counts, options)
                # whole tokens a window: up to 6% off at the lowest ratio
                assert plan.expected_retention == pytest.approx(ratio, rel=0.06), schedule


# ---- the preset -----------------------------------------------------------------------------------------

CURVE = [0.1, 0.1, 0.12, 0.2, 0.4, 0.6, 0.75, 0.85, 0.89, 0.895, 0.9, 0.9, 0.9, 0.9]


def test_a_written_preset_is_the_proposal_and_the_rest_of_its_base(tmp_path: Path) -> None:
    trace = document(CURVE)
    found, base = propose(trace), load_preset("tiny")
    assert base_preset(trace) is base
    schedule = found.schedule(14, base.schedule)
    path = tmp_path / "mine.yaml"
    loaded = write_traced(
        path, traced_preset(trace, base, schedule, provenance=trace_provenance(trace, found))
    )
    assert loaded == load_preset(path)
    assert loaded.status == "calibrated"
    assert loaded.schedule == schedule == Schedule((6, 7), 9, 1.75, 0.1)
    for same in ("name", "checkpoint", "match", "windows", "ratio_table", "caps", "options", "geometry"):
        assert getattr(loaded, same) == getattr(base, same)
    assert loaded.calibrated == ()
    said = loaded.provenance
    assert said["command"] == "seats trace"
    assert said["date"] == "2026-01-02"
    assert said["model"] == "tiny, float32, test CPU"
    assert said["measure"] == "accuracy, tolerance 0.01"
    assert "40 questions, 4 clips" in said["schedule"]
    assert said["seats"] == "0"
    assert said["tokens"] == base.provenance["tokens"]
    assert path.read_text().startswith("# Written by `seats trace`; use it as --preset mine.yaml.")


def test_a_preset_with_calibrated_rows_and_geometry(tmp_path: Path) -> None:
    model = {"name": "/models/my-3b", "model_type": "qwen2_5_omni", "layers": 36, "hidden_size": 2048}
    trace = document([0.1] * 20 + [0.9] * 16, model=model)
    base = base_preset(trace)
    assert base.name == "qwen2.5-omni-3b"
    rows = [
        CalibratedRow(0.1, 0.06, 0.35, 21, ()),
        CalibratedRow(0.35, 0.3, 0.65, None, (CalibratedDrop(12, 0.5, 1.0), CalibratedDrop(20, 0.25, 0.0))),
    ]
    schedule = propose(trace).schedule(36, base.schedule)
    loaded = write_traced(
        tmp_path / "p.yaml", traced_preset(trace, base, schedule, rows, {"calibrated": "by hand"})
    )
    assert loaded.calibrated == tuple(rows)
    assert loaded.calibrated[0].drops == ()
    assert (loaded.name, loaded.checkpoint) == (
        "my-3b",
        "",
    )  # another's weights are not the base's checkpoint
    assert loaded.geometry == base.geometry
    assert loaded.provenance["calibrated"] == "by hand"
    assert "geometry" in loaded.provenance


def test_a_checkpoint_that_no_preset_is_for(tmp_path: Path) -> None:
    model = {"name": "/models/own", "model_type": "qwen2_5_omni", "layers": 6, "hidden_size": 64}
    trace = document([0.1, 0.1, 0.2, 0.9, 0.9, 0.9], model=model)
    base = base_preset(trace)
    assert base.status == "by rule"
    schedule = propose(trace).schedule(6, base.schedule)
    loaded = write_traced(tmp_path / "p.yaml", traced_preset(trace, base, schedule))
    assert (loaded.name, loaded.checkpoint) == ("own", "")
    assert (loaded.match.n_layers, loaded.match.hidden_size) == (6, 64)
    assert loaded.schedule.late_layer == 4


def test_the_preset_that_was_traced_with_is_the_base(tmp_path: Path) -> None:
    trace = document(CURVE)
    shipped = load_preset("tiny")
    wide = traced_preset(trace, shipped, Schedule((3,), 9, 1.75, 0.3))
    wide = replace(wide, windows=replace(wide.windows, video_grids=4))
    path = tmp_path / "wide.yaml"
    write_traced(path, wide)
    asked = document(CURVE, options={"preset": str(path)})
    assert base_preset(asked).windows.video_grids == 4
    path.unlink()
    with pytest.raises(UsageError, match=r"made with cannot be read: .*wide\.yaml"):
        base_preset(asked)
    path.write_text("kind: style\nname: tiny\noptions: {}\n")
    was_other = document(CURVE, options={"preset": str(path)}, model={**trace["model"], "preset": "wide"})
    with pytest.raises(UsageError, match=r"model preset 'wide', and .* is none any more"):
        base_preset(was_other)
    assert base_preset(document(CURVE, options={"preset": "paper"})) == shipped  # a style is no model's


def test_a_schedule_that_was_not_found_is_not_said_to_be_measured() -> None:
    trace = document([0.9] * 14)
    found, base = propose(trace), load_preset("tiny")
    assert not found.found
    made = traced_preset(trace, base, base.schedule, provenance=trace_provenance(trace, found))
    assert made.schedule == base.schedule
    assert made.provenance["schedule"] == base.provenance["schedule"]
    assert "do not need the clip" in made.provenance["notes"]


def test_a_preset_that_cannot_be_written(tmp_path: Path) -> None:
    preset = traced_preset(document(CURVE), load_preset("tiny"), LIKE)
    with pytest.raises(UsageError, match="cannot write"):
        write_traced(tmp_path / "none" / "p.yaml", preset)
