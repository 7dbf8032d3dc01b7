"""A training step of bottleneck adapters beside the `adapters` library's.

    python tests/benchmarks/bottleneck_step.py --adapters-python /tmp/adapters-env/bin/python
    python tests/benchmarks/bottleneck_step.py --adapters-python ... --threads 1    # processor time

The library pins an older transformers, so it runs in an environment of its own, which
tests/fixtures/make_adapters_library.py tells how to make. For each setup one process per library trains the same masked
language model (BERT's shape, random weights) with the same adapter on the same batch; they take turns, one step each
per round, the order rotates, and what counts is each round's ratio. A step is forward, backward, AdamW and zero_grad.
Both must compute the same loss. "frozen" is the model without adapters, forward and the gradients of its embeddings: it
shows what the two versions of transformers differ in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median

import torch
from _bottleneck_worker import FROZEN
from _console import wide_console
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from step_time import ratio
from transformers import BertConfig, BertForMaskedLM

from peft_sparse import BottleneckConfig, save_adapter_hub

SETUPS = {
    "pfeiffer, 48": BottleneckConfig(bottleneck_size=48),
    "pfeiffer, 384": BottleneckConfig(bottleneck_size=384),
    "houlsby, 48": BottleneckConfig(kind="houlsby", bottleneck_size=48),
    "pfeiffer, 48, NICE": BottleneckConfig(bottleneck_size=48, invertible="nice"),
}
LIBRARIES = ("peft_sparse", "adapters")


class Worker:
    """A process with one side's model."""

    def __init__(self, python: str, *arguments: str) -> None:
        command = [python, str(Path(__file__).with_name("_bottleneck_worker.py")), *arguments]
        pipe = subprocess.PIPE
        self._name = arguments[0]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def ask(self, what: str) -> float:
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._process.kill()
            sys.exit(f"{self._name} failed:\n{self._process.communicate()[1]}")

    def close(self) -> None:
        self._process.communicate()


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """What both sides start from."""
    torch.manual_seed(0)
    sizes = {"vocab_size": options.vocabulary, "num_hidden_layers": options.layers}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    base = BertForMaskedLM(BertConfig(**sizes))
    save_file({name: tensor.clone() for name, tensor in base.state_dict().items()}, folder / "base.safetensors")
    ids = torch.randint(options.vocabulary, (options.batch, options.length))
    save_file({"input_ids": ids, "labels": ids.clone()}, folder / "batch.safetensors")
    for setup, config in SETUPS.items():
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():  # Strong enough for a wrong adapter to show in the loss.
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        save_adapter_hub(model, folder / setup)
        base = model.unload()


def compare(setup: str, folder: str, options: argparse.Namespace, console: Console) -> tuple[str, ...]:
    """A row of the table."""
    pythons = dict(zip(LIBRARIES, (sys.executable, options.adapters_python), strict=True))
    workers = {name: Worker(python, name, folder, setup, str(options.threads)) for name, python in pythons.items()}
    ours, theirs = (workers[name].ask("loss") for name in LIBRARIES)
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        sys.exit(f"{setup}: the losses differ, peft_sparse's is {ours}, adapters' {theirs}.")
    times: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for number in track(range(options.rounds + 1), description=setup, console=console, transient=True):
        for name in LIBRARIES if number % 2 else reversed(LIBRARIES):
            seconds = workers[name].ask("step")
            if number:  # the first warms up
                times[name].append(seconds)
    peaks = [workers[name].ask("peak") for name in LIBRARIES]
    for worker in workers.values():
        worker.close()
    return (
        setup,
        *(f"{median(times[name]):.3f} s" for name in LIBRARIES),
        ratio(*times.values()),
        *("" if peak is None else f"{peak / 2**20:.0f} MB" for peak in peaks),
        f"{ours:.6f} {theirs:.6f}",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of bottleneck adapters beside the adapters library's.")
    parser.add_argument("--adapters-python", required=True, help="Python of an environment with `adapters`.")
    parser.add_argument("--layers", type=int, default=12, help="Number of layers.")
    parser.add_argument("--vocabulary", type=int, default=30_522, help="Number of tokens.")
    parser.add_argument("--batch", type=int, default=8, help="Examples in a batch.")
    parser.add_argument("--length", type=int, default=128, help="Tokens in an example.")
    parser.add_argument("--rounds", type=int, default=8, help="Steps of each side.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of torch; 1 measures processor time.")
    return parser.parse_args()


def main() -> None:
    options, console = parse(), wide_console()
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    columns = ("", *LIBRARIES, "ratio (quartiles; of the fastest)", "memory", "theirs", "losses")
    table = Table(*columns, title="Time of a training step, memory of the steps")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options)
        for setup in (FROZEN, *SETUPS):
            table.add_row(*compare(setup, folder, options, console))
    console.print(table)


if __name__ == "__main__":
    main()
