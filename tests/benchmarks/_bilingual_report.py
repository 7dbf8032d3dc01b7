"""Tables of the benchmark of distillation: scores over seeds, and paired differences over test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from _bench_runs import Results, spread
from rich.console import Console
from rich.table import Table

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


def report(
    results: Results,
    arms: Sequence[str],
    pairs: Sequence[tuple[str, str, str]],
    data: Any,
    seeds: Sequence[int],
    console: Console,
) -> None:
    """Print scores, sizes, times and paired differences of what there is."""
    languages = list(data.tests)
    table = Table("", "seeds", *(f"{one} F1 (sd)" for one in languages), "parameters", "MB", "adapter MB")
    for arm in arms:
        runs = [run for seed in seeds if (run := results.get(arm, seed))]
        if runs:
            scores = {code: [run["scores"][code] for run in runs] for code in languages}
            sizes = [f"{runs[0]['parameters']:,}", f"{runs[0]['megabytes']:.1f}", f"{runs[0]['adapter_megabytes']:.1f}"]
            cells = [f"{mean(own):.1f} ({spread(own, 1)})" for own in scores.values()]
            table.add_row(arm, str(len(runs)), *cells, *sizes)
    console.print(table)
    for seed in seeds:
        if run := results.get("time", seed):
            console.print(f"seed {seed}: {run['milliseconds']} ms an example, ratio {run['ratio']:.2f}; {run['vocabulary']}")
    table = Table("difference", "language", "points [95 %]", "by seed", "verdict", "thesis")
    for one, other, expected in pairs:
        shared = [seed for seed in seeds if results.get(one, seed) and results.get(other, seed)]
        for code in languages if shared else ():
            truth = [row["label"] for row in data.tests[code]]
            answers = [[results.get(arm, seed)["answers"][code] for seed in shared] for arm in (one, other)]
            found = paired(truth, *answers)
            each = ", ".join(f"{d:+.1f}" for d in found.by_seed)
            interval = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
            table.add_row(f"{one} - {other}", code, interval, each, found.verdict, expected)
    console.print(table)
