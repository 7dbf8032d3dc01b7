"""MAD-G beside a plain bottleneck adapter: time of a training step, of generating an adapter, and sizes.

    python tests/benchmarks/madg.py                    # mBERT's shape, wall time; needs 10 GB
    python tests/benchmarks/madg.py --threads 1        # processor time, which other work disturbs little
    python tests/benchmarks/madg.py --layers 4 --vocabulary 2000

A step is forward, backward and AdamW of a masked language model with random weights, adapters of bottleneck size 384 in
every layer. All methods run in one process, one step each per round, and the order rotates, so that whatever slows the
machine slows all alike; what counts is each round's ratio. The optimizer is timed apart: a hypernetwork has many times
the parameters of one adapter, and AdamW touches each of them in every step.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from _console import wide_console
from peft import PeftConfig, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from peft_sparse import BottleneckConfig, MadGConfig

NUM_FEATURES, NUM_LANGUAGES = 289, 95
SIZE = 384


@dataclass
class Method:
    """One row of the table: what is added to the model, and the languages of its batches.

    Attributes:
        config: None for the frozen model.
        languages: of a batch of that many examples.
        backward, optimizer: seconds of each round.
    """

    name: str
    config: PeftConfig | None
    languages: Callable[[int], dict[str, Any]] = lambda _: {}
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)


def methods() -> list[Method]:
    made = torch.Generator().manual_seed(0)
    vectors = {str(i): (torch.rand(NUM_FEATURES, generator=made) < 0.4).float() for i in range(NUM_LANGUAGES)}

    def one(_: int) -> dict[str, Any]:
        return {"language": "7"}

    def each(batch: int) -> dict[str, Any]:
        return {"language": [str(i) for i in range(batch)]}

    plain, shared = MadGConfig(typology=vectors), MadGConfig(layer_dim=32, typology=vectors)
    return [
        Method("frozen model", None),
        Method("bottleneck adapter", BottleneckConfig(bottleneck_size=SIZE)),
        Method("MAD-G, one language", plain, one),
        Method("MAD-G, a language per example", plain, each),
        Method("MAD-G-LS, one language", shared, one),
        Method("MAD-G-LS, a language per example", shared, each),
    ]


def build(base: nn.Module, method: Method) -> nn.Module:
    """The base model's weights are shared by all methods, its modules are not."""
    with torch.device("meta"):
        model = BertForMaskedLM(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    return model if method.config is None else get_peft_model(model, method.config)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, inputs: dict[str, Any], clock: Callable[[], float]
) -> tuple[float, float]:
    start = clock()
    if optimizer is None:
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, labels=inputs["labels"]).loss.backward()
        return clock() - start, 0.0
    model(**inputs).loss.backward()
    middle = clock()
    optimizer.step()
    optimizer.zero_grad()
    return middle - start, clock() - middle


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and size of MAD-G beside a bottleneck adapter.")
    parser.add_argument("--layers", type=int, default=12, help="Number of layers.")
    parser.add_argument("--vocabulary", type=int, default=119_547, help="Number of tokens; mBERT's by default.")
    parser.add_argument("--batch", type=int, default=8, help="Examples in a batch.")
    parser.add_argument("--length", type=int, default=128, help="Tokens in an example.")
    parser.add_argument("--rounds", type=int, default=5, help="Steps of each method.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of torch; 1 measures processor time.")
    return parser.parse_args()


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    base = BertForMaskedLM(BertConfig(vocab_size=options.vocabulary, num_hidden_layers=options.layers))
    ids = torch.randint(options.vocabulary, (options.batch, options.length))
    console, found = wide_console(), methods()
    table = Table("", "forward, backward", "ratio", "AdamW", "whole step, ratio", title="Time of a training step")
    sizes = Table("", "parameters", "generating one adapter", title="Hypernetworks")
    runs = []
    for method in found:
        model = build(base, method).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
        runs.append((method, model, optimizer, {"input_ids": ids, "labels": ids, **method.languages(options.batch)}))
    for number in track(range(options.rounds + 1), description="steps", console=console):
        for method, model, optimizer, inputs in runs[number % len(runs) :] + runs[: number % len(runs)]:
            backward, update = step(model, optimizer, inputs, clock)
            if number:  # the first warms up
                method.backward.append(backward)
                method.optimizer.append(update)
    other = found[1]
    for method in found:
        whole = [a + b for a, b in zip(method.backward, method.optimizer, strict=True)]
        theirs = [a + b for a, b in zip(other.backward, other.optimizer, strict=True)]
        table.add_row(
            method.name,
            f"{median(method.backward):.3f} s",
            f"{median(a / b for a, b in zip(method.backward, other.backward, strict=True)):.3f}",
            f"{median(method.optimizer):.3f} s",
            f"{median(a / b for a, b in zip(whole, theirs, strict=True)):.3f}",
        )
    console.print(table)
    one = sum(p.numel() for p in runs[1][1].parameters() if p.requires_grad)
    sizes.add_row("one bottleneck adapter", f"{one:,}", "")
    sizes.add_row(f"{NUM_LANGUAGES} of them", f"{one * NUM_LANGUAGES:,}", "")
    for method, model, _, _ in (runs[2], runs[4]):
        count, times = sum(p.numel() for p in model.parameters() if p.requires_grad), []
        for language in range(options.rounds):
            start = clock()
            model.generate_adapter(str(language))
            times.append(clock() - start)
        name = f"{method.name.partition(',')[0]}: as large as {count / one:.1f} adapters"
        sizes.add_row(name, f"{count:,}", f"{median(times) * 1000:.0f} ms")
    console.print(sizes)


if __name__ == "__main__":
    main()
