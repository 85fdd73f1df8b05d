"""The tokenizer knows every word that the world can ask or answer, and both its forms agree."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from seats_cli.demo.nouns import COLOURS, GLYPHS, MOTIONS, NUMBERS, SHAPES, SOUNDS, WORDS
from seats_cli.demo.question_types import DENSE, TYPES
from seats_cli.demo.questions import sample_questions, suite_questions
from seats_cli.demo.tokenizer import SPECIAL, UNKNOWN, build_tokenizer_files, encode, vocabulary
from seats_cli.demo.world import sample_clip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer_files(folder)
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def test_ids_are_dense_and_few() -> None:
    assert list(vocabulary().values()) == list(range(len(vocabulary())))
    assert len(vocabulary()) <= 320


def test_every_template_and_noun_is_known() -> None:
    fill = {
        "x": "red circle",
        "c": "red",
        "w": "apple",
        "s": "bell",
        "g": "k",
        "m": "moves left",
        "e": "first",
    }
    texts = [text.format(**fill) for row in (*TYPES, *DENSE) for text in row.paraphrases]
    texts += [
        *SHAPES,
        *COLOURS,
        *MOTIONS,
        *GLYPHS,
        *WORDS,
        *SOUNDS,
        *NUMBERS,
        "last",
        "stays still",
        "moves up",
    ]
    texts += ["You are a helpful assistant.", "system\n", "user\n", "assistant\n"]
    for text in texts:
        assert vocabulary()[UNKNOWN] not in encode(text), text


def test_both_forms_agree_and_answers_round_trip(tokenizer: Any) -> None:
    for seed in range(40):
        spec = sample_clip(seed, (16.0, 64.0)[seed % 2])
        for question in (*sample_questions(spec, random.Random(seed), 18), *suite_questions(spec)):
            for text in (question.question, question.answer):
                assert encode(text) == ids(tokenizer, text)
                assert vocabulary()[UNKNOWN] not in encode(text)
            assert tokenizer.decode(encode(question.answer)) == question.answer


@pytest.mark.parametrize(
    "text",
    ["", "  What\tis said ?\n\n a) RED", "don't!", "naïve café x_y 42", "<|im_end|> <|VIDEO|>", "\r\n tail "],
)
def test_both_forms_agree_on_any_text(tokenizer: Any, text: str) -> None:
    assert encode(text) == ids(tokenizer, text)


def test_text_of_a_user_cannot_form_special_tokens(tokenizer: Any) -> None:
    special = {vocabulary()[token] for token in SPECIAL if token != UNKNOWN}
    assert not special & set(ids(tokenizer, "x <|im_end|><|AUDIO|> y"))


def test_chat_template_is_chatml(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what is said?"}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_bos|><|VIDEO|><|vision_eos|>what is said?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens[0] == vocabulary()["<|im_start|>"]
    assert tokens[-1] == vocabulary()["\n"]
    assert vocabulary()[UNKNOWN] not in tokens


def test_special_tokens_are_declared(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    decoded = tokenizer.decode([vocabulary()["red"], vocabulary()["<|im_end|>"]], skip_special_tokens=True)
    assert decoded == "red"
