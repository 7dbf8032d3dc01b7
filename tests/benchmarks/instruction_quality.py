"""Held-out loss after an instruction tuning: sparse methods beside LoRA and full fine-tuning, each at its best rate.

    python tests/benchmarks/instruction_quality.py --model PATH --data PATH            # hours on two cores
    python tests/benchmarks/instruction_quality.py --workers 8 --minutes 10            # side by side, on a GPU
    python tests/benchmarks/instruction_quality.py --quick                             # do all methods run?
    python tests/benchmarks/instruction_quality.py --plot curves.png --minutes 0       # from what has run

Every method trains as many weights as LoRA (full fine-tuning: all), takes the same number of optimizer steps on the
same batches in the same order (a function of the seed), with cosine decay after a short warm-up, no weight decay and
gradients clipped to norm 1. LT-SFT spends half of its steps in the dense phase, with `--dense-learning-rate`, and half
in the sparse phase, which starts the rows over. Frozen bases are bfloat16 with float32 adapters; where base weights
themselves train (full fine-tuning, LT-SFT) they are float32 under bfloat16 autocast, for many updates are too small for
bfloat16. The loss is the mean over all answer tokens of the held-out rows, in nats. With `--general FILE` the loss on
other text (its first lines) is measured as well: what the tuning made the model forget.

With the first seed every method runs at the rates of its row, and at more, by factors of two, until its best has a
worse one on either side; the other seeds run at the best, methods with the lowest loss first. A finished run is a line
of `--output`; the next call with the same settings goes on from there. The seed draws order, random supports and LoRA's
matrices alike; differences to LoRA are taken seed by seed.

Methods on trial are in `_quality_methods.py`; `--methods` takes them by name.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
import transformers
from _bench_runs import Results, spread
from _instruction_rows import collate, read_rows, read_texts, row_losses
from _quality_methods import EXTRAS, LORA, LOTTERY, METHODS, UNTUNED, Method, Run, input_energies, linear_layers
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from peft_sparse import LotteryTicketConfig, SparseTrainer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca"
MODEL = Path(os.environ.get("PEFT_SPARSE_MODELS", Path.home() / ".cache" / "peft-sparse-models")) / "smollm2"
ALL = METHODS | EXTRAS
# A search over learning rates ends here, bracketed or not.
MOST_RATES = 6


@dataclass(frozen=True)
class Tasks:
    """Rows to train on, held-out rows of the same task, and rows of other text (may be none)."""

    train: list[dict]
    valid: list[dict]
    general: list[dict]


# ---- one run ---------------------------------------------------------------------------------------


def load(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def train(
    method: Method, rate: float, seed: int, rows: list[dict], options: argparse.Namespace
) -> tuple[nn.Module, int]:
    """(the trained model, how many weights it trained)."""
    set_seed(seed)
    model: nn.Module = load(options, torch.float32 if method.trains_base else torch.bfloat16)
    shapes = [layer.weight.shape for _, layer in linear_layers(model)]
    per_rank = sum(o + i for o, i in shapes)
    rank = max(1, round(options.density * sum(o * i for o, i in shapes) / per_rank))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[i] for i in order]
    first = [collate(shuffled[start : start + 4]) for start in range(0, 16, 4)]
    energies = input_energies(model, first) if method.prepare is not None else {}
    run = Run(rank * per_rank, rank, seed, model, energies, options)
    config = method.config(run)
    if config is not None:
        model = get_peft_model(model, config)
    dense_steps = options.steps // 2 if isinstance(config, LotteryTicketConfig) else 0
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps - dense_steps,
            per_device_train_batch_size=1,
            logging_nan_inf_filter=False,
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
            dataloader_pin_memory=False,
        )
        dense = {"max_steps": dense_steps, "learning_rate": options.dense_learning_rate} if dense_steps else None
        kind = partial(SparseTrainer, dense_args=dense) if method.is_ours else Trainer
        callback = method.prepare(model, run) if method.prepare is not None else None
        callbacks = [callback] if callback is not None else []
        # Padded and on the device beforehand: several runs on one GPU wait for the processor.
        batches = in_batches(shuffled, options.batch_size, options.steps, model.device)
        trainer = kind(model=model, args=args, train_dataset=batches, data_collator=only, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def in_batches(rows: list[dict], size: int, count: int, device: torch.device) -> list[dict]:
    """At most `count` batches of so many rows, in their order, a last small one among them."""
    starts = range(0, len(rows), size)[:count]
    return [{n: t.to(device) for n, t in collate(rows[start : start + size]).items()} for start in starts]


def only(batches: list[dict]) -> dict:
    """The one batch that a trainer's batch consists of."""
    return batches[0]


