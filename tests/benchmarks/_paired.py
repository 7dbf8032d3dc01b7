"""Paired comparison of answers to the same test rows, over several seeds, by macro F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

RESAMPLES = 2000
_BLOCK = 250


@dataclass(frozen=True)
class Paired:
    """A difference of macro F1, in points.

    Attributes:
        mean: over seeds.
        low, high: ends of its 95 % interval over test rows.
        by_seed: each seed's.
    """

    mean: float
    low: float
    high: float
    by_seed: list[float]

    @property
    def verdict(self) -> str:
        """What it says of an order in which the first is the better one."""
        return "confirmed" if self.low > 0 else "refuted" if self.high < 0 else "open"


def paired(
    truth: Sequence[str], ones: Sequence[Sequence[str]], others: Sequence[Sequence[str]], *, resamples: int = RESAMPLES
) -> Paired:
    """Compare two ways of answering the same rows, over several seeds.

    Args:
        truth: the label of each row.
        ones, others: for each seed the answers to all rows.
        resamples: how often rows are drawn, the same ones for both and all seeds.
    """
    labels = sorted(set(truth))
    number = {label: i for i, label in enumerate(labels)}
    gold = np.array([number[label] for label in truth])
    given = [[np.array([number[label] for label in run]) for run in runs] for runs in (ones, others)]
    everything = np.arange(len(gold))[None]
    by_seed = [
        float(macro_f1(gold, one, everything)[0] - macro_f1(gold, other, everything)[0])
        for one, other in zip(*given, strict=True)
    ]
    chance = np.random.default_rng(0)
    found: list[np.ndarray] = []
    for start in range(0, resamples, _BLOCK):
        drawn = chance.integers(len(gold), size=(min(_BLOCK, resamples - start), len(gold)))
        differences = [macro_f1(gold, a, drawn) - macro_f1(gold, b, drawn) for a, b in zip(*given, strict=True)]
        found.append(np.mean(differences, axis=0))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Paired(100 * mean(by_seed), 100 * float(low), 100 * float(high), [100 * one for one in by_seed])


def macro_f1(truth: np.ndarray, answers: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Macro F1 of rows that were drawn; a class that is neither there nor answered is left out of the mean.

    Args:
        truth, answers: [n] numbers of classes, from 0.
        drawn: [R, n] rows.

    Returns:
        [R].
    """
    classes = range(int(max(truth.max(), answers.max())) + 1)
    scores = []
    for one in classes:
        is_true, is_given = truth == one, answers == one
        both = (is_true & is_given)[drawn].sum(1)
        size = is_true[drawn].sum(1) + is_given[drawn].sum(1)
        scores.append(np.where(size > 0, 2 * both / np.maximum(size, 1), np.nan))
    return np.nanmean(scores, axis=0)
