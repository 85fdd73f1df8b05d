"""Each baseline's own idea, against the obvious slow form of it."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slow
import slow_baselines
from clips import DEFAULT, OMNI_7B, clip
from layouts import make_layout
from runs import media_of, run
from seats_cli.errors import PlanError
from seats_cli.presets import Preset, load_preset
from seats_cli.selection.baselines.divprune import choose_spread
from seats_cli.selection.baselines.dycoke import merge_runs
from seats_cli.selection.baselines.omnizip import heard, peak_score, rank_in_grids
from seats_cli.selection.baselines.random_draw import draw_lots
from seats_cli.selection.baselines.visionzip import zip_windows
from seats_cli.selection.diversity import choose_diverse
from seats_cli.selection.methods import METHODS
from seats_cli.selection.plan import ClipCounts, Plan

COUNTS = clip(n_grids=13, n_audio=330, tokens_per_grid=12)
PLAIN = ("fastv", "visionzip", "divprune")
TINY = replace(load_preset("tiny"), calibrated=())  # the split of the table, whatever was measured since


def plan_for(name: str, ratio: float = 0.25, preset: Preset = OMNI_7B, counts: ClipCounts = COUNTS) -> Plan:
    return METHODS[name].plan(preset, ratio, counts, DEFAULT)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- random -----------------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_lots_on_cuda_are_those_of_the_cpu_and_nobody_waits() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    draw_lots(4, "video", 0, cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lots = draw_lots(1000, "audio", 7, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(lots.cpu(), draw_lots(1000, "audio", 7, cpu))


def test_lots_are_each_drawn_once() -> None:
    lots = draw_lots(500, "video", 3, torch.device("cpu"))
    assert torch.equal(lots.sort().values, torch.arange(500))
    assert not torch.equal(lots, draw_lots(500, "audio", 3, torch.device("cpu")))


# --- plain forms and -om ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PLAIN)
def test_plain_forms_thin_the_audio_evenly_in_time(name: str) -> None:
    plan = plan_for(name)
    tokens = media_of(COUNTS, plan)["audio"]
    kept = METHODS[name].before_llm(tokens, plan)
    assert torch.equal(kept.embeddings, tokens.embeddings[kept.indices])
    start = 0
    for size, n_keep in plan.keeps_in("audio", 0, COUNTS.n_audio):
        inside = [int(i) - start for i in kept.indices if start <= i < start + size]
        start += size
        assert len(inside) == n_keep
        # the middles of n_keep equal stretches, rounded down
        assert inside == [int((i + 0.5) * size / n_keep) for i in range(n_keep)]


@pytest.mark.parametrize("name", PLAIN)
def test_om_forms_choose_the_video_as_the_plain_ones_do(name: str) -> None:
    plan, om = plan_for(name), plan_for(f"{name}-om")
    tokens = media_of(COUNTS, plan)
    plain, both = (METHODS[one].before_llm(tokens["video"], plan) for one in (name, f"{name}-om"))
    assert torch.equal(plain.indices, both.indices)
    assert om.retention_video == pytest.approx(plan.retention_video, rel=0.01)
    heard_plain, heard_om = (
        METHODS[one].before_llm(tokens["audio"], chosen) for one, chosen in ((name, plan), (f"{name}-om", om))
    )
    assert not torch.equal(heard_plain.indices, heard_om.indices)


# --- FastV ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["fastv", "fastv-om"])
def test_fastv_keeps_what_the_question_attends_to(name: str) -> None:
    plan = plan_for(name)
    before = plan.stages[0]
    layout = make_layout(
        [before.n_video // 7 + (i < before.n_video % 7) for i in range(7)],
        [before.n_audio // 7 + (i < before.n_audio % 7) for i in range(7)],
    )
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(2)).round(
        decimals=2
    )  # with ties
    drop = METHODS[name].after_layer(plan.cut_layers[0], scores, layout, plan)
    expected = [i for i, kind in enumerate(layout.kind.tolist()) if kind == 0]
    for code, n_keep in ((1, plan.stages[1].n_video), (2, plan.stages[1].n_audio)):
        of_kind = [i for i, kind in enumerate(layout.kind.tolist()) if kind == code]
        expected += [of_kind[i] for i in slow_baselines.best([float(scores[i]) for i in of_kind], n_keep)]
    assert drop.keep.tolist() == sorted(expected)
    assert drop.counts == (8, plan.stages[1].n_video, plan.stages[1].n_audio)


def test_fastv_lets_all_of_its_kinds_in_and_drops_once() -> None:
    for name in ("fastv", "fastv-om"):
        plan = plan_for(name, 0.35)
        assert plan.cut_layers == plan.score_layers == (2,)
        assert plan.notes == ()
        assert not plan.needs_saliency
        assert plan.stages[0].n_video == COUNTS.n_video
        assert (plan.stages[0].n_audio == COUNTS.n_audio) == (name == "fastv-om")
    assert plan_for("fastv", 0.35).stages[0].n_audio == plan_for("fastv", 0.35).stages[1].n_audio


def test_fastv_drops_after_layer_one_where_two_are_too_many() -> None:
    """On 14 layers the first two are 1/7, the first one 1/14 of everything."""
    counts = clip(n_grids=32, n_audio=800, tokens_per_grid=64)
    seats = [plan_for("seats", ratio, TINY, counts).retention_video for ratio in (0.15, 0.25)]
    assert 1 / 14 < seats[0] < 2 / 14 < seats[1]
    for name in ("fastv", "fastv-om"):
        assert plan_for(name, 0.25, TINY, counts).cut_layers == (2,)
        plan = plan_for(name, 0.15, TINY, counts)
        assert plan.cut_layers == (1,)
        assert "after layer 1, not 2" in plan.notes[0]
        assert plan.retention_video == pytest.approx(seats[0])
        lower = plan_for(name, 0.1, TINY, counts)  # here video takes from audio
        assert lower.retention_video > plan_for("seats", 0.1, TINY, counts).retention_video
        assert lower.stages[1].n_video == 1
        assert "instead of" in lower.notes[1]
        assert lower.expected_retention == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("name", ["fastv", "fastv-om"])
@pytest.mark.parametrize("counts", [COUNTS, clip(n_audio=0), clip(n_grids=2, n_audio=50)])
def test_fastv_says_when_the_first_layer_is_too_much(name: str, counts: ClipCounts) -> None:
    with pytest.raises(PlanError, match=r"layer 1, which alone is 1/28 of all layers") as caught:
        plan_for(name, 0.02, counts=counts)
    smallest = float(re.findall(r"allows is ([\d.e-]+)", caught.value.message)[0])
    plan_for(name, smallest, counts=counts)  # what the message says works
    with pytest.raises(PlanError):
        plan_for(name, 0.9 * smallest, counts=counts)


def test_fastv_without_video_is_the_audio_thinned() -> None:
    counts = clip(n_grids=0, n_audio=800)
    assert plan_for("fastv", 0.02, counts=counts).cut_layers == ()
    assert plan_for("fastv-om", 0.2, counts=counts).cut_layers == (2,)


# --- VisionZip --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_keep", [1, 3, 4, 13, 64, 90])
def test_visionzip_against_one_token_after_the_other(n_keep: int) -> None:
    embeddings = random(3, 90, 8)
    saliency = torch.rand(3, 90, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with ties
    keep, values = zip_windows(embeddings, saliency, n_keep)
    for window in range(3):
        expected = slow_baselines.visionzip(embeddings[window], saliency[window].tolist(), n_keep)
        assert keep[window].tolist() == list(expected)
        torch.testing.assert_close(values[window], torch.stack(list(expected.values())))


def test_visionzip_keeps_fifty_four_of_sixty_four_as_they_were() -> None:
    embeddings = random(1, 400, 8)
    saliency = torch.rand(1, 400, generator=torch.Generator().manual_seed(1))
    keep, values = zip_windows(embeddings, saliency, 64)
    untouched = (values[0] == embeddings[0][keep[0]]).all(dim=1)
    assert int(untouched.sum()) == 54
    assert set(saliency[0].topk(54).indices.tolist()) == set(keep[0][untouched].tolist())


def test_visionzip_puts_the_averages_where_their_targets_stood() -> None:
    """Over windows of several sizes and keeps, as they come from a clip."""
    counts = clip(n_grids=9, n_audio=0, tokens_per_grid=15)
    plan = plan_for("visionzip", 0.3, counts=counts)
    tokens = media_of(counts, plan)["video"]
    kept = METHODS["visionzip"].before_llm(tokens, plan)
    assert tokens.saliency is not None
    start = 0
    expected: dict[int, torch.Tensor] = {}
    for size, n_keep in plan.keeps_in("video", 0, counts.n_video):
        window = slice(start, start + size)
        one = slow_baselines.visionzip(tokens.embeddings[window], tokens.saliency[window].tolist(), n_keep)
        expected.update({start + index: value for index, value in one.items()})
        start += size
    assert kept.indices.tolist() == list(expected)
    torch.testing.assert_close(kept.embeddings, torch.stack(list(expected.values())))


# --- DivPrune ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_keep", [1, 2, 17, 60])
def test_divprune_with_and_without_the_whole_matrix(n_keep: int) -> None:
    embeddings = random(60, 8, seed=n_keep)
    expected = slow.greedy_max_min(
        1 - torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=2), n_keep
    )
    for at_most in (60 * 60, 60 * 7, 1):
        assert choose_spread(embeddings, n_keep, at_most).tolist() == expected
    assert choose_diverse(embeddings[None], None, n_keep)[0].tolist() == expected


@pytest.mark.parametrize("at_most", [30 * 30, 1])
def test_divprune_takes_no_token_twice(at_most: int) -> None:
    """Ten copies of each of three tokens: one of each first, then the copies that are left."""
    copies = random(3, 8).repeat(10, 1)
    assert (choose_spread(copies, 3, at_most) % 3).sort().values.tolist() == [0, 1, 2]
    assert len(set(choose_spread(copies, 20, at_most).tolist())) == 20


class LargestTensor(TorchDispatchMode):
    """Notes the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return made


