"""A classifier with its tokenizer, whole and with the tokens of a few texts alone."""

from __future__ import annotations

import random

import pytest

from tests.support.tokenizers import TEXTS, fast, make_bert, word_piece


@pytest.fixture(scope="module")
def bert():
    tokenizer = fast(word_piece(random.Random(3)))
    return make_bert(len(tokenizer) + 2), tokenizer  # two rows that belong to no token


@pytest.fixture(scope="module")
def reduced(bert):
    # Not above: the fixture `interpreter` forks before anything of ours is imported, and after this file is.
    from peft_sparse.distillation import reduce_vocabulary

    return reduce_vocabulary(*bert, texts=TEXTS)
