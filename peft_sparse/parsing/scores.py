"""Unlabelled and labelled attachment scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError

# What padded words have as heads and as relations.
IGNORED = -100
# Heads and relations of the words of a sentence; relations as texts or as ids.
Parse = tuple[Sequence[int], Sequence[Any]]


def attachment_scores(predicted: Sequence[Parse], gold: Sequence[Parse], *, roots: bool = True) -> dict[str, float]:
    """Shares of the words with the right head (UAS), and with the right head and relation (LAS).

    All words count, punctuation too.

    Args:
        predicted, gold: of each sentence (heads, relations); head 0 is the root, j word j.
        roots: False leaves out words whose right head is the root, as the published scores of composable-sft's parsers
            do, which took that head for padding.

    Returns:
        {"uas": ..., "las": ...}, in [0, 1]; NaN if no word counts.

    Raises:
        ConfigError: not the same number of sentences, or of words in one of them; heads that are texts, or relations
            that are names on one side and ids on the other.
    """
    if len(predicted) != len(gold):
        raise ConfigError(f"predicted must hold as many sentences as gold, got {len(predicted)} and {len(gold)}.")
    found = []
    for number, (own, right) in enumerate(zip(predicted, gold, strict=True)):
        lengths = [len(part) for part in (*own, *right)]
        if len(set(lengths)) != 1:
            raise ConfigError(
                f"sentence {number}: predicted and gold heads and relations must be as many, got {lengths}."
            )
        found += list(zip(*own, *right, strict=True))
    if any(isinstance(word[0], str) or isinstance(word[2], str) for word in found):
        raise ConfigError("heads must be numbers (0 the root, j word j), got texts.")
    if len({isinstance(relation, str) for word in found for relation in (word[1], word[3])}) > 1:
        raise ConfigError("relations of predicted and gold must be names in both or ids in both, got some of either.")
    counted = [word for word in found if roots or word[2] != 0]
    if not counted:
        return {"uas": float("nan"), "las": float("nan")}
    right_heads = [word for word in counted if word[0] == word[2]]
    right_both = sum(word[1] == word[3] for word in right_heads)
    return {"uas": len(right_heads) / len(counted), "las": right_both / len(counted)}


def attachment_metrics(prediction: Any, *, roots: bool = True) -> dict[str, float]:
    """The scores of a `BiaffineParser`'s predictions, as a trainer's `compute_metrics`.

    Args:
        prediction: a trainer's `EvalPrediction`: predictions (heads, relations) and label_ids (heads, relations), each
            [sentences, words] with -100 where there is no word.
        roots: as in `attachment_scores`.

    Returns:
        {"uas": ..., "las": ...}
    """
    heads, relations = (np.asarray(part) for part in prediction.predictions[:2])
    gold_heads, gold_relations = (np.asarray(part) for part in prediction.label_ids)
    words = gold_heads != IGNORED
    own, right = (heads[words], relations[words]), (gold_heads[words], gold_relations[words])
    return attachment_scores([own], [right], roots=roots)