def test_divprune_on_ten_thousand_tokens_stays_within_its_bound() -> None:
    embeddings = random(10_000, 16)
    with LargestTensor() as seen:
        keep = choose_spread(embeddings, 40, 2**21)
    assert seen.largest <= 2**21
    assert len(keep) == 40
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    chosen, drawn = unit[keep], unit[:40]

    def nearest(some: torch.Tensor) -> float:
        return float((some @ some.T - 2 * torch.eye(40)).max())

    assert nearest(chosen) < nearest(drawn) - 0.1


def test_divprune_looks_at_the_whole_clip() -> None:
    """A clip that shows one picture, but for its last grid: half of what is kept is there."""
    counts = clip(n_grids=10, n_audio=0, tokens_per_grid=20)
    plan = plan_for("divprune", 0.2, counts=counts)
    tokens = media_of(counts, plan)["video"]
    still = tokens.embeddings[:20].repeat(10, 1) + 1e-3 * tokens.embeddings
    still[180:] = tokens.embeddings[180:]
    kept = METHODS["divprune"].before_llm(replace(tokens, embeddings=still), plan)
    assert len(kept.indices) == 40
    assert int((kept.indices >= 180).sum()) == 20


# --- DyCoke -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n_tokens", "stride"), [(60, 12), (60, 1), (7, 12), (1, 4), (65, 12)])
@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.95, 1.0])
def test_dycoke_against_one_token_after_the_other(n_tokens: int, stride: int, part: float) -> None:
    embeddings = random(n_tokens, 6)
    n_keep = max(1, round(part * n_tokens))
    kept = merge_runs(embeddings, n_keep, stride)
    expected = slow_baselines.runs(embeddings, n_keep, stride)
    assert kept.indices.tolist() == list(expected)
    torch.testing.assert_close(kept.embeddings, torch.stack(list(expected.values())))


