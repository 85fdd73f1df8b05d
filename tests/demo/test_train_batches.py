"""Packed questions and the order of batches."""

import numpy as np
import pytest
import torch

from seats_cli.demo.batches import IGNORED, ClipBatches, PackingSpec, Size, batches, pack_questions
from seats_cli.demo.questions import FAMILIES, Question
from seats_cli.demo.tokenizer import encode

SUFFIX, END = [7, 8, 9], 5
ASKED = [
    Question("order", "word_end", "which word is said first", "apple"),
    Question("transcription", "said", "what is said?", "apple baby basket"),
    Question("dense", "dense_sync", "what is said?", "apple red circle"),
]


def test_blocks_hold_question_and_answer_shifted_by_one():
    ids, targets, offset, doc, family = pack_questions(ASKED, 60, SUFFIX, END)
    start = 0
    for number, question in enumerate(ASKED):
        answer = [*encode(question.answer), END]
        row = [*encode(question.question), *SUFFIX, *answer]
        at = doc == number
        assert list(np.flatnonzero(at)) == list(range(start, start + len(row) - 1))
        assert ids[at].tolist() == row[:-1]
        assert offset[at].tolist() == list(range(len(row) - 1))
        asked = targets[at] != IGNORED
        assert targets[at][asked].tolist() == answer
        # Each target is the token that follows in the chat, so the first is asked of the suffix's last token.
        assert np.flatnonzero(asked)[0] == len(row) - 1 - len(answer)
        assert targets[at][:-1][asked[:-1]].tolist() == ids[at][1:][asked[:-1]].tolist()
        start += len(row) - 1
    assert (doc[start:] == 63).all()
    assert (targets[start:] == IGNORED).all()
    assert family[:4].tolist() == [
        FAMILIES.index("order"),
        FAMILIES.index("transcription"),
        len(FAMILIES),
        -1,
    ]


def test_what_does_not_fit_is_left_out_whole():
    first = len(encode(ASKED[0].question)) + len(SUFFIX) + len(encode(ASKED[0].answer))
    for length in range(first, first + 4):
        ids, targets, _, doc, family = pack_questions(ASKED, length, SUFFIX, END)
        assert len(ids) == length
        assert family.tolist() == [FAMILIES.index("order")] + [-1] * 63
        assert set(doc.tolist()) <= {0, 63}
        assert (targets[first:] == IGNORED).all()
    assert (pack_questions(ASKED, first - 1, SUFFIX, END)[4] == -1).all()


def test_never_more_than_63_blocks():
    _, _, _, doc, family = pack_questions(ASKED[:1] * 80, 5000, SUFFIX, END)
    assert (family[:63] >= 0).all()
    assert family[63] == -1
    assert doc.max() == 63
    assert (doc == 62).sum() == (doc == 0).sum()


def _spec(first: int = 5, count: int = 4) -> PackingSpec:
    return PackingSpec((Size(8.0, 2, 120), Size(10.0, 1, 140)), 4, "train", 3, first, count)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    alone = list(batches(_spec(), SUFFIX, END, 0))
    shared = list(batches(_spec(), SUFFIX, END, workers))
    assert len(alone) == len(shared) == 4
    for a, b in zip(alone, shared, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_depends_on_its_number_alone_and_sizes_take_turns():
    whole = list(batches(_spec(), SUFFIX, END, 0))
    rest = list(batches(_spec(first=7, count=2), SUFFIX, END, 0))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(whole[2:], rest, strict=True) for n in a)
    assert [tuple(batch["ids"].shape) for batch in whole] == [(1, 140), (2, 120), (1, 140), (2, 120)]
    assert not torch.equal(whole[0]["ids"], whole[2]["ids"])
    assert not torch.equal(whole[1]["ids"][0], whole[1]["ids"][1])


def test_training_alone_asks_dense_questions():
    spec = PackingSpec((Size(8.0, 8, 400),), 24, "test", 3, 0, 1)
    families = ClipBatches(spec, SUFFIX, END).batch(0)["family"]
    assert (families != len(FAMILIES)).all()
    spec = PackingSpec((Size(8.0, 8, 400),), 24, "train", 3, 0, 1)
    assert (ClipBatches(spec, SUFFIX, END).batch(0)["family"] == len(FAMILIES)).any()
