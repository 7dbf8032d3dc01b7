"""Why weights with large gradients need small steps: the loss along one step, for supports chosen in different ways.

    python tests/benchmarks/support_curvature.py --model PATH --data PATH      # some minutes on one core

Each support holds the same share of every linear layer. The step goes along the sign of the mean gradient over
`--batches` micro-batches, which is what Adam's first step does, in sizes that double; the table shows how the held-out
loss changes. A support of large gradients falls faster at first (the slope, in loss per step size, is the sum of the
gradients' sizes on it) and turns earlier, so what it gains is decided by both. Data and model are those of
`instruction_quality.py`, whose order of methods this explains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _bench_runs import DATA, MODELS
from _console import wide_console
from _instruction_rows import collate, read_rows, row_losses
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse.selection.budget import round_density
from peft_sparse.selection.random import random_indices
from peft_sparse.selection.top_k import top_k

MODEL = MODELS / "smollm2"
Weights = dict[str, Tensor]


def gradients(model: nn.Module, linear: dict[str, nn.Linear], rows: list[dict]) -> Weights:
    model.zero_grad(set_to_none=True)
    model(**collate(rows)).loss.backward()
    return {name: module.weight.grad.clone() for name, module in linear.items()}


def held_out_loss(model: nn.Module, rows: list[dict]) -> float:
    found = row_losses(model, rows, autocast=False)
    return sum(loss for loss, _ in found) / sum(tokens for _, tokens in found)


@torch.no_grad()
def changes_along(
    linear: dict[str, nn.Linear], direction: Weights, sizes: list[float], loss: Callable[[], float]
) -> list[float]:
    """How the loss changes with each step size; the weights are as before afterwards."""
    start, before = loss(), {name: module.weight.clone() for name, module in linear.items()}
    found = []
    for size in sizes:
        for name, module in linear.items():
            module.weight.copy_(before[name] - size * direction[name])
        found.append(loss() - start)
    for name, module in linear.items():
        module.weight.copy_(before[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="directory or hub id")
    parser.add_argument(
        "--data", type=Path, default=DATA / "alpaca", help="a .jsonl file, or a folder with train and valid"
    )
    parser.add_argument("--batches", type=int, default=16, help="micro-batches of the mean gradient")
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=96, help="tokens; longer rows are cut")
    parser.add_argument("--valid-rows", type=int, default=16, help="held-out rows")
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for module in linear.values():
        module.weight.requires_grad_(True)
    train, valid, _ = read_rows(options.data, tokenizer, max_length=options.max_length, valid_rows=options.valid_rows)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed)).tolist()
    mean: Weights = {name: torch.zeros_like(module.weight) for name, module in linear.items()}
    first: Weights = {}
    for number in track(range(options.batches), description="gradients", console=Console(stderr=True)):
        chosen = order[number * options.batch_size : (number + 1) * options.batch_size]
        found = gradients(model, linear, [train[i] for i in chosen])
        first = first or found
        for name, gradient in found.items():
            mean[name] += gradient / options.batches
    model.zero_grad(set_to_none=True)

    counts = {name: round_density(options.density, tensor.numel()) for name, tensor in mean.items()}
    sizes = [2.5e-4 * 2**power for power in range(8)]
    table = Table(title="change of the held-out loss by one step along the sign of the mean gradient")
    for column in ("support", "slope", *(f"{size:g}" for size in sizes)):
        table.add_column(column, justify="left" if column == "support" else "right")
    supports: dict[str, Callable[[str], Tensor]] = {
        "random": lambda name: random_indices(mean[name].numel(), counts[name], seed=options.seed, name=name),
        "largest gradients of one micro-batch": lambda name: top_k(first[name].abs(), counts[name], name=name),
        "largest mean gradients": lambda name: top_k(mean[name].abs(), counts[name], name=name),
    }
    for label, choose in track(supports.items(), description="steps", console=Console(stderr=True)):
        direction, slope = {}, 0.0
        for name, gradient in mean.items():
            indices = choose(name).long()
            on_support = torch.zeros_like(gradient).view(-1)
            on_support[indices] = gradient.view(-1)[indices].sign()
            direction[name] = on_support.view_as(gradient)
            slope += float(gradient.view(-1)[indices].abs().sum())
        changes = changes_along(linear, direction, sizes, lambda: held_out_loss(model, valid))
        best = min(changes)
        shown = [f"[bold]{change:+.4f}[/]" if change == best else f"{change:+.4f}" for change in changes]
        table.add_row(label, f"{slope:.0f}", *shown)
    # Wide enough for the table also where the output is a file.
    wide_console().print(table)


if __name__ == "__main__":
    main()
