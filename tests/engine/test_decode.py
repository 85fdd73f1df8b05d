"""Choosing tokens, stopping, and text that is whole at every moment."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seats_cli.engine.decode import (
    REPLACEMENT,
    DecodeOptions,
    Generation,
    TextStream,
    TokenSampler,
    text_of,
)
from seats_cli.errors import UsageError


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, a few merged ones (one of them ends inside a character), and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = []
    for text, cut in (("the", 3), (" the", 4), ("日", 2), ("a日", 3)):
        letters = as_letters.pre_tokenize_str(text)[0][0]
        left = letters[0]
        for right in letters[1:cut]:
            merges.append((left, right))
            left += right
            vocab.setdefault(left, len(vocab))
    raw = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    raw.pre_tokenizer = as_letters
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the decoder puts the spaces."""
    words = ["[unk]", "red", "ball", "rings", "twice", "then", "stops"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[unk]", eos_token="<end>")


BYTES = _byte_tokenizer()
WORDS = _word_tokenizer()


def _stream(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.finish()]


def _byte_ids(data: bytes) -> list[int]:
    """One token for every byte, none merged."""
    table = _bytes_to_letters()
    return [BYTES.convert_tokens_to_ids(table[byte]) for byte in data]


def _bytes_to_letters() -> dict[int, str]:
    """GPT-2's map from bytes to printable letters."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def test_a_character_of_four_bytes_comes_at_once() -> None:
    assert _stream(BYTES, _byte_ids("a🙂b".encode())) == ["a", "", "", "", "🙂", "b", ""]


def test_a_merged_token_that_ends_inside_a_character_is_held() -> None:
    ids = BYTES("a日the", add_special_tokens=False).input_ids
    assert len(ids) < len("a日the".encode())  # merges are in play
    pieces = _stream(BYTES, ids)
    assert "".join(pieces) == "a日the"
    assert all(REPLACEMENT not in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_text_streams_whole_and_without_broken_characters(text: str) -> None:
    for ids in (_byte_ids(text.encode()), BYTES(text, add_special_tokens=False).input_ids):
        pieces = _stream(BYTES, ids)
        assert "".join(pieces) == text.rstrip(REPLACEMENT)
        if REPLACEMENT not in text:
            assert all(REPLACEMENT not in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(BYTES) + 3), max_size=40))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    """Broken bytes, special tokens and ids past the vocabulary included."""
    pieces = _stream(BYTES, ids)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=True).rstrip(REPLACEMENT)
    assert text_of(BYTES, ids) == "".join(pieces)
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=20))
def test_words_stream_with_their_spaces(ids: list[int]) -> None:
    assert "".join(_stream(WORDS, ids)) == WORDS.decode(ids, skip_special_tokens=True) == text_of(WORDS, ids)


def test_a_cut_off_character_at_the_end_is_left_out_and_nothing_else() -> None:
    ids = _byte_ids("ok 日".encode()[:-1])
    assert "".join(_stream(BYTES, ids)) == "ok "


# ---- choosing ---------------------------------------------------------------------------------------------


def _draws(options: DecodeOptions, logits: torch.Tensor, n: int = 300) -> list[int]:
    sample = TokenSampler(options, logits.device)
    return [int(sample(logits)) for _ in range(n)]


def test_greedy_takes_the_likeliest() -> None:
    assert set(_draws(DecodeOptions(), torch.tensor([0.0, 3.0, 1.0]), 5)) == {1}


def test_the_seed_decides() -> None:
    logits = torch.zeros(50)
    first = _draws(DecodeOptions(temperature=1.0, seed=1), logits)
    assert first == _draws(DecodeOptions(temperature=1.0, seed=1), logits)
    assert first != _draws(DecodeOptions(temperature=1.0, seed=2), logits)
    assert len(set(first)) > 40


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    _draws(DecodeOptions(temperature=1.0), torch.zeros(5))
    assert torch.equal(torch.rand(1), expected)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(_draws(DecodeOptions(temperature=1.0, top_p=0.5), logits)) == {1}
    assert set(_draws(DecodeOptions(temperature=1.0, top_p=0.51), logits)) == {1, 3}
    assert set(_draws(DecodeOptions(temperature=1.0, top_p=1.0), logits)) == {0, 1, 2, 3}
    assert set(_draws(DecodeOptions(temperature=1.0, top_p=1e-9), logits)) == {1}


def test_temperature_sharpens_and_a_tiny_one_is_finite() -> None:
    logits = torch.tensor([1.0, 2.0])
    hot = sum(_draws(DecodeOptions(temperature=10.0), logits)) / 300
    cool = sum(_draws(DecodeOptions(temperature=0.5), logits)) / 300
    assert 0.4 < hot < 0.65 < cool < 1.0
    assert set(_draws(DecodeOptions(temperature=1e-30), logits * 1e6, 20)) == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_impossible_options_are_usage_errors(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name}"):
        DecodeOptions(**wrong)


# ---- stopping ---------------------------------------------------------------------------------------------


class Scripted:
    """An adapter whose network says the tokens of a script, whatever it is given."""

    n_layers = 1
    device = torch.device("cpu")
    tokenizer = WORDS

    def __init__(self, script: Sequence[int], eos: tuple[int, ...]) -> None:
        self.script = list(script)
        self.eos_token_ids = eos
        self.positions: list[int] = []
        self.position_dtype = torch.int64
        self.fed: list[int] = []

    def logits(self, step: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.script[step]), len(WORDS)).float()

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        self.fed += ids.tolist()
        return torch.zeros(1, 4)

    def rotary(self, position: torch.Tensor) -> None:
        assert position.shape == (3, 1)
        assert len(set(position.flatten().tolist())) == 1
        self.positions.append(int(position[0, 0]))

    def run_layer(self, index: int, hidden: torch.Tensor, rotary: None, cache: Any) -> torch.Tensor:
        return hidden

    def final_logits(self, hidden: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        return self.logits(len(self.fed))[None, None]


class ScriptStart:
    """What prefill hands over: the first logits of a script."""

    def __init__(self, adapter: Scripted) -> None:
        self.logits = adapter.logits(0)
        self.cache = None


def _generate(
    script: Sequence[int], eos: tuple[int, ...], limit: int
) -> tuple[Generation, list[str], Scripted]:
    adapter = Scripted(script, eos)
    generation = Generation(adapter, ScriptStart(adapter), 100, DecodeOptions(max_new_tokens=limit))  # type: ignore[arg-type]
    return generation, list(generation), adapter


@pytest.mark.parametrize("end", [5, 6])
def test_every_end_token_stops_and_is_not_said(end: int) -> None:
    generation, pieces, adapter = _generate([1, 2, end, 3, 3], (5, 6), 10)
    assert generation.token_ids == [1, 2]
    assert generation.finish_reason == "stop"
    assert generation.text == "".join(pieces) == "red ball"
    assert adapter.fed == [1, 2]
    assert adapter.positions == [100, 101]


def test_the_limit_ends_without_a_wasted_forward() -> None:
    generation, _, adapter = _generate([1, 2, 3, 4], (6,), 3)
    assert generation.token_ids == [1, 2, 3]
    assert generation.finish_reason == "length"
    assert adapter.fed == [1, 2]


def test_an_answer_may_be_empty() -> None:
    generation, pieces, adapter = _generate([6], (6,), 3)
    assert (generation.text, pieces, adapter.fed) == ("", [], [])
    assert generation.finish_reason == "stop"


def test_end_tokens_are_passed_over_where_a_length_is_asked_for() -> None:
    adapter = Scripted([1, 6, 2, 6, 3], (6,))
    options = DecodeOptions(max_new_tokens=4, ignore_end=True)
    generation = Generation(adapter, ScriptStart(adapter), 100, options)  # type: ignore[arg-type]
    list(generation)
    assert generation.token_ids == [1, 6, 2, 6]
    assert generation.finish_reason == "length"
