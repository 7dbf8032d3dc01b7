"""Time and memory of one training step, beside PEFT's LoRA, SHiRA and Super-Tuning at equal parameter count.

    python tests/benchmarks/step_time.py                       # two cores, wall time, about four minutes
    python tests/benchmarks/step_time.py --threads 1           # processor time, which other work disturbs little
    python tests/benchmarks/step_time.py --preset medium --dtype bfloat16 --density 0.01

A step is forward, backward, AdamW and zero_grad of a small Llama, all seven kinds of linear layers tuned. All methods
run in one process, one step each per round, and the order rotates, so that whatever slows the machine slows all alike;
what counts is therefore each round's ratio, not the time. "frozen" is the floor for anything that trains through a
network: forward and input gradients alone. Peak memory is measured apart, each method in a process of its own: the
highest resident size during two steps, less that with model and optimizer built and before the first step.

SpIEL's steps are not alike: every 20 updates it estimates gradients for 5 and replaces weights after that. The default
20 rounds hold each of these once (updates 3 to 22), so for SpIEL the column "sum / LoRA" is the one to read; its memory
is that of the first 6 updates, the first replacement included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from _console import wide_console
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import SM3, RandConfig, SparseAdamW, iter_deltas, resident
from peft_sparse import SpielAGConfig as AG
from peft_sparse import SpielMAConfig as MA

# hidden size, width of the feed-forward, layers
PRESETS = {"tiny": (64, 176, 2), "small": (512, 1376, 4), "medium": (768, 2048, 4)}
VOCABULARY = 2000
WARM_UP = 2


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: unique.
        density: of the comparison that it belongs to; None for all.
        build: turns the base model into what is trained.
        is_resident: whether it trains inside `peft_sparse.resident`.
        make_optimizer: from model and parameters.
        steps_to_peak: how many steps until it has done all that it ever does.
    """

    name: str
    density: float | None
    build: Callable[[nn.Module], nn.Module]
    is_resident: bool = False
    make_optimizer: Callable[[nn.Module, list[Tensor]], Optimizer] = lambda _, parameters: AdamW(parameters, lr=1e-4)
    steps_to_peak: int = 2


def with_ages(_: nn.Module, parameters: list[Tensor]) -> Optimizer:
    return SparseAdamW(parameters, lr=1e-4)


def with_covers(model: nn.Module, parameters: list[Tensor]) -> Optimizer:
    return SM3(parameters, lr=1e-2, deltas=[delta for _, _, _, delta in iter_deltas(model)])


def base_model(options: argparse.Namespace) -> nn.Module:
    hidden, intermediate, layers = PRESETS[options.preset]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, options.dtype))


def frozen(model: nn.Module) -> nn.Module:
    """Nothing to train; the embedding's output asks for a gradient, so that the backward runs through all layers."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def shapes_of(preset: str) -> list[tuple[int, int]]:
    """Of the linear layers in a block."""
    hidden, intermediate, _ = PRESETS[preset]
    return [(hidden, hidden)] * 4 + [(hidden, intermediate)] * 3


def equal_rank(shapes: Sequence[tuple[int, int]], density: float) -> int:
    """The rank at which r * (in + out) comes nearest to density * in * out, summed over the linear layers."""
    return max(1, round(density * sum(i * o for i, o in shapes) / sum(i + o for i, o in shapes)))


def methods(options: argparse.Namespace) -> list[Method]:
    def tuned(config: PeftConfig) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_peft_model(model, config)

    found = [Method("frozen", None, frozen), Method("full fine-tuning", None, lambda model: model)]
    everywhere = "all-linear"
    for density in options.density:
        rank = equal_rank(shapes_of(options.preset), density)
        ours = RandConfig(density=density, target_modules=everywhere)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=everywhere)
        shira = ShiraConfig(r=rank, target_modules=everywhere)
        supertuning = SupertuningConfig(sparsity=1 - density, target_modules=everywhere)
        # A long training, whose rate of replacement is still near its peak.
        ag, ma = (cls(density=density, total_steps=10_000, target_modules=everywhere) for cls in (AG, MA))
        found += [
            Method(f"peft_sparse {density:g}", density, tuned(ours)),
            Method(f"peft_sparse {density:g} resident", density, tuned(ours), is_resident=True),
            Method(f"SpIEL-AG {density:g}", density, tuned(ag), True, with_ages, 6),
            Method(f"SpIEL-MA {density:g}", density, tuned(ma), True, with_covers, 6),
            Method(f"LoRA r={rank}", density, tuned(lora)),
            Method(f"SHiRA r={rank}", density, tuned(shira)),
            Method(f"Super-Tuning {density:g}", density, tuned(supertuning)),
        ]
    return found


class Training:
    """A method's model and optimizer, and one training step on always the same batch."""

    def __init__(self, method: Method, options: argparse.Namespace) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = method.build(base_model(options)).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in parameters)
        self.optimizer = method.make_optimizer(self.model, parameters) if parameters else None
        generator = torch.Generator().manual_seed(0)
        self.ids: Tensor = torch.randint(0, VOCABULARY, (options.batch, options.length), generator=generator)
        self._stack = ExitStack()
        if method.is_resident:
            self._stack.enter_context(resident(self.model))

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        self._stack.close()


