"""Held-out loss after an instruction tuning: sparse methods beside LoRA and full fine-tuning, each at its best rate.

    python tests/benchmarks/instruction_quality.py --model PATH --data PATH            # hours on two cores
    python tests/benchmarks/instruction_quality.py --workers 8 --minutes 10            # side by side, on a GPU
    python tests/benchmarks/instruction_quality.py --quick                             # do all methods run?
    python tests/benchmarks/instruction_quality.py --plot curves.png --minutes 0       # from what has run

Every method trains as many weights as LoRA (full fine-tuning: all), takes the same number of optimizer steps on the
same batches in the same order (a function of the seed), with cosine decay after a short warm-up, gradients clipped to
norm 1, and no weight decay without `--weight-decay`. LT-SFT spends half of its steps in the dense phase, with
`--dense-learning-rate`, and half in the sparse phase, which starts the rows over. Frozen bases are bfloat16 with
float32 adapters; where base weights themselves train (full fine-tuning, LT-SFT) they are float32 under bfloat16
autocast, for many updates are too small for bfloat16. (All is float32 on a processor without bfloat16 units.) The loss
is the mean over all answer tokens of the held-out rows, in nats. With `--general FILE` the loss on other text (its
first lines) is measured as well: what the tuning made the model forget.

With the first seed every method runs at the rates of its row, and at more, by factors of two, until its best has a
worse one on either side; the other seeds run at the best, methods with the lowest loss first. A finished run is a line
of `--output`; the next call with the same settings goes on from there. The seed draws order, random supports and LoRA's
matrices alike; differences to LoRA are taken seed by seed.

Methods on trial are in `_quality_methods.py`; `--methods` takes them by name. Several data sets run side by side.

**The next verdict** is one call on a GPU with 16 cores, in under nine minutes:

    python tests/benchmarks/instruction_quality.py --verdict --model PATH --data gsm8k alpaca --general TEXT \\
        --threads 1 --workers 14 --minutes 5 --output verdict.jsonl --plot verdict.png

It runs all seeds at each method's first rate, which is no search, LoRA first; then the other rates of the first seed,
so that each is bracketed. A run of 400 updates took 130 to 210 s there beside 13 others, and no run starts after
`--minutes`; what is left runs in the next call. Several processes share a GPU better under CUDA MPS
(`nvidia-cuda-mps-control -d`).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from _bench_runs import DATA, FAST_BFLOAT16, MODELS, Results
from _console import wide_console
from _instruction_rows import collate, read_rows, read_texts, row_losses
from _quality_methods import EXTRAS, LORA, LOTTERY, METHODS, UNTUNED, Method, Run, input_energies, linear_layers
from _quality_runs import rates_run, table, wanted
from peft import get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from peft_sparse import LotteryTicketConfig, SparseTrainer

MODEL = MODELS / "smollm2"
# Of what stays frozen.
DTYPE = torch.bfloat16 if FAST_BFLOAT16 else torch.float32
ALL = METHODS | EXTRAS
# What the next verdict takes: the settings of RESULTS.md, so that its rows count; and these methods.
VERDICT = {
    "methods": [LORA, "one_shot_fitted", "spiel_ag_mended_fitted", "rand", "spiel_ma"],
    "steps": 400,
    "batch_size": 8,
    "max_length": 256,
    "valid_rows": 128,
    "reselection_steps": 20,
    "estimation_steps": 5,
    "seeds_first": True,
}


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
    model: nn.Module = load(options, torch.float32 if method.trains_base else DTYPE)
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
            weight_decay=options.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            seed=seed,
            bf16=method.trains_base and FAST_BFLOAT16,
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
    autocast = FAST_BFLOAT16 and name != UNTUNED and ALL[name].trains_base
    if name == UNTUNED:
        model = load(options, DTYPE)
    else:
        model, trained = train(ALL[name], rate, seed, tasks.train, options)
    rows = row_losses(model, tasks.valid, autocast=autocast)
    found = {"loss": mean_loss(rows), "trained": trained, "rows": rows}
    if tasks.general:
        found["general"] = mean_loss(row_losses(model, tasks.general, autocast=autocast))
    return {"method": name, "learning_rate": rate, "seed": seed, **found, "seconds": time.perf_counter() - start}


def mean_loss(rows: list[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in rows) / sum(count for _, count in rows)


def settings_of(options: argparse.Namespace, checksum: int) -> Callable[[str], dict]:
    """{method: all that its result depends on beside learning rate and seed}."""

    def settings(name: str) -> dict:
        fields = [] if name == UNTUNED else ["steps", "batch_size", "density"]
        if name != UNTUNED and options.weight_decay:
            fields += ["weight_decay"]
        if name.startswith("spiel"):
            fields += ["reselection_steps", "estimation_steps"]
        if name == LOTTERY:
            fields += ["dense_learning_rate"]
        if name != UNTUNED and (name not in METHODS or "one_shot" in name):
            fields += ["selection_batches"]
        found = {field: getattr(options, field) for field in fields}
        dtype = {} if FAST_BFLOAT16 else {"dtype": "float32"}
        return {"model": Path(options.model).name, "data": checksum, **dtype, **found}

    return settings


# ---- all of them -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work:
    """What there is to run on one data set: its name, the methods, what has run, and the rows."""

    name: str
    methods: dict[str, Method]
    results: Results
    tasks: Tasks


def waiting(works: list[Work], options: argparse.Namespace) -> list[tuple[Work, tuple[str, float, int]]]:
    """What can start now, of all data sets in turn."""
    how = {"search": not options.rates, "seeds_first": options.seeds_first}
    queues = [[(work, run) for run in wanted(work.methods, options.seeds, work.results, **how)] for work in works]
    return [item for items in zip_longest(*queues) for item in items if item is not None]


def run_all(works: list[Work], options: argparse.Namespace, console: Console) -> None:
    """Run what is wanted, `--workers` at a time, until nothing is or the time is up."""
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future, tuple[Work, tuple[str, float, int]]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=quiet) as pool:
        while True:
            free = [item for item in waiting(works, options) if item not in running.values()]
            while free and len(running) < options.workers and time.monotonic() < end:
                work, run = free.pop(0)
                running[pool.submit(measure, *run, work.tasks, options)] = work, run
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                work, _ = running.pop(done)
                found = done.result()
                work.results.add(found)
                told = "{method} {learning_rate:g} seed {seed}: {loss:.4f} in {seconds:.0f} s".format(**found)
                console.print(f"{work.name}: {told}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="directory or hub id")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[str(DATA / "alpaca")],
        help=".jsonl files, or folders with train.jsonl and valid.jsonl",
    )
    parser.add_argument("--methods", nargs="+", choices=list(ALL), default=list(METHODS))
    parser.add_argument("--rates", type=int, help="so many of each method's rates, best guess first, and no search")
    parser.add_argument("--seeds-first", action="store_true", help="all seeds at each first rate, then other rates")
    parser.add_argument("--verdict", action="store_true", help="the methods and settings of the next verdict")
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
    parser.add_argument("--weight-decay", type=float, default=0.0, help="lambda, decoupled, of every method")
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
    options = parser.parse_args(arguments)
    if options.verdict:
        parser.set_defaults(**VERDICT)
        options = parser.parse_args(arguments)
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


def read_work(data: Path, tokenizer, options: argparse.Namespace) -> Work:
    how = {"max_length": options.max_length, "valid_rows": options.valid_rows}
    train_rows, valid_rows, checksum = read_rows(data, tokenizer, **how)
    other = read_texts(options.general, tokenizer, options.max_length, options.general_rows) if options.general else []
    results = Results(options.output, ("method", "learning_rate", "seed"), settings_of(options, checksum))
    return Work(data.stem, chosen_methods(options), results, Tasks(train_rows, valid_rows, other))


def plot_path(options: argparse.Namespace, work: Work) -> Path:
    """Of one data set as it was given, else with its name in it."""
    return options.plot if len(options.data) == 1 else options.plot.with_stem(f"{options.plot.stem}_{work.name}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    works = [read_work(Path(data), tokenizer, options) for data in options.data]
    # Wide enough for the table also where the output is a file.
    console = wide_console()
    for work in works:
        counts = f"{len(work.tasks.train)} rows to train on, {len(work.tasks.valid)} held out"
        console.print(f"{work.name}: {counts}; results in {options.output}")
    try:
        run_all(works, options, console)
    finally:
        for work in works:
            console.print(table(work.methods, work.results, options, work.name))
    for work in works if options.plot else ():
        from _quality_plot import draw

        searched = {name: rates_run(work.results, name, options.seeds[0]) for name in work.methods}
        draw(searched, work.results.get(UNTUNED, 0.0, options.seeds[0]), plot_path(options, work))


if __name__ == "__main__":
    main()
