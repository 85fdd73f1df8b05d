"""Every case of the golden folder (SEATS_GOLDEN, default tests/golden), made by the published code."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seats_cli.measure.compute import LanguageGeometry, prefill_flops
from seats_cli.selection.budget import choose_in_layer
from seats_cli.selection.diversity import choose_diverse
from seats_cli.selection.layout import TokenLayout
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.schedule import effective_drops, keep_ratios

GOLDEN = Path(os.environ.get("SEATS_GOLDEN") or Path(__file__).parents[1] / "golden")
PUBLISHED = SelectionOptions(window_relevance="raw", budgets="published", tau=0.1)


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """Every array of a golden file, {} where it is missing (test_all_is_there then fails)."""
    path = GOLDEN / name
    return dict(np.load(path)) if path.is_file() else {}


@cache
def document() -> dict[str, Any]:
    path = GOLDEN / "schedule_and_flops.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def cases(name: str) -> list[str]:
    """The cases of an npz file: what stands before the first dot of its keys."""
    return sorted({key.split(".", 1)[0] for key in arrays(name)}, key=lambda case: (len(case), case))


def numbered(name: str) -> list[Any]:
    return [pytest.param(case, id=str(index)) for index, case in enumerate(document().get(name, []))]


def test_all_is_there() -> None:
    found = {
        "stage1_diversity.npz": len(cases("stage1_diversity.npz")),
        "stage2_budget.npz": len(cases("stage2_budget.npz")),
        "schedules": len(document().get("schedules", [])),
        "macs": len(document().get("macs", [])),
    }
    assert all(found.values()), f"golden cases missing in {GOLDEN}: {found}"


@pytest.mark.parametrize("case", cases("stage1_diversity.npz"))
def test_stage_one(case: str) -> None:
    data = arrays("stage1_diversity.npz")
    saliency = data.get(f"{case}.saliency")
    keep = choose_diverse(
        torch.from_numpy(data[f"{case}.features"]),
        None if saliency is None else torch.from_numpy(saliency),
        int(data[f"{case}.k"]),
    )
    np.testing.assert_array_equal(keep.numpy(), data[f"{case}.keep"])


@pytest.mark.parametrize("case", cases("stage2_budget.npz"))
def test_stage_two(case: str) -> None:
    data = arrays("stage2_budget.npz")
    kind = torch.from_numpy(data[f"{case}.kind"])
    window = torch.from_numpy(data[f"{case}.window"])
    n_tokens = len(kind)
    text, video, audio = torch.bincount(kind.long(), minlength=3).tolist()
    layout = TokenLayout(
        kind,
        window,
        torch.zeros(3, n_tokens, dtype=torch.int64),
        torch.zeros(n_tokens),
        (text, video, audio),
    )
    keep_video, keep_audio = data[f"{case}.keep_ratio"].tolist()
    scores = torch.from_numpy(data[f"{case}.score"])
    mask = choose_in_layer(scores, layout, keep_video, keep_audio, int(window.max()) + 1, PUBLISHED)
    np.testing.assert_array_equal(mask.numpy(), data[f"{case}.keep"])


@pytest.mark.parametrize("case", numbered("schedules"))
@pytest.mark.parametrize("kind", ["video", "audio"])
def test_schedule(case: dict[str, Any], kind: str) -> None:
    retention = case[f"{kind}_ratio"]
    drop_layers, late_layer = case["drop_layers"], case["late_layer"]
    entry = min(1.0, case["entry_scale"] * retention)
    found = keep_ratios(retention, entry, case["num_layers"], tuple(drop_layers), late_layer)
    n_effective = len(effective_drops(drop_layers, late_layer))
    # drop layers that come too late to drop anything have no ratio of ours
    assert found == pytest.approx(case[f"{kind}_keep"][:n_effective], abs=1e-4 + 1e-9)
    assert len(found) == n_effective


@pytest.mark.parametrize("case", numbered("macs"))
def test_macs(case: dict[str, Any]) -> None:
    n_layers, n_heads = case["num_layers"], case["num_heads"]
    geometry = LanguageGeometry(
        n_layers=n_layers,
        hidden=case["hidden_size"],
        n_heads=n_heads,
        n_kv_heads=case["num_kv_heads"],
        head_dim=case["hidden_size"] // n_heads,
        mlp=case["intermediate_size"],
        vocab=case["vocab_size"],
    )
    lengths, length = [], case["sequence_length"]
    left_after = dict(case["drop_events"])  # these count layers from 0
    for layer in range(n_layers):
        lengths.append(length)
        length = left_after.get(layer, length)
    # the published code counts in floats
    assert float(prefill_flops(lengths, geometry, head_tokens=length)) == case["macs"]