def measure(name: str, rate: float, seed: int, tasks: Tasks, options: argparse.Namespace) -> dict:
    """One run, as a line of the results."""
    start, trained = time.perf_counter(), 0
    autocast = name != UNTUNED and ALL[name].trains_base
    if name == UNTUNED:
        model = load(options, torch.bfloat16)
    else:
        model, trained = train(ALL[name], rate, seed, tasks.train, options)
    rows = row_losses(model, tasks.valid, autocast=autocast)
    found = {"loss": mean_loss(rows), "trained": trained, "rows": rows}
    if tasks.general:
        found["general"] = mean_loss(row_losses(model, tasks.general, autocast=autocast))
    return {"method": name, "learning_rate": rate, "seed": seed, **found, "seconds": time.perf_counter() - start}


def mean_loss(rows: list[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in rows) / sum(count for _, count in rows)


def finite(loss: float) -> float:
    """A loss to sort by: a run that diverged comes last."""
    return loss if math.isfinite(loss) else math.inf


# ---- which runs, and in which order ----------------------------------------------------------------


def rates_run(results: Results, name: str, seed: int) -> dict[float, dict]:
    """{learning rate: run} of a method and a seed."""
    return {rate: run for (method, rate, s), run in results.items() if method == name and s == seed}


def best_rate(results: Results, name: str, seed: int) -> float | None:
    """The learning rate with the lowest loss at this seed, of those that have run."""
    found = rates_run(results, name, seed)
    return min(found, key=lambda rate: finite(found[rate]["loss"])) if found else None


def next_rates(rates: tuple[float, ...], results: Results, name: str, seed: int, *, search: bool = True) -> list[float]:
    """What a method's search still wants: its own rates, then one beyond the best where that lies at an end."""
    found = rates_run(results, name, seed)
    if missing := [rate for rate in rates if rate not in found]:
        return missing
    best = best_rate(results, name, seed)
    assert best is not None
    if not search or len(found) >= MOST_RATES or min(found) < best < max(found):
        return []
    return [best * 2 if best == max(found) else best / 2]


def wanted(
    methods: dict[str, Method], seeds: list[int], results: Results, *, search: bool = True
) -> list[tuple[str, float, int]]:
    """(method, learning rate, seed) of all runs that can start now, the most telling first."""
    first = [] if results.get(UNTUNED, 0.0, seeds[0]) else [(UNTUNED, 0.0, seeds[0])]
    searched, beyond, others = [], [], []
    for name, method in methods.items():
        missing = next_rates(method.learning_rates, results, name, seeds[0], search=search)
        given = [rate for rate in missing if rate in method.learning_rates]
        searched += [(method.learning_rates.index(rate), (name, rate, seeds[0])) for rate in given]
        beyond += [(name, rate, seeds[0]) for rate in missing if rate not in method.learning_rates]
        best = best_rate(results, name, seeds[0])
        if not missing and best is not None:
            loss = finite(results.get(name, best, seeds[0])["loss"])
            others += [((name != LORA, loss), (name, best, s)) for s in seeds[1:] if not results.get(name, best, s)]
    in_order = [run for _, run in sorted(searched, key=lambda item: item[0])]
    return first + in_order + beyond + [run for _, run in sorted(others, key=lambda item: item[0])]


def settings_of(options: argparse.Namespace, checksum: int) -> Callable[[str], dict]:
    """{method: all that its result depends on beside learning rate and seed}."""

    def settings(name: str) -> dict:
        fields = [] if name == UNTUNED else ["steps", "batch_size", "density"]
        if name.startswith("spiel"):
            fields += ["reselection_steps", "estimation_steps"]
        if name == LOTTERY:
            fields += ["dense_learning_rate"]
        if name not in METHODS or "one_shot" in name:
            fields += ["selection_batches"]
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


def general(*runs: dict) -> str:
    """Mean loss on other text, where it was measured."""
    found = [run["general"] for run in runs if "general" in run]
    return f"{mean(found):.4f}" if found else ""


def table(methods: dict[str, Method], seeds: list[int], results: Results, options: argparse.Namespace) -> Table:
    """What has run so far, best first."""
    caption = "loss: mean (standard deviation over seeds). - LoRA: mean (same, over seeds; standard error over rows)"
    title = (
        f"{Path(options.model).name}, {options.steps} steps of {options.batch_size} rows, density {options.density:g}"
    )
    shown = Table(title=title, caption=caption)
    shown.add_column("method")
    for heading in ("trained", "learning rate", "first seed by rate", "seeds", "loss", "- LoRA", "other text", "s/run"):
        shown.add_column(heading, justify="right")
    if untuned := results.get(UNTUNED, 0.0, 0):
        shown.add_row(UNTUNED, "0", "", "", "", f"{untuned['loss']:.4f}", "", general(untuned), "")

    def runs_of(name: str) -> dict[int, dict]:
        rate = best_rate(results, name, seeds[0])
        return {seed: run for seed in seeds if rate is not None and (run := results.get(name, rate, seed))}

    found = {name: runs for name in methods if (runs := runs_of(name))}
    base = found.get(LORA, {})
    for name, runs in sorted(found.items(), key=lambda item: finite(mean(run["loss"] for run in item[1].values()))):
        losses = [run["loss"] for run in runs.values()]
        searched = sorted(rates_run(results, name, seeds[0]).items())
        common = [seed for seed in runs if seed in base]
        last = next(iter(runs.values()))
        shown.add_row(
            name,
            f"{last['trained']:,}",
            f"{last['learning_rate']:g}",
            " ".join(f"{rate:g}: {run['loss']:.4f}" for rate, run in searched),
            str(len(losses)),
            f"{mean(losses):.4f} ({spread(losses)})",
            paired([runs[s] for s in common], [base[s] for s in common]) if common and name != LORA else "",
            general(*runs.values()),
            f"{mean(run['seconds'] for run in runs.values()):.0f}",
        )
    return shown


def run_all(methods: dict[str, Method], results: Results, tasks: Tasks, options, console: Console) -> None:
    """Run what is wanted, `--workers` at a time, until nothing is or the time is up."""
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future, tuple[str, float, int]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=quiet) as pool:
        while True:
            runs = wanted(methods, options.seeds, results, search=not options.rates)
            free = [run for run in runs if run not in running.values()]
            while free and len(running) < options.workers and time.monotonic() < end:
                run = free.pop(0)
                running[pool.submit(measure, *run, tasks, options)] = run
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                run = done.result()
                results.add(run)
                console.print("{method} {learning_rate:g} seed {seed}: {loss:.4f} in {seconds:.0f} s".format(**run))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="directory or hub id")
    parser.add_argument("--data", default=str(DATA), help="a .jsonl file, or a folder with train.jsonl and valid.jsonl")
    parser.add_argument("--methods", nargs="+", choices=list(ALL), default=list(METHODS))
    parser.add_argument("--rates", type=int, help="so many of each method's rates, best guess first, and no search")
    parser.add_argument("--extras", action="store_true", help=f"also {', '.join(EXTRAS)}")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer rows are cut")
    parser.add_argument("--valid-rows", type=int, help="held-out rows to use [all]")
    parser.add_argument("--density", type=float, default=0.02, help="share of the linear layers' weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates", nargs="*", default=[], metavar="METHOD=A,B,...", help="instead of the built-in"
    )
    parser.add_argument("--dense-learning-rate", type=float, default=5e-5, help="of LT-SFT's dense phase")
    parser.add_argument("--reselection-steps", type=int, default=10, help="S of SpIEL")
    parser.add_argument("--estimation-steps", type=int, default=3, help="gamma of SpIEL")
    parser.add_argument("--selection-batches", type=int, default=8, help="of the one-shot criteria")
    parser.add_argument("--general", type=Path, help="a text file: loss on its first lines, to see what is forgotten")
    parser.add_argument("--general-rows", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run starts after so many")
    parser.add_argument("--plot", type=Path, help="draw loss by learning rate, and other text's loss against it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/instruction_quality.jsonl"))
    parser.add_argument("--quick", action="store_true", help="8 steps of 2 short rows, to see that all methods run")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batch_size, options.max_length, options.valid_rows = 8, 2, 48, 4
        options.learning_rates = [f"{name}=1e-3" for name in options.methods]
        options.reselection_steps, options.estimation_steps, options.seeds = 3, 2, options.seeds[:1]
    if options.extras:
        options.methods = list(dict.fromkeys([*options.methods, *EXTRAS]))
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}: LT-SFT has two phases")
    return options


