"""Which runs `instruction_quality.py` still wants, in which order, and its table of those that are there."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean

from _bench_runs import Results, spread
from _quality_methods import LORA, UNTUNED, Method
from rich.table import Table

# A search over learning rates ends here, bracketed or not.
MOST_RATES = 6


def finite(loss: float) -> float:
    """A loss to sort by: a run that diverged comes last."""
    return loss if math.isfinite(loss) else math.inf


# ---- which runs, and in which order ----------------------------------------------------------------


def rates_run(results: Results, name: str, seed: int) -> dict[float, dict]:
    """{learning rate: run} of a method and a seed."""
    return {rate: run for (method, rate, s), run in results.items() if method == name and s == seed}


def best_rate(results: Results, name: str, seed: int) -> float | None:
    """The learning rate with the lowest loss at this seed, of those that have run."""
    found = rates_run(results, name, seed)
    return min(found, key=lambda rate: finite(found[rate]["loss"])) if found else None


def next_rates(rates: tuple[float, ...], results: Results, name: str, seed: int, *, search: bool = True) -> list[float]:
    """What a method's search still wants: its own rates, then one beyond the best where that lies at an end."""
    found = rates_run(results, name, seed)
    if missing := [rate for rate in rates if rate not in found]:
        return missing
    best = best_rate(results, name, seed)
    assert best is not None
    if not search or len(found) >= MOST_RATES or min(found) < best < max(found):
        return []
    return [best * 2 if best == max(found) else best / 2]


def wanted(
    methods: dict[str, Method], seeds: list[int], results: Results, *, search: bool = True, seeds_first: bool = False
) -> list[tuple[str, float, int]]:
    """(method, learning rate, seed) of all runs that can start now, the most telling first.

    Args:
        methods: {name: method}.
        seeds: the first searches.
        results: what has run.
        search: whether rates beyond a method's own are tried.
        seeds_first: whether all seeds run at each method's first rate before the first seed runs at others; none of
            them then runs at the best.
    """
    first = [] if results.get(UNTUNED, 0.0, seeds[0]) else [(UNTUNED, 0.0, seeds[0])]
    searched, beyond, others = [], [], []
    for name, method in methods.items():
        missing = next_rates(method.learning_rates, results, name, seeds[0], search=search)
        given = [rate for rate in missing if rate in method.learning_rates]
        searched += [(method.learning_rates.index(rate), (name, rate, seeds[0])) for rate in given]
        beyond += [(name, rate, seeds[0]) for rate in missing if rate not in method.learning_rates]
        best = best_rate(results, name, seeds[0])
        if not missing and best is not None and not seeds_first:
            loss = finite(results.get(name, best, seeds[0])["loss"])
            others += [((name != LORA, loss), (name, best, s)) for s in seeds[1:] if not results.get(name, best, s)]
    in_order = [run for _, run in sorted(searched, key=lambda item: item[0])]
    if seeds_first:
        at_first = [(name, method.learning_rates[0], s) for s in seeds[1:] for name, method in methods.items()]
        others_first = [run for run in at_first if not results.get(*run)]
        new = sum(index == 0 for index, _ in searched)
        return first + in_order[:new] + others_first + in_order[new:] + beyond
    return first + in_order + beyond + [run for _, run in sorted(others, key=lambda item: item[0])]


# ---- the table -------------------------------------------------------------------------------------


def paired(runs: list[dict], others: list[dict]) -> str:
    """Mean difference of runs with the same seeds, its spread over them, and its standard error over held-out rows."""
    differences = [run["loss"] - other["loss"] for run, other in zip(runs, others, strict=True)]
    counts = [count for _, count in runs[0]["rows"]]
    rows = [
        mean(run["rows"][i][0] - other["rows"][i][0] for run, other in zip(runs, others, strict=True))
        for i in range(len(counts))
    ]
    total, n = sum(counts), len(counts)
    ratio = sum(rows) / total
    squares = sum((row - ratio * count) ** 2 for row, count in zip(rows, counts, strict=True))
    error = math.sqrt(squares * n / max(1, n - 1)) / total
    return f"{mean(differences):+.4f} ({spread(differences)}; {error:.4f})"


def general(*runs: dict) -> str:
    """Mean loss on other text, where it was measured."""
    found = [run["general"] for run in runs if "general" in run]
    return f"{mean(found):.4f}" if found else ""


def table(methods: dict[str, Method], results: Results, options: argparse.Namespace, name: str) -> Table:
    """What has run so far, best first: each method at its best rate, or with `--seeds-first` at its first."""
    seeds = options.seeds
    caption = "loss: mean (standard deviation over seeds). - LoRA: mean (same, over seeds; standard error over rows)"
    size = f"{options.steps} steps of {options.batch_size} rows, density {options.density:g}"
    title = f"{name}: {Path(options.model).name}, {size}"
    shown = Table(title=title, caption=caption)
    shown.add_column("method")
    for heading in ("trained", "learning rate", "first seed by rate", "seeds", "loss", "- LoRA", "other text", "s/run"):
        shown.add_column(heading, justify="right")
    if untuned := results.get(UNTUNED, 0.0, 0):
        shown.add_row(UNTUNED, "0", "", "", "", f"{untuned['loss']:.4f}", "", general(untuned), "")

    def runs_of(name: str) -> dict[int, dict]:
        rate = methods[name].learning_rates[0] if options.seeds_first else best_rate(results, name, seeds[0])
        return {seed: run for seed in seeds if rate is not None and (run := results.get(name, rate, seed))}

    found = {name: runs for name in methods if (runs := runs_of(name))}
    base = found.get(LORA, {})
    for name, runs in sorted(found.items(), key=lambda item: finite(mean(run["loss"] for run in item[1].values()))):
        losses = [run["loss"] for run in runs.values()]
        searched = sorted(rates_run(results, name, seeds[0]).items())
        common = [seed for seed in runs if seed in base]
        last = next(iter(runs.values()))
        shown.add_row(
            name,
            f"{last['trained']:,}",
            f"{last['learning_rate']:g}",
            " ".join(f"{rate:g}: {run['loss']:.4f}" for rate, run in searched),
            str(len(losses)),
            f"{mean(losses):.4f} ({spread(losses)})",
            paired([runs[s] for s in common], [base[s] for s in common]) if common and name != LORA else "",
            general(*runs.values()),
            f"{mean(run['seconds'] for run in runs.values()):.0f}",
        )
    return shown