def test_dycoke_makes_one_token_of_what_stands_still() -> None:
    """A picture that changes in one place only: that place in every grid, and the others once."""
    picture = random(12, 6)
    moving = picture.repeat(8, 1)
    moving[5::12] = random(8, 6, seed=1)
    kept = merge_runs(moving, 12 + 7, 12)
    assert kept.indices.tolist() == [*range(12), *range(12 + 5, 96, 12)]
    torch.testing.assert_close(kept.embeddings, moving[kept.indices])


def test_dycoke_loses_nothing_of_the_sum() -> None:
    """A single run is the mean of the whole clip."""
    whole = random(4096 * 2 + 100, 4)  # longer than what is widened at once
    assert torch.allclose(merge_runs(whole, 1, 50).embeddings[0], whole.mean(dim=0), atol=1e-6)


# --- OmniZip ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_tokens", [2, 4, 9, 40])
def test_peaks_of_density_against_one_token_after_the_other(n_tokens: int) -> None:
    grids = random(3, n_tokens, 6)
    scores = peak_score(torch.nn.functional.normalize(grids, dim=2))
    for grid, found in zip(grids, scores, strict=True):
        assert found.tolist() == pytest.approx(slow_baselines.peaks(grid), abs=1e-5)


def test_omnizip_against_one_window_after_the_other() -> None:
    plan = plan_for("omnizip", 0.3)
    media = media_of(COUNTS, plan)
    video, audio = media["video"], media["audio"]
    assert audio.saliency is not None
    assert audio.layout is not None
    sounds = METHODS["omnizip"].before_llm(audio, plan).indices.tolist()
    assert sounds == slow_baselines.best(audio.saliency.tolist(), plan.stages[0].n_audio)
    sizes = [24] * 6 + [12]
    shares = []
    for window in range(7):
        there = [i for i, one in enumerate(audio.layout.window.tolist()) if one == window]
        shares.append(len(set(there) & set(sounds)) / len(there))
    wishes = [size * (0.25 + 0.4 * share) for size, share in zip(sizes, shares, strict=True)]
    budgets = slow_baselines.divided(wishes, sizes, plan.stages[0].n_video)
    assert len(set(budgets)) > 2  # or the windows were not told apart
    grids = video.embeddings.view(13, 12, -1)
    expected: list[int] = []
    for window, budget in enumerate(budgets):
        first = 2 * window
        before = grids[first - 1] if first else None
        chosen = slow_baselines.compressed_window(grids[first : first + 2], before, True, budget)
        expected += [12 * first + i for i in chosen]
    kept = METHODS["omnizip"].before_llm(video, plan)
    assert kept.indices.tolist() == expected
    assert torch.equal(kept.embeddings, video.embeddings[expected])


