"""Held-out loss after a short instruction tuning: SpIEL beside other sparse methods, LoRA and full fine-tuning.

    python tests/benchmarks/instruction_quality.py --model PATH --data PATH            # hours on two cores
    python tests/benchmarks/instruction_quality.py --steps 40 --batch-size 2 --max-length 128 --valid-rows 32
    python tests/benchmarks/instruction_quality.py --quick                             # do all methods run?

Every method trains as many weights as LoRA (full fine-tuning: all), takes the same number of optimizer steps on the
same batches in the same order (a function of the seed), with cosine decay after a short warm-up, no weight decay and
gradients clipped to norm 1. LT-SFT spends half of its steps in the dense phase, with `--dense-learning-rate`, and half
in the sparse phase, which starts the rows over. Frozen bases are bfloat16 with float32 adapters; where base weights
themselves train (full fine-tuning, LT-SFT) they are float32 under bfloat16 autocast, for many updates are too small for
bfloat16. The loss is the mean over all answer tokens of the held-out rows, in nats.

Runs come in stages, so that the table means something after each: every method at its first learning rate with the
first seed, at its second, then the other seeds at the better of the two. A finished run is a line of `--output`; the
next call with the same settings goes on from there. The seed draws order, random supports and LoRA's matrices alike;
differences to LoRA are taken seed by seed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import transformers
from _bench_runs import Results, ShowSteps, spread
from _instruction_rows import collate, read_rows, row_losses
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from peft_sparse import LotteryTicketConfig, RandConfig, SparseTrainer, SpielAGConfig, SpielMAConfig

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca"
MODEL = Path(os.environ.get("PEFT_SPARSE_MODELS", Path.home() / ".cache" / "peft-sparse-models")) / "smollm2"
UNTUNED = "untuned"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        learning_rates: the two candidates.
        config: the adapter's, of (number of weights, LoRA's rank, seed, model, options); None trains the model itself.
        trains_base: whether base weights train, and so have to be float32.
        is_ours: whether `SparseTrainer` trains it; PEFT's own methods and the model itself take transformers' trainer.
    """

    learning_rates: tuple[float, float]
    config: Callable[[int, int, int, nn.Module, argparse.Namespace], PeftConfig | None]
    trains_base: bool = False
    is_ours: bool = True


TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def spiel(kind: type[PeftConfig], **changes):
    def config(count: int, rank: int, seed: int, model: nn.Module, options: argparse.Namespace) -> PeftConfig:
        cycle = {"reselection_steps": options.reselection_steps, "estimation_steps": options.estimation_steps}
        return kind(**{**TARGETS, **cycle, "num_weights": count, "seed": seed, **changes})

    return config


def with_embeddings(count: int, rank: int, seed: int, model: nn.Module, options: argparse.Namespace) -> PeftConfig:
    """SpIEL-AG with the same total, which it shares out itself over the linear layers and the embedding."""
    embedding = model.get_input_embeddings()
    targets = [name for name, _ in linear_layers(model)]
    targets += [name for name, module in model.named_modules() if module is embedding]
    names = sorted({name.rsplit(".", 1)[-1] for name in targets})
    return spiel(SpielAGConfig, target_modules=names, budget="global")(count, rank, seed, model, options)


# Weights chosen by their gradients change the outputs more than random ones, so they take smaller steps.
RANDOM, CHOSEN, SM3 = (2e-3, 4e-3), (5e-4, 2.5e-4), (2e-3, 1e-3)
LORA, LOTTERY = "lora", "lottery_ticket"
METHODS = {
    "spiel_ag": Method(CHOSEN, spiel(SpielAGConfig)),
    LORA: Method(RANDOM, lambda k, r, *_: LoraConfig(r=r, lora_alpha=2 * r, **TARGETS), is_ours=False),
    "spiel_ma": Method(SM3, spiel(SpielMAConfig)),
    "rand": Method(RANDOM, lambda k, r, seed, *_: RandConfig(num_weights=k, seed=seed, **TARGETS)),
    "full": Method((1e-4, 2e-4), lambda *_: None, trains_base=True, is_ours=False),
    LOTTERY: Method((5e-4, 1e-3), lambda k, *_: LotteryTicketConfig(num_weights=k, **TARGETS), trains_base=True),
    "spiel_ag_3_candidates": Method(CHOSEN, spiel(SpielAGConfig, candidates_per_weight=3.0)),
    "shira": Method(RANDOM, lambda k, r, seed, *_: ShiraConfig(r=r, random_seed=seed, **TARGETS), is_ours=False),
}
EXTRAS = {
    "spiel_ag_global": Method(CHOSEN, spiel(SpielAGConfig, budget="global")),
    "spiel_ma_global": Method(SM3, spiel(SpielMAConfig, budget="global")),
    "spiel_ag_embeddings": Method(CHOSEN, with_embeddings),
}