def time_all(found: list[Method], options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """{method: seconds of each round}, {method: number of trained parameters}."""
    # Processor time counts the threads of a method together, so it is only like wall time where there is one.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    trainings = {method.name: Training(method, options) for method in found}
    names = list(trainings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(WARM_UP + options.rounds), description="rounds", transient=True):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            trainings[name].step()
            if number >= WARM_UP:
                seconds[name].append(clock() - start)
    for training in trainings.values():
        training.close()
    return seconds, {name: training.num_trained for name, training in trainings.items()}


def resident_bytes(field: str) -> int:
    """A memory field of this process, "VmRSS" or "VmHWM" (its high-water mark), as Linux keeps it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(method: Method, options: argparse.Namespace) -> int:
    """Bytes that a few steps need at most beyond what the built model and optimizer take; for a fresh process."""
    training = Training(method, options)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # The high-water mark starts over.
    before = resident_bytes("VmRSS")
    for _ in range(method.steps_to_peak):
        training.step()
    return resident_bytes("VmHWM") - before


def peak_memories(found: list[Method]) -> dict[str, int]:
    """{method: bytes}, each from a process of its own; nothing where /proc cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    peaks = {}
    for method in track(found, description="memory", transient=True):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", method.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{method.name} failed:\n{done.stderr}")
        peaks[method.name] = int(done.stdout.split()[-1])
    return peaks


def ratio(of: list[float], to: list[float]) -> str:
    """Median of the rounds' ratios, its quartiles, and the ratio of the two fastest rounds."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.2f} ({low:.2f}-{high:.2f}; {min(of) / min(to):.2f})"


def table(
    density: float,
    found: list[Method],
    seconds: dict[str, list[float]],
    trained: dict[str, int],
    peaks: dict[str, int],
    options: argparse.Namespace,
) -> Table:
    """All methods of one density, and those of every density, relative to three of them."""
    clock = "processor" if options.threads == 1 else "wall"
    result = Table(title=f"{options.preset} {options.dtype}, density {density:g}, {options.threads} threads")
    result.add_column("method")
    for heading in ("trained", f"{clock} ms, median (min)", "/ LoRA", "sum / LoRA", "/ SHiRA", "/ frozen", "peak MB"):
        result.add_column(heading, justify="right")
    rows = [method for method in found if method.density in (None, density)]
    lora, shira = (next(m.name for m in rows if m.name.startswith(kind)) for kind in ("LoRA", "SHiRA"))
    for method in rows:
        own = seconds[method.name]
        result.add_row(
            method.name,
            f"{trained[method.name]:,}",
            f"{median(own) * 1e3:.0f} ({min(own) * 1e3:.0f})",
            ratio(own, seconds[lora]),
            f"{sum(own) / sum(seconds[lora]):.2f}",
            *[ratio(own, seconds[other]) for other in (shira, "frozen")],
            f"{peaks[method.name] / 2**20:.0f}" if method.name in peaks else "-",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--density", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: one round has no spread")
    torch.set_num_threads(options.threads)
    found = methods(options)
    console = wide_console()
    if options.memory_of is not None:
        print(peak_memory(next(m for m in found if m.name == options.memory_of), options))
        return
    seconds, trained = time_all(found, options)
    peaks = {} if options.no_memory else peak_memories(found)
    for density in options.density:
        console.print(table(density, found, seconds, trained, peaks, options))
    console.print("Ratios: median over the rounds (quartiles; ratio of the fastest rounds).")


if __name__ == "__main__":
    main()
