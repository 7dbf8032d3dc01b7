"""The rows of the benchmark of MAD-G on real text, as a table and a plot."""

from __future__ import annotations

import argparse
from statistics import mean

from _bench_runs import Results
from rich.console import Console
from rich.table import Table

NONE, OWN, MEAN, GENERATED, NEW = "none", "own", "mean of own", "generated, 1,000 words", "new, 1,000 words"
KINDS = {"MAD-G": None, "MAD-G-LS": 32}
PARTS = [NONE, *KINDS, GENERATED, NEW, OWN, MEAN]


def rows_of(results: Results, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{row: {language: loss}} of what was measured."""
    table = {}
    names = [NONE, *(f"{kind}{end}" for kind in KINDS for end in ("-en", "")), OWN, MEAN, NEW, GENERATED]
    for name in names:
        found = {code: results.get(name, code, options.seed) for code in [*options.seen, *options.unseen]}
        row = {code: run["loss"] for code, run in found.items() if run is not None}
        if row:
            table[name] = row
    return table


def cells(name: str, row: dict[str, float], options: argparse.Namespace) -> list[str]:
    def average(codes: list[str]) -> str:
        return f"{mean(row[code] for code in codes):.3f}" if all(code in row for code in codes) else ""

    parts = [average(options.seen), average(options.unseen)]
    return [name, *parts, *(f"{row[code]:.3f}" if code in row else "" for code in [*options.seen, *options.unseen])]


def report(results: Results, options: argparse.Namespace, console: Console) -> None:
    """The table on the screen and as markdown, and the plot, beside the results."""
    rows = rows_of(results, options)
    unseen = [f"{code} (unseen)" for code in options.unseen]
    head = ["adapter", "mean of seen", "mean of unseen", *options.seen, *unseen]
    table = Table(*head, title="masked loss on held-out text, nats per masked token")
    lines = [f"| {' | '.join(head)} |", f"| :-- |{' --: |' * (len(head) - 1)}"]
    for name, row in rows.items():
        table.add_row(*cells(name, row, options))
        lines.append(f"| {' | '.join(cells(name, row, options))} |")
    console.print(table)
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows, options)


def plot(rows: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    """How far each adapter lies below the encoder without one: a line for each language, unseen ones on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    codes = [*options.seen, *options.unseen]
    figure, axes = plt.subplots(figsize=(7.5, 1.5 + 0.32 * len(codes)), layout="constrained")
    axes.axhspan(len(options.seen) - 0.5, len(codes) - 0.5, color="0.93")
    axes.axvline(0, color="0.5", linewidth=1)
    adapted = {name: row for name, row in rows.items() if name != NONE}
    for number, (name, row) in enumerate(adapted.items()):
        shade = str(0.75 * number / max(1, len(adapted) - 1))
        gains = [row[code] - rows[NONE][code] for code in row]
        places = [codes.index(code) for code in row]
        axes.scatter(gains, places, marker="os^Dv<>P*"[number], color=shade, label=name, s=28)
    axes.set_yticks(range(len(codes)), [*options.seen, *(f"{code} (unseen)" for code in options.unseen)])
    axes.set_xlabel("masked loss less that without an adapter (nats per masked token): left is better")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(options.output.with_suffix(".png"), dpi=150)
    plt.close(figure)
