"""Stage II's budgets: levels against the step-by-step repair, and what the exact ones promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow
from layouts import make_layout
from seats_cli.selection.budget import (
    choose_in_layer,
    exact_budgets,
    keep_best,
    meet_total,
    published_budgets,
    scale_to_total,
)
from seats_cli.selection.layout import AUDIO, TEXT, VIDEO
from seats_cli.selection.options import SelectionOptions
from seats_cli.selection.plan import keep_total
from seats_cli.selection.relevance import WindowShares, WindowTokens, sort_into_windows, window_shares

counts = st.integers(0, 12)
window_counts = st.lists(st.tuples(counts, counts), min_size=1, max_size=14)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(0, 120),
)
def test_levels_equal_the_repair_step_by_step(bounds: list[tuple[int, int, int]], total: int) -> None:
    least = [min(row) for row in bounds]
    values = [sorted(row)[1] for row in bounds]
    most = [max(row) for row in bounds]
    found = meet_total(ints(values), ints(least), ints(most), total)
    assert found.tolist() == slow.meet_total(values, least, most, total)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 60))
def test_values_at_or_past_a_bound_are_left_alone(values: list[int], total: int) -> None:
    # the published repair never takes below 1, even where a window is empty and stands at 0
    least, most = [1] * len(values), [max(0, value - 1) for value in values]
    found = meet_total(ints(values), ints(least), ints(most), total)
    assert found.tolist() == slow.meet_total(values, least, most, total)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 10**6))
def test_best_of_each_group(group: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (len(group),), generator=generator) / 4  # ties
    quota = torch.randint(0, 9, (4,), generator=generator)
    found = keep_best(scores, ints(group), quota)
    assert found.tolist() == slow.keep_best(scores.tolist(), group, quota.tolist())


def some_shares(
    sizes: list[tuple[int, int]], seed: int, sharpness: float
) -> tuple[WindowShares, WindowTokens]:
    generator = torch.Generator().manual_seed(seed)
    n_video, n_audio = ints([v for v, _ in sizes]), ints([a for _, a in sizes])
    tokens = WindowTokens(torch.zeros(0), n_video, n_audio)
    shares = []
    for present in (n_video > 0, n_audio > 0):
        logits = (torch.randn(len(sizes), generator=generator) * sharpness).masked_fill(~present, -torch.inf)
        shares.append(torch.softmax(logits, 0).nan_to_num(0.0))
    return WindowShares(shares[0], shares[1]), tokens


def lent_to_video(sizes: list[tuple[int, int]], k_video: int, k_audio: int) -> int:
    """Tokens that audio gives so that every window with video has one; negative: that video gives."""
    spare_video = k_video - sum(v > 0 for v, _ in sizes)
    spare_audio = k_audio - sum(a > 0 for _, a in sizes)
    if spare_video < 0 < spare_audio:
        return min(-spare_video, spare_audio)
    return -min(-spare_audio, spare_video) if spare_audio < 0 < spare_video else 0


@settings(max_examples=150)
@given(window_counts, st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 30.0, 500.0]), st.data())
def test_exact_budgets_are_exact(
    sizes: list[tuple[int, int]], seed: int, sharpness: float, data: st.DataObject
) -> None:
    n_video, n_audio = sum(v for v, _ in sizes), sum(a for _, a in sizes)
    k_video = data.draw(st.integers(min(1, n_video), n_video))
    k_audio = data.draw(st.integers(min(1, n_audio), n_audio))
    shares, tokens = some_shares(sizes, seed, sharpness)
    budgets = exact_budgets(shares, tokens, k_video, k_audio)
    video, audio = budgets.video.tolist(), budgets.audio.tolist()

    lent = lent_to_video(sizes, k_video, k_audio)
    assert (sum(video), sum(audio)) == (k_video + lent, k_audio - lent)
    assert all(0 <= v <= size for v, (size, _) in zip(video, sizes, strict=True))
    assert all(0 <= a <= size for a, (_, size) in zip(audio, sizes, strict=True))
    floors = sum((v > 0) + (a > 0) for v, a in sizes)
    kept_floors = sum((v > 0) + (a > 0) for v, a in zip(video, audio, strict=True))
    assert kept_floors == min(floors, k_video + k_audio)


def test_without_room_for_floors_the_least_relevant_windows_lose_theirs() -> None:
    sizes = [(4, 4)] * 5
    video = torch.tensor([0.1, 0.3, 0.05, 0.35, 0.2])
    tokens = WindowTokens(torch.zeros(0), ints([v for v, _ in sizes]), ints([a for _, a in sizes]))
    budgets = exact_budgets(WindowShares(video, video), tokens, 3, 2)
    # five tokens: both kinds of the two most relevant windows, then one of the third
    assert (budgets.video + budgets.audio).tolist() == [0, 2, 0, 2, 1]


def test_a_kind_that_cannot_pay_its_floors_borrows_no_more_than_these() -> None:
    tokens = WindowTokens(torch.zeros(0), ints([4] * 5), ints([8] * 5))
    even = torch.full((5,), 0.2)
    budgets = exact_budgets(WindowShares(even, even), tokens, 2, 30)
    assert budgets.video.tolist() == [1] * 5
    assert int(budgets.audio.sum()) == 27


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=14),
    st.sampled_from([1.0, 5.0, 50.0, 5000.0]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.data(),
)
def test_peaked_scores_leave_the_split_between_kinds_alone(
    sizes: list[tuple[int, int]], peak: float, part_video: float, part_audio: float, data: st.DataObject
) -> None:
    layout = make_layout([v for v, _ in sizes], [a for _, a in sizes])
    n_windows = len(sizes)
    video_at, audio_at = (data.draw(st.integers(0, n_windows - 1)) for _ in range(2))
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(n_windows)) * 1e-4
    scores[(layout.window == video_at) & (layout.kind == VIDEO)] *= peak
    scores[(layout.window == audio_at) & (layout.kind == AUDIO)] *= peak
    # from a token a window up to all
    k_video = round(n_windows + part_video * (layout.n_video - n_windows))
    k_audio = round(n_windows + part_audio * (layout.n_audio - n_windows))
    kept = choose_in_layer(
        scores, layout, k_video / layout.n_video, k_audio / layout.n_audio, n_windows, SelectionOptions()
    )
    assert int((kept & (layout.kind == VIDEO)).sum()) == k_video
    assert int((kept & (layout.kind == AUDIO)).sum()) == k_audio
    for window in range(n_windows):
        for kind in (VIDEO, AUDIO):
            assert (kept & (layout.window == window) & (layout.kind == kind)).any()


def test_exact_budgets_follow_relevance() -> None:
    share = torch.tensor([0.7, 0.1, 0.1, 0.1])
    tokens = WindowTokens(torch.zeros(0), ints([50] * 4), ints([50] * 4))
    budgets = exact_budgets(WindowShares(share, share), tokens, 60, 40)
    assert budgets.video.tolist() == [42, 6, 6, 6]
    assert budgets.audio.tolist() == [28, 4, 4, 4]


@settings(max_examples=100)
@given(
    st.lists(st.tuples(counts, counts).filter(any), min_size=1, max_size=12), st.integers(0, 10**6), st.data()
)
def test_published_budgets_equal_their_slow_form(
    sizes: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    n_video, n_audio = [v for v, _ in sizes], [a for _, a in sizes]
    k_video = data.draw(st.integers(min(1, sum(n_video)), sum(n_video)))
    k_audio = data.draw(st.integers(min(1, sum(n_audio)), sum(n_audio)))
    shares, tokens = some_shares(sizes, seed, data.draw(st.sampled_from([0.01, 1.0, 5.0])))
    budgets = published_budgets(shares, tokens, k_video, k_audio)
    assert (budgets.video.tolist(), budgets.audio.tolist()) == slow.published_budgets(
        shares.video, shares.audio, n_video, n_audio, k_video, k_audio
    )


def test_published_floors_may_overshoot() -> None:
    layout = make_layout([3] * 6, [3] * 6)
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) * 1e-4
    published = SelectionOptions(window_relevance="raw", budgets="published")
    kept = choose_in_layer(scores, layout, 0.2, 0.2, 6, published)
    exact = choose_in_layer(scores, layout, 0.2, 0.2, 6, SelectionOptions())
    asked = 2 * keep_total(0.2, 18)
    assert int(kept.sum()) - layout.n_text == 12 > asked
    assert int(exact.sum()) - layout.n_text == asked


@settings(max_examples=80)
@given(window_counts, st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_choice_in_a_layer(
    sizes: list[tuple[int, int]], seed: int, keep_video: float, keep_audio: float, normalised: bool
) -> None:
    layout = make_layout([v for v, _ in sizes], [a for _, a in sizes])
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(seed)) ** 8
    options = SelectionOptions(window_relevance="normalised" if normalised else "raw")
    kept = choose_in_layer(scores, layout, keep_video, keep_audio, len(sizes), options)
    assert kept[layout.kind == TEXT].all()
    asked = keep_total(keep_video, layout.n_video) + keep_total(keep_audio, layout.n_audio)
    assert int(kept.sum()) == layout.n_text + asked
    for window in range(len(sizes)):  # within a window and kind nothing kept scores below something dropped
        for kind in (VIDEO, AUDIO):
            here = (layout.window == window) & (layout.kind == kind)
            inside, outside = scores[here & kept], scores[here & ~kept]
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()


@pytest.mark.parametrize("sizes", [([7, 5, 9], [0, 0, 0]), ([0, 0], [8, 3]), ([9], [6])])
@pytest.mark.parametrize("budgets", ["exact", "published"])
def test_one_kind_or_one_window_is_a_plain_top_k(sizes: tuple[list[int], list[int]], budgets: str) -> None:
    layout = make_layout(*sizes)
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(4))
    kept = choose_in_layer(scores, layout, 0.5, 0.25, len(sizes[0]), SelectionOptions(budgets=budgets))  # type: ignore[arg-type]
    for kind, ratio in ((VIDEO, 0.5), (AUDIO, 0.25)):
        here = (layout.kind == kind).nonzero().flatten()
        best = here[scores[here].argsort(descending=True)[: keep_total(ratio, len(here))]]
        assert sorted(best.tolist()) == (kept & (layout.kind == kind)).nonzero().flatten().tolist()


@pytest.mark.parametrize("budgets", ["exact", "published"])
def test_of_a_kind_kept_at_nothing_no_window_keeps_a_token(budgets: str) -> None:
    layout = make_layout([4, 3, 7], [2, 5, 6])
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(6))
    options = SelectionOptions(budgets=budgets)  # type: ignore[arg-type]
    kept = choose_in_layer(scores, layout, 0.0, 0.5, 3, options)
    assert not kept[layout.kind == VIDEO].any()
    audio = (layout.kind == AUDIO).nonzero().flatten()
    best = audio[scores[audio].argsort(descending=True)[: keep_total(0.5, 13)]]
    assert sorted(best.tolist()) == kept.logical_and(layout.kind == AUDIO).nonzero().flatten().tolist()
    assert kept[layout.kind == TEXT].all()


def test_keeping_everything_keeps_everything() -> None:
    layout = make_layout([4, 0, 7], [2, 5, 0])
    scores = torch.rand(len(layout), generator=torch.Generator().manual_seed(5))
    assert choose_in_layer(scores, layout, 1.0, 1.0, 3, SelectionOptions()).all()


@given(window_counts, st.integers(0, 10**6), st.data())
def test_scaled_wishes_sum_to_the_total(sizes: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    least, most = ints([min(row) for row in sizes]), ints([max(row) for row in sizes])
    total = data.draw(st.integers(int(least.sum()), int(most.sum())))
    wish = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)) ** 6
    scaled = scale_to_total(wish, least, most, total)
    assert (scaled >= least).all()
    assert (scaled <= most).all()
    assert float(scaled.sum()) == pytest.approx(total, abs=1e-3)


def test_no_step_waits_for_the_device() -> None:
    """Under fake tensors anything that needs a value on the host (item, nonzero, boolean masks) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from seats_cli.selection.diversity import choose_diverse, merge_dropped

    layout = make_layout([6, 4, 5], [3, 3, 2])
    scores = torch.rand(len(layout))
    embeddings, saliency = torch.rand(3, 20, 8), torch.rand(3, 20)
    with FakeTensorMode() as mode:
        fake = layout.__class__(
            *(
                mode.from_tensor(part)
                for part in (layout.kind, layout.window, layout.position, layout.time_s)
            ),
            layout.counts,
        )
        for budgets in ("exact", "published"):
            for relevance in ("raw", "normalised"):
                options = SelectionOptions(budgets=budgets, window_relevance=relevance)  # type: ignore[arg-type]
                kept = choose_in_layer(mode.from_tensor(scores), fake, 0.5, 0.5, 3, options)
                assert kept.shape == scores.shape
        inputs = mode.from_tensor(embeddings)
        keep = choose_diverse(inputs, mode.from_tensor(saliency), 5)
        assert merge_dropped(inputs, keep).shape == (3, 5, 8)


