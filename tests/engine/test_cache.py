"""The cache gives back what it was given, at any length per layer."""

import pytest
import torch

from seats_cli.engine.cache import LayerCache


def _pair(length: int, heads: int = 2, dim: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, heads, length, dim), torch.randn(1, heads, length, dim)


@pytest.mark.parametrize("room", [1, 2, 3, 64])
def test_growing_equals_concatenating(room: int) -> None:
    torch.manual_seed(0)
    cache = LayerCache(1, room=room)
    pairs = [_pair(7), *(_pair(1) for _ in range(40)), _pair(5)]
    for keys, values in pairs:
        got = cache.update(keys, values, 0)
    for which in (0, 1):
        assert torch.equal(got[which], torch.cat([pair[which] for pair in pairs], dim=2))


def test_growth_copies_a_linear_number_of_tokens() -> None:
    cache = LayerCache(1, room=4)
    cache.update(*_pair(1), 0)
    buffers = set()
    for _ in range(1000):
        keys, _ = cache.update(*_pair(1), 0)
        buffers.add(keys.data_ptr())
    assert len(buffers) <= 10  # 4, 8, 16, ...: one buffer for each doubling


def test_layers_keep_their_own_lengths_through_trim_and_growth() -> None:
    torch.manual_seed(1)
    cache = LayerCache(3)
    given = [_pair(10), _pair(10), _pair(6)]
    for layer, (keys, values) in enumerate(given):
        cache.update(keys, values, layer)
    keep = torch.tensor([0, 3, 9])
    cache.trim(0, keep)
    assert cache.lengths == (3, 10, 6)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [3, 10, 6]
    new = _pair(1)
    keys, values = cache.update(*new, 0)
    assert torch.equal(keys, torch.cat([given[0][0][:, :, keep], new[0]], dim=2))
    assert torch.equal(values, torch.cat([given[0][1][:, :, keep], new[1]], dim=2))
    assert torch.equal(cache.keys_values(1)[0], given[1][0])  # the others are untouched


def test_trimming_after_growth_reads_the_buffer_not_its_spare_room() -> None:
    torch.manual_seed(2)
    cache = LayerCache(1, room=16)
    first, second = _pair(4), _pair(1)
    cache.update(*first, 0)
    cache.update(*second, 0)
    cache.trim(0, torch.tensor([1, 4]))
    whole = torch.cat([first[0], second[0]], dim=2)
    assert torch.equal(cache.keys_values(0)[0], whole[:, :, [1, 4]])


def test_bytes_count_tokens_held_not_room() -> None:
    cache = LayerCache(2, room=100)
    cache.update(*_pair(10), 0)
    cache.update(*_pair(10), 1)
    assert cache.bytes() == 2 * 2 * 10 * 2 * 4 * 4  # k and v, layers, tokens, heads, dim, float32
    cache.trim(1, torch.tensor([0]))
    cache.update(*_pair(1), 0)
    assert cache.bytes() == 2 * (11 + 1) * 2 * 4 * 4


def test_the_prompts_tensors_are_not_copied_by_prefill() -> None:
    cache = LayerCache(1)
    keys, values = _pair(10)
    got, _ = cache.update(keys, values, 0)
    assert got.data_ptr() == keys.data_ptr()


def test_reading_an_empty_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no keys yet"):
        LayerCache(1).keys_values(0)
    with pytest.raises(ValueError, match="at least one layer"):
        LayerCache(0)


def _filled(room: int, grown: bool) -> tuple[LayerCache, list[list[torch.Tensor]]]:
    """A cache of three layers of 6, 5 and 4 tokens, in buffers with room if `grown`, and what it holds."""
    torch.manual_seed(3)
    cache = LayerCache(3, room=room)
    for layer in range(3):
        cache.update(*_pair(5 - layer if grown else 6 - layer), layer)
        if grown:
            cache.update(*_pair(1), layer)
    return cache, _contents(cache, range(3))


def _contents(cache: LayerCache, layers: range) -> list[list[torch.Tensor]]:
    return [[part.clone() for part in cache.keys_values(layer)] for layer in layers]


def _same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("drop_last", [0, 2])
def test_a_fork_and_its_original_never_see_each_other_s_changes(grown: bool, drop_last: int) -> None:
    for change in ("grow", "trim"):
        for changed in ("fork", "original"):
            cache, held = _filled(8, grown)
            fork = cache.fork(drop_last=drop_last)
            kept = [[part[:, :, : part.shape[2] - drop_last] for part in pair] for pair in held]
            assert _same(_contents(fork, range(3)), kept)
            one = fork if changed == "fork" else cache
            for layer in range(3):
                for _ in range(12):  # beyond the room, so that buffers are replaced as well
                    if change == "grow":
                        one.update(*_pair(1), layer)
                if change == "trim":
                    one.trim(layer, torch.tensor([0]))
                    one.update(*_pair(2), layer)
            other, expected = (cache, held) if changed == "fork" else (fork, kept)
            assert _same(_contents(other, range(3)), expected)


def test_a_fork_shares_memory_and_leaves_later_layers_empty() -> None:
    cache, _ = _filled(8, False)
    fork = cache.fork(2)
    assert fork.lengths == (6, 5, 0)
    assert fork.keys_values(1)[0].data_ptr() == cache.keys_values(1)[0].data_ptr()
    keys, values = _pair(3)
    assert fork.update(keys, values, 2)[0].data_ptr() == keys.data_ptr()
    assert cache.lengths == (6, 5, 4)
    assert cache.fork(0).lengths == (0, 0, 0)


def test_a_fork_of_what_there_is_not_is_an_error() -> None:
    cache, _ = _filled(8, False)
    with pytest.raises(ValueError, match="cannot fork 4 layers of a cache of 3"):
        cache.fork(4)
    with pytest.raises(ValueError, match="cannot leave 5 of the 4 tokens of layer 2 out"):
        cache.fork(drop_last=5)