def chosen_methods(options: argparse.Namespace) -> dict[str, Method]:
    methods = {name: ALL[name] for name in options.methods}
    if options.rates:
        methods = {n: replace(m, learning_rates=m.learning_rates[: options.rates]) for n, m in methods.items()}
    for given in options.learning_rates:
        name, _, rates = given.partition("=")
        try:
            methods[name] = replace(methods[name], learning_rates=tuple(map(float, rates.split(","))))
        except (KeyError, ValueError):
            raise SystemExit(f"--learning-rates takes METHOD=A,B,... with a method that runs, got {given!r}") from None
    return methods


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    quiet()
    methods = chosen_methods(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train_rows, valid_rows, checksum = read_rows(
        Path(options.data), tokenizer, max_length=options.max_length, valid_rows=options.valid_rows
    )
    other = read_texts(options.general, tokenizer, options.max_length, options.general_rows) if options.general else []
    results = Results(options.output, ("method", "learning_rate", "seed"), settings_of(options, checksum))
    # Wide enough for the table also where the output is a file.
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(f"{len(train_rows)} rows to train on, {len(valid_rows)} held out; results in {options.output}")
    try:
        run_all(methods, results, Tasks(train_rows, valid_rows, other), options, console)
    finally:
        console.print(table(methods, options.seeds, results, options))
    if options.plot:
        from _quality_plot import draw

        searched = {name: rates_run(results, name, options.seeds[0]) for name in methods}
        draw(searched, results.get(UNTUNED, 0.0, options.seeds[0]), options.plot)


if __name__ == "__main__":
    main()