def test_relevance_of_windows() -> None:
    layout = make_layout([2, 2, 0], [1, 0, 3], n_before=1, n_after=1)
    scores = torch.tensor([0.9, 0.1, 0.3, 0.4, 0.0, 0.4, 0.2, 0.2, 0.5, 0.7])
    tokens = sort_into_windows(layout, 3)
    assert tokens.n_video.tolist() == [2, 2, 0]
    assert tokens.n_audio.tolist() == [1, 0, 3]
    raw = SelectionOptions(window_relevance="raw", budgets="published", tau=0.5)
    video, audio = torch.tensor([0.2, 0.2, 0.0]), torch.tensor([0.4, 0.0, 0.3])
    found = window_shares(scores, tokens, raw)
    torch.testing.assert_close(found.video, torch.softmax(video / 0.5, 0))
    torch.testing.assert_close(found.audio, torch.softmax(audio / 0.5, 0))

    ours = window_shares(scores, tokens, SelectionOptions(window_relevance="normalised", tau=0.5))
    assert ours.video[2] == 0  # no video there, no share of video's budget
    torch.testing.assert_close(ours.video[:2], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(ours.audio[[0, 2]], torch.softmax(torch.tensor([4 / 7, 3 / 7]) / 0.5, 0))


def test_normalised_relevance_follows_the_question_where_raw_does_not() -> None:
    layout = make_layout([10] * 20, [10] * 20)
    scores = torch.full((len(layout),), 1e-4)
    scores[layout.window == 7] = 50e-4
    tokens = sort_into_windows(layout, 20)
    flat = window_shares(scores, tokens, SelectionOptions(window_relevance="raw", budgets="published"))
    sharp = window_shares(scores, tokens, SelectionOptions())
    assert float(flat.video[7] / flat.video[0]) < 1.06
    assert float(sharp.video[7]) > 0.9