def test_grids_are_compressed_in_space_and_in_time_by_turns() -> None:
    """In the second grid what has changed comes first, even where the first grid would choose otherwise."""
    grids = random(4, 12, 6)
    grids[1] = grids[0]
    grids[1, 7] = -grids[0, 7]
    rank = rank_in_grids(grids.view(48, 6), 12).view(4, 12)
    assert torch.equal(rank.sort(dim=1).values, torch.arange(12).expand(4, -1))
    assert int(rank[1].argmin()) == 7
    for grid in (0, 2):
        scores = slow_baselines.peaks(grids[grid])
        assert rank[grid].argsort().tolist() == sorted(range(12), key=lambda p: -scores[p])


def test_more_is_looked_at_where_there_is_something_to_hear() -> None:
    counts = clip(n_grids=12, n_audio=300, tokens_per_grid=64)
    plan = plan_for("omnizip", 0.25, counts=counts)
    video = media_of(counts, plan)["video"]
    assert video.other is not None
    assert video.other.saliency is not None
    assert video.other.layout is not None
    assert video.layout is not None
    loud = (video.other.layout.window == 3) + 0.5 * video.other.saliency
    kept = METHODS["omnizip"].before_llm(replace(video, other=replace(video.other, saliency=loud)), plan)
    per_window = torch.bincount(video.layout.window[kept.indices].long(), minlength=6).tolist()
    heard_there = heard(replace(video.other, saliency=loud), plan, torch.full((6,), 128))
    assert float(heard_there[3]) == 1.0
    assert per_window[3] > 1.3 * max(per_window[:3] + per_window[4:])


def test_omnizip_without_audio_treats_windows_alike_and_says_so() -> None:
    counts = clip(n_grids=12, n_audio=0, tokens_per_grid=12)
    plan = plan_for("omnizip", 0.25, counts=counts)
    assert "no audio to go by" in plan.notes[0]
    assert plan_for("omnizip").notes == ()
    assert plan_for("omnizip", 1.0, counts=counts).notes == ()
    done = run(METHODS["omnizip"], plan, counts, media_of(counts, plan))
    windows = done.layouts[0].window
    assert torch.bincount(windows[windows >= 0].long()).tolist() == [6] * 6


def test_a_window_without_sound_has_the_mean_share() -> None:
    counts = clip(n_grids=12, n_audio=120, tokens_per_grid=12)  # sound in three of six windows
    plan = plan_for("omnizip", 0.25, counts=counts)
    media = media_of(counts, plan)
    found = heard(media["audio"], plan, torch.full((6,), 24))
    assert found[3:].tolist() == pytest.approx([plan.entry_audio] * 3)
    assert float(found[:3] @ torch.tensor([50.0, 50.0, 20.0])) == pytest.approx(plan.stages[0].n_audio)


def test_omnizip_must_know_the_windows() -> None:
    plan = plan_for("omnizip")
    with pytest.raises(ValueError, match="layout"):
        METHODS["omnizip"].before_llm(replace(media_of(COUNTS, plan)["video"], layout=None), plan)
