"""`peft-sparse plan`: memory of a training run, before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import typer
from peft import LoraConfig, PeftConfig
from rich.console import Console

from ..checks import check_one_of
from ..errors import ConfigError
from ..planning.fitting import fitting_methods, largest_density
from ..planning.plan import MemoryPlan, plan_memory
from ..planning.table import describe_fit, plan_table
from ..tuners.ada_sft.config import AdaSftConfig
from ..tuners.bottleneck.config import BottleneckConfig
from ..tuners.common.target_checks import warned_once
from ..tuners.sparse_ft.configs.base import METHODS, SparseConfig, method_called
from . import app
from ._options import AsJson
from ._values import parse_dtype, parse_size

_LORA, _BOTTLENECK, _ADA_SFT, _FULL = "lora", "bottleneck", "ada_sft", "full"
# {method that is no sparse one: the options that say what it trains}
_OPTIONS: dict[str, tuple[str, ...]] = {
    _LORA: ("--rank", "--target-modules"),
    _BOTTLENECK: ("--bottleneck-size",),
    _ADA_SFT: ("--target-modules",),
    _FULL: (),
}


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Model: directory or Hub id. Only its config is read.")],
    method: Annotated[
        str, typer.Option(help="rand, lottery_ticket, spiel_ag, spiel_ma, ..., ada_sft, bottleneck, lora or full.")
    ] = "rand",
    density: Annotated[float | None, typer.Option(help="Share of the targeted weights. [default: 0.01]")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA. [default: 8]")] = None,
    bottleneck_size: Annotated[
        int | None, typer.Option(help="Width inside of bottleneck adapters. A 16th of the model's by default.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help='"all", "all-linear", a regex, or names with commas between them.')
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a micro-batch.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens in an example.")] = 512,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. The model's own by default.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in the backward pass.")
    ] = False,
    gradient_accumulation: Annotated[
        bool, typer.Option("--gradient-accumulation", help="Several micro-batches make an update.")
    ] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Quantise the base model to NF4.")] = False,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw_8bit, sparse_adamw, sm3 or sgd. The method's own by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    task: Annotated[str | None, typer.Option(help="CAUSAL_LM, SEQ_CLS, ... The model's own class by default.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Memory there is, such as 24GB. Says what fits.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how much memory a training run will need, and for what."""
    limit = None if gpu is None else parse_size(gpu, name="--gpu")
    targets = _parse_targets(target_modules)
    if limit is None:  # else it may be of use for the methods that are tried instead
        given = {"--density": density, "--rank": rank, "--bottleneck-size": bottleneck_size}
        _check_of_use(method_called(method.replace("-", "_")), {**given, "--target-modules": targets})
    plan_with = partial(
        plan_memory,
        model,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=None if dtype is None else parse_dtype(dtype),
        gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation=gradient_accumulation,
        load_in_4bit=load_in_4bit,
        device=device,
        task_type=None if task is None else task.upper(),
    )
    make_config = partial(_config, density=density, rank=rank, bottleneck_size=bottleneck_size, targets=targets)
    config = make_config(method)
    best: tuple[float, MemoryPlan] | None = None
    others: dict[str, MemoryPlan] = {}
    with warned_once(), Console(stderr=True).status("Taking steps without data ..."):
        found = plan_with(config, optimizer=optimizer)
        if limit is not None and isinstance(config, SparseConfig):
            best = largest_density(config, partial(plan_with, optimizer=optimizer), limit)
        if limit is not None and not found.fits(limit):
            names = [name for name in ("rand", "spiel_ag", "spiel_ma", _BOTTLENECK, _LORA) if name != method]
            others = fitting_methods({name: partial(plan_with, make_config(name)) for name in names}, limit)
    if as_json:
        content = found.to_dict()
        if limit is not None:
            content |= {"limit": limit, "fits": found.fits(limit), "largest_density": best[0] if best else None}
            content["methods_that_fit"] = {name: other.peak for name, other in others.items()}
        typer.echo(json.dumps(content, indent=2))
        return
    console = Console()
    console.print(plan_table(found))
    if limit is not None:
        console.print(describe_fit(found, limit, best=best, others=others), highlight=False)


def _parse_targets(text: str | None) -> str | list[str] | None:
    return [name.strip() for name in text.split(",")] if text is not None and "," in text else text


def _check_of_use(method: str, given: Mapping[str, object]) -> None:
    """Refuse options that change nothing about this method."""
    own = _OPTIONS.get(method, ("--density", "--target-modules"))
    for option, value in given.items():
        if value is not None and option not in own:
            takes = f", which takes {' and '.join(own)}" if own else ""
            raise ConfigError(f"{option} means nothing to --method {method}{takes}.")


def _config(
    method: str,
    *,
    density: float | None,
    rank: int | None,
    bottleneck_size: int | None,
    targets: str | list[str] | None,
) -> PeftConfig | None:
    method = method_called(method.replace("-", "_"))
    linear = "all-linear" if targets in (None, "all") else targets
    if method == _FULL:
        return None
    if method == _LORA:
        if rank is not None and rank < 1:
            raise ConfigError(f"--rank must be a whole number >= 1, got {rank}.")
        return LoraConfig(r=8 if rank is None else rank, target_modules=linear)
    if method == _ADA_SFT:
        return AdaSftConfig(target_modules=linear)
    if method == _BOTTLENECK:
        # They lie where their kind says, not at the weights that other methods tune.
        return BottleneckConfig(bottleneck_size=bottleneck_size)
    # Of these two the weights are given, and no density says how many.
    methods = METHODS.keys() - {"fixed", "given"}
    check_one_of("--method", method, sorted([*methods, _ADA_SFT, _BOTTLENECK, _LORA, _FULL]))
    return SparseConfig(method=method, density=0.01 if density is None else density, target_modules=targets)