# ---- one run ---------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            yield name, module


def load(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def train(
    method: Method, rate: float, seed: int, rows: list[dict], options: argparse.Namespace, advance: Callable[[], None]
) -> tuple[nn.Module, int]:
    """(the trained model, how many weights it trained)."""
    set_seed(seed)
    model: nn.Module = load(options, torch.float32 if method.trains_base else torch.bfloat16)
    shapes = [layer.weight.shape for _, layer in linear_layers(model)]
    per_rank = sum(o + i for o, i in shapes)
    rank = max(1, round(options.density * sum(o * i for o, i in shapes) / per_rank))
    config = method.config(rank * per_rank, rank, seed, model, options)
    if config is not None:
        model = get_peft_model(model, config)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    dense_steps = options.steps // 2 if isinstance(config, LotteryTicketConfig) else 0
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps - dense_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            seed=seed,
            bf16=method.trains_base,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        dense = {"max_steps": dense_steps, "learning_rate": options.dense_learning_rate} if dense_steps else None
        kind = partial(SparseTrainer, dense_args=dense) if method.is_ours else Trainer
        shuffled, callbacks = [rows[i] for i in order], [ShowSteps(advance)]
        trainer = kind(model=model, args=args, train_dataset=shuffled, data_collator=collate, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def finite(loss: float) -> float:
    """A loss to sort by: a run that diverged comes last."""
    return loss if math.isfinite(loss) else math.inf


# ---- which runs, and in which order ----------------------------------------------------------------


def best_rate(results: Results, name: str, method: Method, seed: int) -> float | None:
    """The learning rate with the lower loss at this seed, of those that have run."""
    found = {rate: run["loss"] for rate in method.learning_rates if (run := results.get(name, rate, seed))}
    return min(found, key=lambda rate: finite(found[rate])) if found else None


def plan(methods: dict[str, Method], seeds: list[int], results: Results) -> Iterator[tuple[str, float, int]]:
    """(method, learning rate, seed) of all runs, in stages; later ones depend on the results of earlier ones."""
    yield UNTUNED, 0.0, 0
    for number in range(2):
        for name, method in methods.items():
            yield name, method.learning_rates[number], seeds[0]
    for seed in seeds[1:]:
        for name, method in methods.items():
            rate = best_rate(results, name, method, seeds[0])
            assert rate is not None
            yield name, rate, seed


def settings_of(options: argparse.Namespace, checksum: int) -> Callable[[str], dict]:
    """{method: all that its result depends on beside learning rate and seed}."""

    def settings(name: str) -> dict:
        fields = [] if name == UNTUNED else ["steps", "batch_size", "density"]
        if name.startswith("spiel"):
            fields += ["reselection_steps", "estimation_steps"]
        if name == LOTTERY:
            fields += ["dense_learning_rate"]
        found = {field: getattr(options, field) for field in fields}
        return {"model": Path(options.model).name, "data": checksum, **found}

    return settings


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


def table(methods: dict[str, Method], seeds: list[int], results: Results, options: argparse.Namespace) -> Table:
    """What has run so far, best first."""
    caption = "loss: mean (standard deviation over seeds). - LoRA: mean (same, over seeds; standard error over rows)"
    title = (
        f"{Path(options.model).name}, {options.steps} steps of {options.batch_size} rows, density {options.density:g}"
    )
    shown = Table(title=title, caption=caption)
    shown.add_column("method")
    for heading in ("trained", "learning rate", "first seed at both", "seeds", "loss", "- LoRA", "s/run"):
        shown.add_column(heading, justify="right")
    if untuned := results.get(UNTUNED, 0.0, 0):
        shown.add_row(UNTUNED, "0", "", "", "", f"{untuned['loss']:.4f}", "", "")

    def runs_of(name: str) -> dict[int, dict]:
        rate = best_rate(results, name, methods[name], seeds[0])
        return {seed: run for seed in seeds if rate is not None and (run := results.get(name, rate, seed))}

    found = {name: runs for name in methods if (runs := runs_of(name))}
    base = found.get(LORA, {})
    for name, runs in sorted(found.items(), key=lambda item: finite(mean(run["loss"] for run in item[1].values()))):
        losses = [run["loss"] for run in runs.values()]
        both = [results.get(name, rate, seeds[0]) for rate in methods[name].learning_rates]
        common = [seed for seed in runs if seed in base]
        last = next(iter(runs.values()))
        shown.add_row(
            name,
            f"{last['trained']:,}",
            f"{last['learning_rate']:g}",
            " ".join(f"{run['learning_rate']:g}: {run['loss']:.4f}" for run in both if run),
            str(len(losses)),
            f"{mean(losses):.4f} ({spread(losses)})",
            paired([runs[s] for s in common], [base[s] for s in common]) if common and name != LORA else "",
            f"{mean(run['seconds'] for run in runs.values()):.0f}",
        )
    return shown


def run_all(methods: dict[str, Method], results: Results, train_rows, valid_rows, options, console: Console) -> None:
    total = 1 + len(methods) * (1 + len(options.seeds))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("runs", total=total)
        steps = progress.add_task("steps", total=options.steps)
        for name, rate, seed in plan(methods, options.seeds, results):
            if results.get(name, rate, seed) is None:
                progress.reset(steps, total=options.steps, description=f"{name} {rate:g} seed {seed}")
                start, trained = time.process_time(), 0
                if name == UNTUNED:
                    model = load(options, torch.bfloat16)
                else:
                    model, trained = train(
                        methods[name], rate, seed, train_rows, options, lambda: progress.advance(steps)
                    )
                autocast = name != UNTUNED and methods[name].trains_base
                rows = row_losses(model, valid_rows, autocast=autocast)
                del model
                loss = sum(row for row, _ in rows) / sum(count for _, count in rows)
                seconds = time.process_time() - start
                found = {"loss": loss, "trained": trained, "seconds": seconds, "rows": rows}
                results.add({"method": name, "learning_rate": rate, "seed": seed, **found})
                console.print(f"{name} {rate:g} seed {seed}: {loss:.4f} in {seconds:.0f} s of processor time")
            progress.advance(overall)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="directory or hub id")
    parser.add_argument("--data", default=str(DATA), help="a .jsonl file, or a folder with train.jsonl and valid.jsonl")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *EXTRAS], default=list(METHODS))
    parser.add_argument("--extras", action="store_true", help=f"also {', '.join(EXTRAS)}")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer rows are cut")
    parser.add_argument("--valid-rows", type=int, help="held-out rows to use [all]")
    parser.add_argument("--density", type=float, default=0.02, help="share of the linear layers' weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="*", default=[], metavar="METHOD=A,B", help="instead of the built-in")
    parser.add_argument("--dense-learning-rate", type=float, default=5e-5, help="of LT-SFT's dense phase")
    parser.add_argument("--reselection-steps", type=int, default=10, help="S of SpIEL")
    parser.add_argument("--estimation-steps", type=int, default=3, help="gamma of SpIEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/instruction_quality.jsonl"))
    parser.add_argument("--quick", action="store_true", help="8 steps of 2 short rows, to see that all methods run")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batch_size, options.max_length, options.valid_rows = 8, 2, 48, 4
        options.reselection_steps, options.estimation_steps, options.seeds = 3, 2, options.seeds[:1]
    if options.extras:
        options.methods = list(dict.fromkeys([*options.methods, *EXTRAS]))
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}: LT-SFT has two phases")
    return options


def chosen_methods(options: argparse.Namespace) -> dict[str, Method]:
    methods = {name: (METHODS | EXTRAS)[name] for name in options.methods}
    for given in options.learning_rates:
        name, _, rates = given.partition("=")
        try:
            first, second = map(float, rates.split(","))
            methods[name] = replace(methods[name], learning_rates=(first, second))
        except (KeyError, ValueError):
            raise SystemExit(f"--learning-rates takes METHOD=A,B with a method that runs, got {given!r}") from None
    return methods


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    methods = chosen_methods(options)
    train_rows, valid_rows, checksum = read_rows(
        Path(options.data),
        AutoTokenizer.from_pretrained(options.model),
        max_length=options.max_length,
        valid_rows=options.valid_rows,
    )
    results = Results(options.output, ("method", "learning_rate", "seed"), settings_of(options, checksum))
    # Wide enough for the table also where the output is a file.
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"{len(train_rows)} rows to train on, {len(valid_rows)} held out; results in {options.output}")
    try:
        run_all(methods, results, train_rows, valid_rows, options, console)
    finally:
        console.print(table(methods, options.seeds, results, options))


if __name__ == "__main__":
    main()
