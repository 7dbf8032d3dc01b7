"""Scores, paired comparisons, and the table and plot of the cross-lingual benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from _bench_runs import spread
from rich.table import Table

RESAMPLES = 1000
TASK, BOTH = "task", "both"
# How far from the middle of a method's line in the plot.
OFFSETS = {TASK: 0.16, BOTH: -0.16}
SHOWN = {TASK: "task", BOTH: "task + language"}


def score(metric: str, confusion: np.ndarray) -> np.ndarray:
    """Percent, of confusion matrices [..., true class, predicted class] of counts.

    A class that is neither in the rows nor predicted has F1 0, as scikit-learn counts it.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    if metric == "accuracy":
        return 100 * right.sum(-1) / confusion.sum((-2, -1))
    return 100 * (2 * right / np.maximum(1, confusion.sum(-1) + confusion.sum(-2))).mean(-1)


@dataclass(frozen=True)
class Scorer:
    """The metric, and what the predictions are compared with.

    Attributes:
        metric: "macro F1" or "accuracy".
        num_labels: how many classes.
        truth: {language: class of each row}.
        ids: {language: id of each row}. Rows of one id are translations of each other, so they are drawn together.
        targets: the languages that a mean is over.
    """

    metric: str
    num_labels: int
    truth: dict[str, list[int]]
    ids: dict[str, list[int]]
    targets: list[str]

    def of(self, language: str, predictions: Sequence[int]) -> float:
        return self.score_rows(predictions, self.truth[language])

    def score_rows(self, predictions: Sequence[int], truth: Sequence[int]) -> float:
        cells = self._cells(predictions, truth)
        return float(score(self.metric, cells.sum(0).reshape(self.num_labels, self.num_labels)))

    def mean_of(self, predictions: dict[str, list[int]]) -> float:
        return mean(self.of(language, predictions[language]) for language in self.targets)

    def error(self, runs: list[dict], others: list[dict]) -> float:
        """Standard error over test rows of the difference of the means over seeds and target languages (bootstrap).

        Args:
            runs, others: {language: predictions} of each seed.
        """
        known = sorted({i for language in self.targets for i in self.ids[language]})
        place = {i: number for number, i in enumerate(known)}
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(len(known), [1 / len(known)] * len(known), size=RESAMPLES).astype(float)

        def means(found: list[dict]) -> np.ndarray:
            parts = []
            for language in self.targets:
                times = drawn[:, [place[i] for i in self.ids[language]]]
                for predictions in found:
                    counts = times @ self._cells(predictions[language], self.truth[language])
                    parts.append(score(self.metric, counts.reshape(-1, self.num_labels, self.num_labels)))
            return np.mean(parts, axis=0)

        return float((means(runs) - means(others)).std(ddof=1))

    def _cells(self, predictions: Sequence[int], truth: Sequence[int]) -> np.ndarray:
        """[rows, classes * classes]: which cell of the confusion matrix each row falls into."""
        cells = np.asarray(truth) * self.num_labels + np.asarray(predictions)
        return np.eye(self.num_labels**2)[cells]


@dataclass(frozen=True)
class Row:
    """What is known of a method, alone or with language adapters.

    Attributes:
        method: its name.
        kind: TASK or BOTH.
        trained: number of weights in the task adapter, the head aside.
        rate: learning rate of the task adapter.
        seconds: processor time of the training of a task adapter, or of a language adapter.
        runs: {seed: {language: predictions}}.
    """

    method: str
    kind: str
    trained: int
    rate: float
    seconds: float
    runs: dict[int, dict[str, list[int]]]

    def scores(self, language: str, scorer: Scorer) -> list[float]:
        return [scorer.of(language, run[language]) for run in self.runs.values() if language in run]

    def means(self, scorer: Scorer) -> dict[int, float]:
        """{seed: mean over the target languages}, of the seeds that have all of them."""
        whole = {seed: run for seed, run in self.runs.items() if all(t in run for t in scorer.targets)}
        return {seed: scorer.mean_of(run) for seed, run in whole.items()}


