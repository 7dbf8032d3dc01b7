"""Sentences as a `BiaffineParser` takes them: words cut into subwords, their heads, and their relations as ids."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .scores import IGNORED

logger = logging.getLogger(__name__)

NO_WORD = -1
_WORD_IDS, _LABELS = "word_ids", ("labels_arcs", "labels_rels")


def encode_sentences(
    tokenizer: Any,
    sentences: Iterable[Mapping[str, Any]],
    *,
    label2id: Mapping[str, int] | None = None,
    max_length: int | None = None,
) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Rows for a trainer, or for a `ParserCollator`.

    Args:
        tokenizer: a fast tokenizer.
        sentences: {"words": texts, "heads": numbers, "relations": texts}; the last two may be missing. Head 0 is the
            root, j the j-th word. A subtype of a relation counts as the relation ("nsubj:pass" as "nsubj") where the
            labels have it not.
        label2id: {relation: id}, a parser's `config.label2id`; needed where there are relations.
        max_length: longest row, in subwords; the tokenizer's own limit if None.

    Returns:
        rows {"input_ids", "attention_mask", ..., "word_ids", "labels_arcs", "labels_rels"}, of the sentences that fit;
        the indices of those that are longer, for which there is none. A parser needs all words of a sentence.

    Raises:
        ConfigError: a slow tokenizer, a sentence without words, heads or relations that are not one for each word, a
            head that is no word of the sentence, or a relation that is no label.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"tokenizer must be a fast one, which knows the words of its tokens: {type(tokenizer)}.")
    limit = max_length or tokenizer.model_max_length
    rows, too_long = [], []
    for number, sentence in enumerate(sentences):
        words = [str(word) for word in sentence["words"]]
        labels = _labels(sentence, len(words), label2id, f"sentence {number}")
        row = _subwords(tokenizer, words)
        if len(row["input_ids"]) > limit:
            too_long.append(number)
        else:
            rows.append({**row, **labels})
    if too_long:
        logger.warning(
            "%d of %d sentences have more than %d subwords and are left out.",
            len(too_long),
            len(too_long) + len(rows),
            limit,
        )
    return rows, too_long


def _subwords(tokenizer: Any, words: list[str]) -> dict[str, list[int]]:
    """The row of a sentence; a word of which the tokenizer leaves nothing (a control character) is an unknown one."""
    encoded = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
    missing = set(range(len(words))) - set(encoded.word_ids())
    if missing:
        unknown = tokenizer.unk_token or "?"
        words = [unknown if place in missing else word for place, word in enumerate(words)]
        encoded = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
    places = [NO_WORD if place is None else place for place in encoded.word_ids()]
    return {**{name: list(ids) for name, ids in encoded.items()}, _WORD_IDS: places}


def _labels(
    sentence: Mapping[str, Any], count: int, label2id: Mapping[str, int] | None, where: str
) -> dict[str, list[int]]:
    if not count:
        raise ConfigError(f"{where} has no words.")
    if "heads" not in sentence:
        return {}
    heads, relations = [int(head) for head in sentence["heads"]], list(sentence["relations"])
    if not len(heads) == len(relations) == count:
        raise ConfigError(
            f"{where} has {count} words, {len(heads)} heads and {len(relations)} relations: one for each word."
        )
    for head in heads:
        if not 0 <= head <= count:
            raise ConfigError(f"{where} has a head {head}, and heads are 0 (the root) to {count}, its number of words.")
    if label2id is None:
        raise ConfigError(f"{where} has relations, which need label2id, the parser's config.label2id.")
    ids = []
    for relation in relations:
        known = relation if relation in label2id else str(relation).partition(":")[0]
        if known not in label2id:
            raise ConfigError(f"{where} has the relation {relation!r}, which is none of {sorted(label2id)}.")
        ids.append(label2id[known])
    return dict(zip(_LABELS, (heads, ids), strict=True))


class ParserCollator:
    """Pads rows of `encode_sentences` to batches: subwords as the tokenizer pads, words and labels at the right.

    Args:
        tokenizer: the rows'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """[batch, subwords] of ids and word ids (-1: no word), [batch, words] of labels (-100: no word)."""
        own = {_WORD_IDS, *_LABELS}
        plain = [{name: value for name, value in row.items() if name not in own} for row in rows]
        batch = dict(self.tokenizer.pad(plain, return_tensors="pt"))
        length = batch["input_ids"].shape[1]
        left = self.tokenizer.padding_side == "left"
        batch[_WORD_IDS] = _padded([row[_WORD_IDS] for row in rows], length, NO_WORD, left=left)
        for name in _LABELS:
            if all(name in row for row in rows):
                words = max(len(row[name]) for row in rows)
                batch[name] = _padded([row[name] for row in rows], words, IGNORED)
        return batch


def _padded(lists: Sequence[Sequence[int]], length: int, value: int, *, left: bool = False) -> Tensor:
    filler = [[value] * (length - len(one)) for one in lists]
    return torch.tensor([[*f, *one] if left else [*one, *f] for f, one in zip(filler, lists, strict=True)])
