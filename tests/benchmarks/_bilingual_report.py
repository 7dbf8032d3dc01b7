"""Tables of the benchmark of distillation: scores over seeds, and paired differences over test rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from _bench_runs import Results, spread
from _paired import paired
from rich.console import Console
from rich.table import Table


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
            spent = ", ".join(f"{name} {own:.1f}" for name, own in run["milliseconds"].items())
            console.print(f"seed {seed}: ms an example {spent}; ratio {run['ratio']:.2f}; {run['vocabulary']}")
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
