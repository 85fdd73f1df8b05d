"""Which settings a sweep runs: each different one once, and nothing that makes no difference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seats_cli import presets
from seats_cli.errors import UsageError
from seats_cli.lab.settings import PRESET, READS, Setting, expand
from seats_cli.presets import CalibratedRow, load_preset
from seats_cli.selection.contract import MediaTokens
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO, TokenLayout
from seats_cli.selection.methods import METHODS
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import ClipCounts, Plan

FULL = Setting("full", 1.0)


def test_full_runs_first_and_once_then_ratio_by_ratio() -> None:
    rows = expand(["full", "seats", "fixed"], [0.35, 0.1])
    assert rows == (
        FULL,
        Setting("seats", 0.35),
        Setting("fixed", 0.35),
        Setting("seats", 0.1),
        Setting("fixed", 0.1),
    )
    assert expand(["seats"], [0.1]) == (FULL, Setting("seats", 0.1))
    assert expand(["full"], [0.35, 0.1]) == (FULL,)


def test_a_ratio_of_one_is_full() -> None:
    assert expand(["seats", "random"], [1.0, 0.5]) == (FULL, Setting("seats", 0.5), Setting("random", 0.5))


def test_every_combination_is_a_variant_of_the_methods_that_it_matters_to() -> None:
    rows = expand(
        ["seats", "fixed", "random"],
        [0.1],
        vary={"merge": ["off", "on"], "decode_cache": ["text", "layerwise"]},
    )
    by_method = {
        name: [row.settings for row in rows if row.method == name] for name in ("seats", "fixed", "random")
    }
    assert len(by_method["seats"]) == len(set(by_method["seats"])) == 4
    assert by_method["fixed"] == [(("merge", "off"),), (("merge", "on"),)]
    assert by_method["random"] == [()]
    assert [row.value("merge") for row in rows] == [None, "off", "off", "on", "on", "off", "on", None]


def test_settings_that_say_nothing_to_a_method_are_left_out() -> None:
    rows = expand(["seats", "fixed", "fastv"], [0.1], settings={"tau": "0.2", "decode_cache": "text"})
    assert [row.settings for row in rows] == [
        (),
        (("decode_cache", "text"), ("tau", "0.2")),
        (),
        (("decode_cache", "text"),),
    ]


def test_an_entry_scale_takes_the_paper_s_split_along_for_the_others() -> None:
    rows = expand(["seats", "fixed"], [0.1], vary={"entry_scale": ["1.4", "1.8"]})
    assert [row.settings for row in rows if row.method == "fixed"] == [(("schedule", "paper"),)]
    rows = expand(["fixed"], [0.1], settings={"entry_scale": "1.8", "schedule": "auto"})
    assert rows[1].settings == (("schedule", "paper"),)  # "auto" comes to it as where nothing is said
    rows = expand(["fixed"], [0.1], settings={"entry_scale": "1.8", "schedule": "calibrated"})
    assert rows[1].settings == (("schedule", "calibrated"),)
    rows = expand(["fixed"], [0.1], settings={"schedule": "auto"})
    assert rows[1].settings == (("schedule", "auto"),)


def test_presets_vary_too(tmp_path: Path) -> None:
    style = tmp_path / "mine.yaml"
    style.write_text("kind: style\nname: mine\noptions: {merge: 'on'}\n")
    rows = expand(["seats", "fixed", "random"], [0.1], vary={PRESET: ["paper", str(style)]})
    found = {
        name: [r.preset for r in rows if r.method == name] for name in ("full", "seats", "fixed", "random")
    }
    assert found == {
        "full": [None],
        "seats": ["paper", str(style)],
        "fixed": ["paper", str(style)],
        "random": ["paper", None],  # it shares the schedule's split of the ratio, and merges nothing
    }
    assert (
        expand(["random"], [0.1], preset="tiny")[0].preset == "tiny"
    )  # a model's preset has caps: for full too


def test_presets_with_other_caps_are_not_compared(tmp_path: Path) -> None:
    shipped = (Path(presets.__file__).parent / "tiny.yaml").read_text()
    caps = load_preset("tiny").caps
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(shipped)
    changed = shipped.replace(f"total: {caps.total}", f"total: {caps.total + 1}")
    assert changed != shipped
    other.write_text(changed)
    assert len(expand(["seats"], [0.1], vary={PRESET: ["tiny", str(same), "paper"]})) == 4
    with pytest.raises(UsageError, match=r"other\.yaml has other token caps") as raised:
        expand(["seats"], [0.1], vary={PRESET: ["paper", "tiny", str(other)]})
    assert raised.value.hint is not None
    assert "--preset" in raised.value.hint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vary": {"colour": ["red"]}}, "colour"),
        ({"vary": {"merge": ["on", "maybe"]}}, "merge=maybe"),
        ({"vary": {"preset": ["paper", "nope"]}}, "nope"),
        ({"preset": "nope"}, "nope"),
        ({"settings": {"tau": "-1"}}, "tau=-1"),
        ({"settings": {"merge": "on"}, "vary": {"merge": ["on"]}}, "both fixed and varied"),
        ({"preset": "paper", "vary": {"preset": ["paper"]}}, "both fixed and varied"),
    ],
)
def test_what_does_not_exist_is_a_usage_error(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand(["seats"], [0.1], **wrong)


# ---- READS says which settings change what a method does ---------------------------------------------------

OTHER_VALUES = {
    "schedule": "paper",
    "window_relevance": "raw",
    "merge": False,
    "budgets": "published",
    "tau": 3.0,
    "entry_scale": 1.45,
}
TINY = replace(
    load_preset("tiny"),
    calibrated=(CalibratedRow(ratio=0.25, video=0.15, audio=0.5, late_layer=10, drops=()),),
)
COUNTS = ClipCounts(n_video=512, n_audio=200, tokens_per_grid=64, n_windows=4, n_text=8)


def _picks(method_name: str, options: SelectionOptions) -> list[torch.Tensor]:
    """What a method keeps of a random clip at each point, and the plan's cuts."""
    method = METHODS[method_name]
    plan: Plan = method.plan(TINY, 0.25, COUNTS, options)
    kinds = torch.tensor([TEXT] * 3 + ([VIDEO] * 128 + [AUDIO] * 50) * 4 + [TEXT] * 5, dtype=torch.int8)
    windows = torch.tensor([-1] * 3 + [w for w in range(4) for _ in range(178)] + [-1] * 5, dtype=torch.int32)
    places = torch.arange(len(kinds)).expand(3, -1)
    layout = TokenLayout(kinds, windows, places, torch.zeros(len(kinds)), (8, 512, 200))
    generator = torch.Generator().manual_seed(0)
    tokens = {}
    for kind, code in (("video", VIDEO), ("audio", AUDIO)):
        rows = layout.subset((kinds == code).nonzero().squeeze(1))
        embeddings = torch.randn(len(rows), 16, generator=generator)
        tokens[kind] = MediaTokens(kind, embeddings, torch.rand(len(rows), generator=generator), 0, rows)
    found, enters = [torch.tensor(plan.cut_layers)], kinds == TEXT
    for kind, code in (("video", VIDEO), ("audio", AUDIO)):
        other = tokens["audio" if kind == "video" else "video"]
        kept = method.before_llm(replace(tokens[kind], other=other), plan)
        enters[(kinds == code).nonzero().squeeze(1)[kept.indices]] = True
        found += [kept.indices, kept.embeddings]
    layout = layout.subset(enters.nonzero().squeeze(1))
    for layer in plan.cut_layers:
        scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(layer)) ** 8
        drop = method.after_layer(layer, scores, layout, plan)
        found.append(drop.keep)
        layout = layout.subset(drop.keep, drop.counts)
    return found


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_is_said_not_to_read_changes_nothing(name: str) -> None:
    before = _picks(name, SelectionOptions())
    for key, value in OTHER_VALUES.items():
        changes = not _same(before, _picks(name, replace(SelectionOptions(), **{key: value})))
        if name in READS:
            assert changes == (key in READS[name]), key
    if name in READS and "decode_cache" not in READS[name]:  # read by the engine where a cut is made inside
        assert before[0].numel() == 0


def test_seats_reads_everything() -> None:
    assert "seats" not in READS
    paper = replace(SelectionOptions(), schedule="paper")
    for key, value in OTHER_VALUES.items():
        if key != "schedule":
            assert not _same(_picks("seats", paper), _picks("seats", replace(paper, **{key: value}))), key
