"""Stage I: the batched greedy choice against its slow form, and what merging may do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from seats_cli.selection import diversity
from seats_cli.selection.diversity import choose_diverse, merge_dropped, weighted_distances
from slow import greedy_max_min


def windows(n_windows: int, n_tokens: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n_windows, n_tokens, width, generator=generator)
    return embeddings, torch.rand(n_windows, n_tokens, generator=generator)


@given(
    st.integers(1, 3), st.integers(2, 24), st.integers(1, 6), st.integers(0, 10**6), st.booleans(), st.data()
)
def test_equals_the_slow_choice(
    n_windows: int, n_tokens: int, width: int, seed: int, with_saliency: bool, data: st.DataObject
) -> None:
    n_keep = data.draw(st.integers(1, n_tokens))
    embeddings, saliency = windows(n_windows, n_tokens, width, seed)
    if data.draw(st.booleans()):
        embeddings = embeddings.round()  # many duplicates and ties
    given_saliency = saliency if with_saliency else None
    keep = choose_diverse(embeddings, given_saliency, n_keep)
    distances = weighted_distances(embeddings, given_saliency)
    if n_keep < n_tokens:
        assert keep.tolist() == [greedy_max_min(distances[b], n_keep) for b in range(n_windows)]
    else:
        assert keep.tolist() == [list(range(n_tokens))] * n_windows


def test_windows_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, saliency = windows(7, 20, 8, seed=1)
    together = choose_diverse(embeddings, saliency, 6)
    monkeypatch.setattr(diversity, "MAX_DISTANCES", 3 * 20**2)  # three windows at a time, the last alone
    assert torch.equal(choose_diverse(embeddings, saliency, 6), together)


def test_duplicates_are_never_kept_twice() -> None:
    # rounding leaves identical tokens at slightly negative distances, which 10^6 makes far smaller than -1
    embeddings = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)).expand(1, 12, 64) * 37.0
    keep = choose_diverse(embeddings.contiguous(), torch.full((1, 12), 50.0), 9)
    assert len(set(keep[0].tolist())) == 9


def test_equal_tokens_are_kept_from_the_lowest_index() -> None:
    assert choose_diverse(torch.eye(6)[None], None, 4).tolist() == [[0, 1, 2, 3]]


def test_saliency_outweighs_distance() -> None:
    embeddings = torch.eye(5)[None]
    saliency = torch.tensor([[0.1, 0.9, 0.1, 0.1, 0.8]])
    assert choose_diverse(embeddings, saliency, 2).tolist() == [[1, 4]]


@pytest.mark.parametrize("n_keep", [0, 5])
def test_refuses_impossible_numbers(n_keep: int) -> None:
    with pytest.raises(ValueError, match=f"{n_keep} of 4"):
        choose_diverse(torch.eye(4)[None], None, n_keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_equals_its_slow_form(dtype: torch.dtype) -> None:
    embeddings = windows(3, 15, 8, seed=2)[0].to(dtype)
    keep = choose_diverse(embeddings, None, 4)
    merged = merge_dropped(embeddings, keep)
    for b in range(3):
        kept = keep[b].tolist()
        members: dict[int, list[int]] = {i: [i] for i in kept}
        for j in set(range(15)) - set(kept):
            likeness = functional.cosine_similarity(
                embeddings[b, j].float(), embeddings[b, kept].float(), dim=-1
            )
            members[kept[int(likeness.argmax())]].append(j)
        slow = torch.stack([embeddings[b, sorted(members[i])].float().mean(dim=0) for i in kept])
        torch.testing.assert_close(merged[b], slow.to(dtype))


def test_merging_keeps_the_total() -> None:
    embeddings = windows(1, 10, 8, seed=3)[0]
    one = merge_dropped(embeddings, torch.tensor([[4]]))
    torch.testing.assert_close(one[0, 0], embeddings[0].mean(dim=0))
    everything = torch.arange(10)[None]
    torch.testing.assert_close(merge_dropped(embeddings, everything), embeddings)


def test_a_kept_duplicate_stays_itself() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    merged = merge_dropped(embeddings, torch.tensor([[0, 1]]))
    torch.testing.assert_close(merged[0, 1], embeddings[0, 1])  # the dropped one went to the first of equals
