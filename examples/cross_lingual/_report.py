"""Scores with a paired bootstrap over rows, as a table, a plot and a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table


@dataclass(frozen=True)
class Difference:
    """How far one way is above another on the same rows, in points, and what a bootstrap says of it.

    Attributes:
        mean: the difference.
        low, high: ends of its 95 % interval.
        error: its standard error.
    """

    mean: float
    low: float
    high: float
    error: float


def paired_bootstrap(
    rows: Sequence[Any],
    answers: Sequence[Any],
    others: Sequence[Any],
    score: Callable[[Sequence[Any], Sequence[Any]], float],
    *,
    resamples: int,
    seed: int = 0,
) -> Difference:
    """The difference of two scores on rows that are drawn again and again, the same rows for both."""
    chance = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = chance.integers(len(rows), size=len(rows))
        chosen = [rows[i] for i in drawn]
        found.append(score(chosen, [answers[i] for i in drawn]) - score(chosen, [others[i] for i in drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    mean = score(rows, answers) - score(rows, others)
    return Difference(*(100 * float(value) for value in (mean, low, high, np.std(found))))


def table(title: str, scores: dict[str, dict[str, float]], differences: dict[str, Difference], *, of: str) -> Table:
    """A row for each test, a column for each way, and the differences, of which `of` says what they are."""
    ways = list(next(iter(scores.values())))
    made = Table("", *ways, *([f"{of} \\[95 %]"] if differences else []), title=title)
    for language, own in scores.items():
        cells = [f"{100 * own[way]:.1f}" for way in ways]
        if differences:
            d = differences[language]
            cells.append(f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]")
        made.add_row(language, *cells)
    return made


def plot(title: str, scores: dict[str, dict[str, float]], path: Path) -> None:
    """A row for each language, and in it a point for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    languages = list(scores)
    figure, axes = plt.subplots(figsize=(6.5, 1.5 + 0.4 * len(languages)), layout="constrained")
    for way, marker in zip(next(iter(scores.values())), "os^Dv", strict=False):
        axes.scatter([100 * scores[language][way] for language in languages], languages, marker=marker, label=way)
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
