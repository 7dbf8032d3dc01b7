"""Pictures of `instruction_quality.py`: how forgiving each method's rate is, and what it makes the model forget."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(searched: dict[str, dict[float, dict]], untuned: dict | None, path: Path) -> None:
    """Loss by learning rate for each method, and beside it the loss on other text against that on the task.

    Args:
        searched: {method: {learning rate: run}} of one seed.
        untuned: the run of the untuned model, if there is one.
        path: the picture's file.
    """
    curves = {name: sorted(runs.items()) for name, runs in searched.items() if runs}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for number, (name, runs) in enumerate(curves.items()):
        style = {"marker": "os^Dv*"[number // 10 % 6], "color": f"C{number % 10}", "label": name, "markersize": 4}
        left.plot([rate for rate, _ in runs], [run["loss"] for _, run in runs], **style)
        with_other = [run for _, run in runs if "general" in run]
        right.plot([run["general"] for run in with_other], [run["loss"] for run in with_other], **style)
    bottom, top = visible(curves)
    for axes in (left, right):
        axes.set_ylim(bottom, top)
        axes.set_ylabel("held-out loss of the task, nats")
        axes.grid(alpha=0.3)
    left.set_xscale("log", base=2)
    rates = sorted({rate for runs in curves.values() for rate, _ in runs})
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.minorticks_off()
    left.set_xlabel("learning rate")
    right.set_xlabel("loss on other text, nats")
    if untuned and "general" in untuned:
        right.axvline(untuned["general"], color="grey", linestyle=":", label="untuned")
    left.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def visible(curves: dict[str, list[tuple[float, dict]]]) -> tuple[float, float]:
    """The losses that are worth their space: of each method the best, and those at half and twice its rate."""
    best = {name: min(runs, key=lambda item: item[1]["loss"]) for name, runs in curves.items()}
    near = [
        run["loss"]
        for name, runs in curves.items()
        for rate, run in runs
        if best[name][0] / 2.1 < rate < best[name][0] * 2.1 and math.isfinite(run["loss"])
    ]
    margin = 0.05 * (max(near) - min(near)) + 1e-6
    return min(near) - margin, max(near) + margin
