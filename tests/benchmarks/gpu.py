"""Time and memory on a GPU beside PEFT's LoRA, SHiRA and Super-Tuning at equal counts, on Llama-2-7B's shape.

    python tests/benchmarks/gpu.py                        # everything, under nine minutes on one H100
    python tests/benchmarks/gpu.py --minutes 3            # the first rows alone
    python tests/benchmarks/gpu.py --layers 8             # a quarter of the model
    python tests/benchmarks/gpu.py --only "step ,"        # rows whose name holds one of these
    python tests/benchmarks/gpu.py --tiny                 # the rehearsal on a CPU, its numbers mean nothing
    python tests/benchmarks/gpu.py --table results.jsonl  # a table of what an earlier run wrote

Each row is one JSON line, printed and added to --out as soon as it is measured; rows come in the order of their
importance, and one that would not fit into --minutes is left out. Weights are random (nothing is downloaded) in
bfloat16; a step is forward, backward, optimizer and zero_grad of one sequence of --length tokens, all seven kinds of
linear layers tuned, as many weights as LoRA of --rank trains. Steps are timed by device events, one by one, with the
device idle before each, so that launching counts where it is what takes the time. A method's steps come in --blocks
blocks, between which the other methods take their turn, so that a drift of the card would show in its quartiles. Peak
memory is what torch had allocated at most, the model included. SpIEL's steps are not alike: blocks are cycles of 20
updates, estimation and replacement included, and the mean over them is what counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from _gpu_rows import (
    correctness,
    generation_rows,
    gradient_rows,
    quantised_rows,
    selection_rows,
    step_rows,
    switching_rows,
)
from _gpu_training import FAILURES, LLAMA_7B, METHODS, draw_once, failure, make_model

# In the order of their importance: name, rows, seconds that they take at most on an H100 with all layers.
ROWS: list[tuple[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]], int]] = [
    ("correctness", correctness, 50),
    ("step", lambda options: step_rows(options, checkpointing=False), 150),
    ("step, checkpointing", lambda options: step_rows(options, checkpointing=True), 190),
    ("gradient", gradient_rows, 10),
    ("generation", generation_rows, 40),
    ("switching", switching_rows, 25),
    ("selection", selection_rows, 25),
    ("NF4", quantised_rows, 40),
]


def environment(options: argparse.Namespace) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if options.device == "cuda" else "none: a rehearsal on the CPU"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    layers = options.model.config.num_hidden_layers
    return {
        "card": card,
        "date": date.today().isoformat(),
        "versions": versions,
        "layers": layers,
        "length": options.length,
        "rank": options.rank,
        "dtype": "bfloat16",
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of the steps, relative to LoRA and to the frozen model."""
    found = ["| | method | trained | ms a step (quartiles) | / LoRA | / frozen | peak GiB | / LoRA |", "|" + "---|" * 8]
    for kind in dict.fromkeys(line["row"] for line in lines if line["row"].startswith(("step", "NF4"))):
        rows = {line["method"]: line for line in lines if line["row"] == kind and "method" in line}
        for name, row in rows.items():
            if "mean_ms" not in row:
                found.append(f"| {kind} | {name} | | {row.get('error')} | | | | |")
                continue
            # The mean of a cycle, and of steps that are alike the median.
            own, lora_ms, frozen_ms = (
                r.get("mean_ms" if "cycle_ms" in r else "median_ms", float("nan"))
                for r in (row, rows.get("LoRA", {}), rows.get("frozen", {}))
            )
            low, high = row["quartiles_ms"]
            peak, lora_peak = row.get("peak_gib", float("nan")), rows.get("LoRA", {}).get("peak_gib", float("nan"))
            found.append(
                f"| {kind} | {name} | {row['trained']:,} | {own:.1f} ({low:.1f}-{high:.1f}) | {own / lora_ms:.3f} "
                f"| {own / frozen_ms:.3f} | {peak:.2f} | {peak / lora_peak:.3f} |"
            )
    return "\n".join(found)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows that fit into the time."""
    begin = time.monotonic()
    options.model = make_model(options)
    yield {"row": "environment", **environment(options), "seconds": round(time.monotonic() - begin, 1)}
    for name, make, seconds in ROWS:
        if options.only and not any(part in name for part in options.only):
            continue
        share = 1.0 if not options.layers else min(1.0, options.layers / LLAMA_7B[2] + 0.1)
        left = 60 * options.minutes - (time.monotonic() - begin)
        if seconds * share > left:
            yield {"row": name, "skipped": f"takes up to {seconds * share:.0f} s, {left:.0f} s are left"}
            continue
        started = time.monotonic()
        try:
            for row in make(options):
                yield {"row": name, **row, "at_s": round(time.monotonic() - begin, 1)}
        except FAILURES as error:
            # Time on a device is dear: the rows that are left are measured all the same.
            yield {"row": name, "error": failure(error), "ok": False}
            options.model = make_model(options)
        yield {"row": name, "took_s": round(time.monotonic() - started, 1)}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than 32; step times are then a share")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of rows")
    parser.add_argument("--methods", nargs="+", default=[], help="names of methods; all by default")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU")
    parser.add_argument("--out", type=Path, help="a file that gets the lines, too")
    parser.add_argument("--table", type=Path, help="print the table of such a file, measure nothing")
    options = parser.parse_args(arguments)
    options.device, options.checkpointing = "cpu" if options.tiny else "cuda", False
    if options.tiny:
        options.length, options.rank, options.steps = 32, 2, 2
    draw_once()
    known = [method.name for method in METHODS]
    if unknown := set(options.methods) - set(known):
        parser.error(f"--methods must be of {known}, got {sorted(unknown)}")
    return options


def main() -> None:
    options = parsed()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is at hand; --tiny rehearses on the CPU")
    lines = []
    for line in run(options):
        lines.append(line)
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print(table(lines))
    if any(line.get("ok") is False for line in lines):
        sys.exit("a result is wrong, see above")


if __name__ == "__main__":
    main()