def difference(row: Row, other: Row | None, scorer: Scorer) -> str:
    """Mean difference over the seeds that both have, its spread over them, and its standard error over rows."""
    ours, theirs = row.means(scorer), other.means(scorer) if other else {}
    common = [seed for seed in ours if seed in theirs]
    if other is None or other is row or not common:
        return ""
    differences = [ours[seed] - theirs[seed] for seed in common]
    error = scorer.error([row.runs[s] for s in common], [other.runs[s] for s in common])
    return f"{mean(differences):+.1f} ({spread(differences, 1)}; {error:.1f})"


def cells(rows: list[Row], languages: list[str], scorer: Scorer, reference: str) -> tuple[list[str], list[list[str]]]:
    """(headings, lines) of the table: the rows of a method under each other, the best task adapter first."""
    found = {(row.method, row.kind): row for row in rows}

    def height(row: Row) -> float:
        alone = found.get((row.method, TASK), row).means(scorer).values()
        return mean(alone) if alone else 0.0

    lines = []
    for row in sorted(rows, key=lambda row: (-height(row), row.method, row.kind != TASK)):
        means = list(row.means(scorer).values())
        line = [row.method, SHOWN[row.kind], f"{row.trained:,}", f"{row.rate:g}", str(len(row.runs))]
        for language in languages:
            scores = row.scores(language, scorer)
            line.append(f"{mean(scores):.1f} ({spread(scores, 1)})" if scores else "")
        line.append(f"{mean(means):.1f} ({spread(means, 1)})" if means else "")
        line.append(difference(row, found.get((reference, row.kind)), scorer))
        line.append(difference(row, found.get((row.method, TASK)), scorer) if row.kind == BOTH else "")
        lines.append([*line, f"{row.seconds:.0f}"])
    headings = ["method", "adapters", "weights", "rate", "seeds", *languages, "mean of targets"]
    return [*headings, f"- {reference}", "- task alone", "CPU s"], lines


CAPTION = (
    "mean (standard deviation over seeds), in percent. Differences of the mean over the target languages, seed by "
    "seed: mean (standard deviation over seeds; standard error over test rows, by bootstrap)."
)


def rich_table(title: str, headings: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, caption=CAPTION)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(title: str, headings: list[str], lines: list[list[str]]) -> str:
    rule = [":--" if number < 2 else "--:" for number in range(len(headings))]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *lines])
    return f"# {title}\n\n{rows}\n\n{CAPTION}\n"


def plot(rows: list[Row], languages: list[str], scorer: Scorer, path: Path, title: str) -> None:
    """A panel for each language, on one scale: methods from the best down, an open circle for the task adapter alone,
    below it a filled one with the language adapter, small ticks for single seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best: dict[str, float] = {}
    for row in rows:
        if row.kind == TASK and row.means(scorer):
            best[row.method] = mean(row.means(scorer).values())
    order = sorted(best, key=best.__getitem__)
    if not order:
        return
    panels = ["mean of targets", *languages]
    size = (2.1 * len(panels) + 1.2, 0.46 * len(order) + 1.6)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for row in rows:
            found = list(row.means(scorer).values()) if panel == panels[0] else row.scores(panel, scorer)
            if row.method in best and found:
                height = order.index(row.method) + OFFSETS[row.kind]
                face = "white" if row.kind == TASK else "black"
                axis.plot(found, [height] * len(found), "|", color="0.55", markersize=7, zorder=1)
                axis.plot(mean(found), height, "o", color="black", markerfacecolor=face, markersize=6, zorder=2)
        axis.set_title(panel, fontsize=10)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_yticks(range(len(order)), order)
    axes[0][0].margins(y=0.08)
    marks = "open: task adapter alone; filled: plus language adapter; ticks: single seeds"
    figure.suptitle(f"{title}\n{marks}", fontsize=10)
    figure.supxlabel(f"{scorer.metric} in percent", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
