"""How far base weights drift when adapters are merged and unmerged, switching from one to the next, again and again.

    python tests/benchmarks/merge_drift.py                           # a small Llama, bfloat16, 1,000 cycles
    python tests/benchmarks/merge_drift.py --model PATH --cycles 50  # a real model

Every method trains about as many parameters per layer, and its delta has the same norm relative to the weight. A method
that adds its delta and later subtracts it loses rounding errors; one that keeps the original entries does not. With one
adapter the loss stops growing after the first cycle (the same numbers are added and subtracted); with several, as a
server that switches adapters has them, each starts from what the last one left, and the weights walk away.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _console import wide_console
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_sparse import RandConfig


@dataclass
class Drift:
    """What became of the targeted base weights.

    Attributes:
        trained: number of trained parameters of one adapter.
        once, after: share of the targeted weights that are not what they were, after the first cycle and after all.
        largest: largest difference after all cycles, in standard deviations of its weight matrix.
        cycles: number of cycles.
        seconds: time for all cycles.
    """

    trained: int
    once: float
    after: float
    largest: float
    cycles: int
    seconds: float


def methods(rank: int, density: float, targets: list[str] | str) -> dict[str, Callable[[int], PeftConfig]]:
    """The methods to compare, by functions of the adapter's number: about rank * (in + out) parameters per layer."""
    return {
        "peft_sparse": lambda n: RandConfig(equivalent_rank=rank, target_modules=targets, init_weights=False, seed=n),
        "PEFT LoRA": lambda n: LoraConfig(r=rank, target_modules=targets, init_lora_weights=False),
        "PEFT SHiRA": lambda n: ShiraConfig(r=rank, target_modules=targets, init_weights=False, random_seed=n),
        # Its support is the largest weights: the same for every adapter.
        "PEFT Super-Tuning": lambda n: SupertuningConfig(
            sparsity=1 - density, target_modules=targets, init_weights=False
        ),
    }


def small_llama(hidden: int = 128, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def tuned_layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def base_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in tuned_layers(model).items()}


def scale_deltas(model: PeftModel, adapter: str, relative_norm: float) -> None:
    """Scale an adapter so that its delta has `relative_norm` times the norm of the weight, in every layer."""
    for layer in tuned_layers(model).values():
        linear = [p for name, p in layer.named_parameters() if f".{adapter}" in name and "lora_A" not in name]
        weight = layer.get_base_layer().weight.float()
        factor = relative_norm * weight.norm() / layer.get_delta_weight(adapter).float().norm()
        for parameter in linear:
            parameter.data.mul_(factor)


def changed_share(model: PeftModel, before: dict[str, torch.Tensor]) -> float:
    now = base_weights(model)
    changed = sum(int((now[name] != weight).sum()) for name, weight in before.items())
    return changed / sum(weight.numel() for weight in before.values())


def measure(
    make_model: Callable[[], nn.Module],
    make_config: Callable[[int], PeftConfig],
    *,
    cycles: int,
    adapters: int,
    relative_norm: float,
) -> Drift:
    """Merge and unmerge one method's adapters in turn, `cycles` times in all; compare the weights with before."""
    torch.manual_seed(1)
    names = [f"adapter{number}" for number in range(adapters)]
    model = get_peft_model(make_model(), make_config(0), adapter_name=names[0]).eval()
    for number, name in enumerate(names[1:], 1):
        model.add_adapter(name, make_config(number))
    for name in names:
        scale_deltas(model, name, relative_norm)
    before = base_weights(model)
    model.merge_adapter([names[0]])
    if changed_share(model, before) == 0:
        raise RuntimeError(
            f"{type(make_config(0)).__name__}: merging changed no weight, so this run would prove nothing"
        )
    model.unmerge_adapter()
    once = changed_share(model, before)
    start = time.perf_counter()
    for cycle in range(1, cycles):
        model.merge_adapter([names[cycle % adapters]])
        model.unmerge_adapter()
    seconds = time.perf_counter() - start
    now = base_weights(model)
    largest = max(float((now[name].float() - w.float()).abs().max() / w.float().std()) for name, w in before.items())
    trained = sum(p.numel() for name, p in model.named_parameters() if f".{names[0]}" in name)
    return Drift(trained, once, changed_share(model, before), largest, cycles, seconds)


def compare(
    make_model: Callable[[], nn.Module],
    *,
    cycles: int,
    adapters: int,
    rank: int,
    relative_norm: float,
    targets: list[str] | str = "all-linear",
) -> dict[str, Drift]:
    """The drift of every method on models that `make_model` gives."""
    model = get_peft_model(make_model(), LoraConfig(r=rank, target_modules=targets))
    sizes = [tuple(layer.get_base_layer().weight.shape) for layer in tuned_layers(model).values()]
    density = sum(rank * (rows + columns) for rows, columns in sizes) / sum(rows * columns for rows, columns in sizes)
    return {
        name: measure(make_model, make_config, cycles=cycles, adapters=adapters, relative_norm=relative_norm)
        for name, make_config in methods(rank, density, targets).items()
    }


def show(results: dict[str, Drift], *, title: str) -> None:
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in ("trained", "changed: 1 cycle", "all cycles", "largest / std(W)", "ms/cycle"):
        table.add_column(heading, justify="right")
    for name, drift in results.items():
        per_cycle = 1000 * drift.seconds / max(1, drift.cycles - 1)
        cells = (
            f"{drift.trained:,}",
            f"{drift.once:.2%}",
            f"{drift.after:.2%}",
            f"{drift.largest:.3g}",
            f"{per_cycle:.2f}",
        )
        table.add_row(name, *cells)
    wide_console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder or Hub id of a causal language model (default: a small Llama made from its config)"
    )
    parser.add_argument("--cycles", type=int, default=1000, help="merge/unmerge cycles (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=4, help="adapters that take turns (default: %(default)s)")
    parser.add_argument(
        "--rank", type=int, default=4, help="LoRA's rank; the others train as many parameters (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="dtype of the base weights"
    )
    parser.add_argument(
        "--relative-norm",
        type=float,
        default=0.05,
        help="norm of a delta over that of its weight (default: %(default)s)",
    )
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)

    def make_model() -> nn.Module:
        if arguments.model:
            return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        return small_llama().to(dtype)

    results = compare(
        make_model,
        cycles=arguments.cycles,
        adapters=arguments.adapters,
        rank=arguments.rank,
        relative_norm=arguments.relative_norm,
    )
    name = arguments.model or "a small Llama"
    show(
        results,
        title=f"{arguments.cycles:,} merge/unmerge cycles, {arguments.adapters} adapters, {arguments.dtype}, {name}",
    )


if __name__ == "__main__":
    main()
