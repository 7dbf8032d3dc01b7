"""Sentences to rows to batches: which subword belongs to which word, and what is refused."""

from __future__ import annotations

import pytest
import torch

from peft_sparse import ParserCollator, encode_sentences
from peft_sparse.errors import ConfigError
from peft_sparse.parsing import RELATIONS
from tests.support.parsers import LABELS, tokenizer

LABEL2ID = {name: i for i, name in enumerate(LABELS)}
SENTENCE = {"words": ["the", "dogs", "sees"], "heads": [2, 3, 0], "relations": ["det", "nsubj:pass", "root"]}


def test_words_heads_and_relations_go_where_they_belong():
    (row,), too_long = encode_sentences(tokenizer(), [SENTENCE], label2id=LABEL2ID)
    assert too_long == []
    assert row["word_ids"] == [-1, 0, 1, 1, 2, 2, -1]
    assert (row["labels_arcs"], row["labels_rels"]) == ([2, 3, 0], [0, 1, 3])
    assert len(row["input_ids"]) == len(row["attention_mask"]) == 7


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded(side):
    words = tokenizer()
    words.padding_side = side
    short = {"words": ["sees"], "heads": [0], "relations": ["root"]}
    rows, _ = encode_sentences(words, [SENTENCE, short], label2id=LABEL2ID)
    batch = ParserCollator(words)(rows)
    padded = [-1, 0, 0, -1]
    assert batch["word_ids"][1].tolist() == ([-1] * 3 + padded if side == "left" else padded + [-1] * 3)
    assert torch.equal(batch["word_ids"] >= 0, (batch["input_ids"] > 3))
    assert batch["labels_arcs"].tolist() == [[2, 3, 0], [0, -100, -100]]
    assert batch["labels_rels"].tolist() == [[0, 1, 3], [3, -100, -100]]
    unlabelled, _ = encode_sentences(words, [{"words": ["dogs"]}])
    assert "labels_arcs" not in ParserCollator(words)(unlabelled)


def test_a_word_of_which_nothing_is_left_is_an_unknown_word():
    (row,), _ = encode_sentences(tokenizer(), [{"words": ["dogs", " ", "sees"]}])
    assert row["word_ids"] == [-1, 0, 0, 1, 2, 2, -1]
    assert row["input_ids"][3] == 1


def test_sentences_that_are_too_long_are_told(caplog):
    rows, too_long = encode_sentences(tokenizer(), [SENTENCE, {"words": ["dogs"]}], label2id=LABEL2ID, max_length=4)
    assert (len(rows), too_long) == (1, [0])
    assert "1 of 2 sentences have more than 4 subwords" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": []}, "sentence 0 has no words"),
        ({"heads": [2, 3]}, "3 words, 2 heads and 3 relations"),
        ({"heads": [2, 3, 4]}, r"head 4, and heads are 0 \(the root\) to 3"),
        ({"relations": ["det", "nsubj", "rooot"]}, "relation 'rooot', which is none of"),
    ],
)
def test_sentences_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        encode_sentences(tokenizer(), [{**SENTENCE, **change}], label2id=LABEL2ID)


def test_relations_are_the_published_ones_in_their_order():
    assert len(RELATIONS) == 38
    assert (RELATIONS[0], RELATIONS[1], RELATIONS[-1]) == ("_", "acl", "xcomp")
    assert list(RELATIONS[1:]) == sorted(RELATIONS[1:])
