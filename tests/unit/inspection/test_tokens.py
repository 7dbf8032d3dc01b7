"""Rows of an embedding matrix that changed most, and the tokens that they belong to."""

from __future__ import annotations

import logging
from math import sqrt

import pytest
import torch

from peft_sparse import ConfigError
from peft_sparse.core.delta import SparseDelta
from peft_sparse.inspection.reading import Adapter, read_adapter
from peft_sparse.inspection.tokens import ChangedRow, changed_rows, embedding_matrix, load_tokenizer, token_text
from tests.support.known_adapters import QUERY, WORDS, first, save
from tests.support.tokenizers import of_words


def save_tokenizer(folder, words: list[str]) -> None:
    of_words(words, unk=words[0]).save_pretrained(folder)


def matrix(entries: dict[int, float], shape: tuple[int, ...]) -> SparseDelta:
    indices = torch.tensor(sorted(entries), dtype=torch.int32)
    return SparseDelta(indices, torch.tensor([entries[i] for i in sorted(entries)]), shape)


def test_rows_by_norm():
    delta = matrix({0: 3.0, 2: -4.0, 4: 1.0, 7: 0.0, 9: 5.0}, (5, 3))
    assert changed_rows(delta) == [
        ChangedRow(0, 5.0, 2),
        ChangedRow(3, 5.0, 1),
        ChangedRow(1, 1.0, 1),
        ChangedRow(2, 0.0, 1),
    ]
    assert changed_rows(matrix({3: 0.0}, (3, 3))) == [ChangedRow(1, 0.0, 1)]
    assert changed_rows(delta, top=1) == [ChangedRow(0, 5.0, 2)]
    assert changed_rows(SparseDelta.empty((5, 3))) == []
    assert changed_rows(matrix({0: 1.0, 1: 1.0}, (1, 2)))[0].norm == pytest.approx(sqrt(2), rel=1e-15)


def test_rows_need_a_matrix():
    with pytest.raises(ValueError, match=r"delta must be of a matrix, got one of shape \(4,\)"):
        changed_rows(matrix({0: 1.0}, (4,)))


def test_the_matrix_is_that_of_the_words():
    deltas = {
        "embeddings.position_embeddings.weight": matrix({0: 1.0}, (3, 3)),
        WORDS: matrix({0: 1.0}, (4, 3)),
        "embeddings.LayerNorm.weight": matrix({0: 1.0}, (9,)),
        QUERY: matrix({0: 1.0}, (10, 2)),
    }
    assert embedding_matrix(deltas) == WORDS
    assert embedding_matrix({QUERY: deltas[QUERY], WORDS: SparseDelta.empty((4, 3))}) is None


class Bytes:
    """A tokenizer with awkward tokens."""

    texts = ("a", " a", "\n", "\ufffd", "$x$", "\u200b", "")

    def __len__(self) -> int:
        return len(self.texts)

    def decode(self, token_ids):
        return self.texts[token_ids[0]]

    def convert_ids_to_tokens(self, ids):
        return "<0xE2>" if ids == 3 else ""


def test_tokens_can_be_seen():
    shown = [token_text(Bytes(), token) for token in range(8)]
    assert shown == ["a", "␣a", "\\n", "<0xE2>", "$x$", "\\u200b", "row 6", "row 7"]


def test_tokenizer_of_the_folder_comes_before_that_of_the_base_model(tmp_path):
    base = tmp_path / "base"
    save_tokenizer(base, ["x", "y"])
    adapter = read_adapter(save(tmp_path / "adapter", first(), base_model_name_or_path=str(base)))
    assert load_tokenizer(adapter).convert_ids_to_tokens(1) == "y"
    save_tokenizer(adapter.folder, ["x", "z"])
    assert load_tokenizer(adapter).convert_ids_to_tokens(1) == "z"


def test_no_tokenizer_is_a_note(tmp_path, caplog):
    adapter = read_adapter(save(tmp_path / "adapter", first(), base_model_name_or_path=str(tmp_path / "gone")))
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        assert load_tokenizer(adapter) is None
    assert "No tokens are shown for 'adapter'" in caplog.text
    assert "Name one (tokenizer)" in caplog.text


def test_an_adapter_without_embeddings_needs_no_tokenizer(caplog):
    assert load_tokenizer(Adapter("a", "", {}, {QUERY: first()[QUERY]}), "nowhere/at-all") is None
    assert caplog.text == ""


def test_a_named_tokenizer_must_be_there_and_fit(tmp_path):
    adapter = read_adapter(save(tmp_path / "adapter", first()))
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from there"):
        load_tokenizer(adapter, str(tmp_path / "adapter"))
    save_tokenizer(tmp_path / "large", list("abcde"))
    with pytest.raises(ConfigError, match=r"has 5 tokens, but 'embeddings.* of 'adapter' only 4 rows"):
        load_tokenizer(adapter, str(tmp_path / "large"))
    save_tokenizer(tmp_path / "right", list("abcd"))
    assert load_tokenizer(adapter, str(tmp_path / "right")).convert_ids_to_tokens(3) == "d"
