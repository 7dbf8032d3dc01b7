"""Transfer to languages without labels: sparse methods, LoRA, BitFit and full fine-tuning, on real data.

    python tests/benchmarks/crosslingual_quality.py --model PATH --data PATH   # a good hour on two quiet cores
    python tests/benchmarks/crosslingual_quality.py --methods LT-SFT Rand-SFT LoRA --no-language
    python tests/benchmarks/crosslingual_quality.py --task nli                 # English MultiNLI -> AmericasNLI
    python tests/benchmarks/crosslingual_quality.py --larger                   # longer training: hours on a GPU
    python tests/benchmarks/crosslingual_quality.py --quick                    # do all methods run?

**The data** is a folder with `nusax_senti/{language}/{train,valid,test}.jsonl` (fields id, text, label), or for NLI
`mnli_en/{train,valid}.jsonl` and `americasnli/{language}/test.jsonl` (id, premise, hypothesis, label), and raw text in
`text/{language}.txt` and `text/nusax_train_{language}.txt`, a sentence or paragraph a line.

**A task adapter** is trained on the source language alone (Indonesian for sentiment, English for NLI), with the
source's language adapter of the same method active and frozen, as in Algorithm 1 of the LT-SFT paper; its row in the
table is that model. `--bare` trains it on the bare model, as this script did until November 2026, and so does
`--no-language`. (Departures that stay: norms are tuned in language adapters too, and there is no L1.) The adapters of
all methods but BitFit, Ada-SFT and full fine-tuning have the same number of weights: LoRA's, with the rank that comes
nearest to `--density` of the encoder. Targets are all parameters of the encoder (LoRA, Ada-SFT: its linear layers;
BitFit: its biases). What reads the encoder out, the pooler and the classifier, trains whole with every method, from the
start that the seed draws; it has the learning rate of the rest. Batches and their order are a function of the seed.

**LT-SFT, SC-SFT and DeFT-X select after a dense phase**, which is full fine-tuning, and a row of the table itself. In
language adapters, and with `--bare` in task adapters, it is one and the same, trained once for each seed. As in the
papers each phase is as long as the training of a one-phase method, so these three see twice the steps. SC-SFT is LT-SFT
with the layer budget of its report for this task.

**A language adapter** is trained by the same method on raw text of the target language, by masked language modelling
(a decoder: by predicting the next token), with one seed (the first), and added to the task adapters of every seed.
Where the model comes without a head that predicts words one is fitted first, with all else frozen, and shared by all
methods; the head and the output matrix stay frozen in the adapters' training. Sparse adapters are added up with
`add_weighted_adapter`, LoRA by merging one and loading the other, full fine-tuning by adding both changes of all
weights. Ada-SFT has no language adapter: its second phase trains all weights of the masked layers. Raw text includes
that of NusaX's own training rows, so a language adapter learns the domain as well as the language, and with short
training may do no more than that.

**Learning rates** of task adapters: one or two candidates for each method; the first seed runs both, and the better on
the validation rows of the source language (metric; on equal ones the loss) goes on. Nothing of a target language is
looked at; a hundred rows tell only coarse differences. Those of language adapters are fixed: the held-out loss
before and after, in the results, shows whether they fit. The schedule is linear decay after warm-up over a tenth, no
weight decay, dropout as the model has it, bfloat16 autocast over float32 weights.

Results are stored as they come, a line of `--output` each; adapters and dense phases in a folder of the same name, so
that a call with the same settings goes on where the last one stopped. Delete that folder when done: each dense phase is
as large as the model. Beside it lie the table as markdown and the plot. Differences between rows are taken seed by
seed; their standard error over test rows is a paired bootstrap, in which a sentence's translations are drawn together.
"""

from __future__ import annotations

import argparse
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import transformers
from _bench_runs import DATA, MODELS, Results
from _console import wide_console
from _crosslingual_data import SOURCES, Task, predict, read_task
from _crosslingual_methods import BITFIT, FULL, LT_SFT, METHODS, Method
from _crosslingual_report import BOTH, TASK, Row, Scorer, cells, markdown, plot, rich_table
from _crosslingual_training import Bench
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoConfig, AutoModel, AutoTokenizer

MODEL = MODELS / "minilm"
LANGUAGE = "language"
FIELDS = ("kind", "method", "learning_rate", "seed", "language")
# Processor time of a step on 16 rows of 64 tokens (MiniLM, one thread, bfloat16), for the estimate.
STEP_SECONDS = {TASK: 0.3, LANGUAGE: 0.9}


@dataclass(frozen=True)
class Job:
    """One line of the results: a task adapter, a language adapter, or what both make of a language's test."""

    kind: str
    method: str
    rate: float
    seed: int
    language: str | None = None

    @property
    def key(self) -> tuple:
        return self.kind, self.method, self.rate, self.seed, self.language


# ---- which runs, and in which order ----------------------------------------------------------------


def best_rate(options: argparse.Namespace, results: Results, name: str) -> float | None:
    """The learning rate with the better validation score at the first seed, of those that have run."""
    seed = options.seeds[0]
    found = {rate: run for rate in options.rates[name] if (run := results.get(TASK, name, rate, seed, None))}
    return max(found, key=lambda rate: (found[rate]["valid"], -found[rate]["valid_loss"])) if found else None


def plan(options: argparse.Namespace, results: Results) -> Iterator[Job]:
    """All jobs in stages, after each of which the table means something; later ones depend on earlier ones' results."""
    seeds = options.seeds
    if not options.bare:
        for name in options.methods:
            if (rate := METHODS[name].language_rate) is not None:
                yield Job(LANGUAGE, name, rate, seeds[0], SOURCES[options.task].language)
    for number in range(max((len(options.rates[name]) for name in options.methods), default=0)):
        for name in options.methods:
            for rate in options.rates[name][number : number + 1]:
                yield Job(TASK, name, rate, seeds[0])

    def rate_of(name: str) -> float:
        rate = best_rate(options, results, name)
        assert rate is not None
        return rate

    for seed in seeds[1:]:
        for name in options.methods:
            yield Job(TASK, name, rate_of(name), seed)
    for language in options.languages if options.language else []:
        for name in options.methods:
            rate = METHODS[name].language_rate
            if rate is not None:
                yield Job(LANGUAGE, name, rate, seeds[0], language)
                for seed in seeds:
                    yield Job(BOTH, name, rate_of(name), seed, language)


def steps_of(options: argparse.Namespace) -> dict[str, int]:
    """{kind: how many optimizer steps in all}, the shared dense phases and heads included."""
    methods = {name: METHODS[name] for name in options.methods}
    shares = any(method.selects or method.config is None for method in methods.values())

    def phases(method: Method) -> int:
        # Full fine-tuning is the dense phase; a method with a first phase of its own trains twice.
        return 0 if method.config is None else 2 if method.mask_args else 1

    runs = {name: len(options.rates[name]) + len(options.seeds) - 1 for name in methods}
    # Above a language adapter of its own, each method that selects has a dense phase of its own.
    dense = sum(method.selects or method.config is None for method in methods.values()) if not options.bare else shares
    task = sum(runs[name] * phases(method) for name, method in methods.items()) + dense * len(options.seeds)
    language = sum(phases(method) for method in methods.values() if method.language_rate is not None) + shares
    languages = (len(options.languages) if options.language else 0) + (not options.bare)
    return {
        TASK: task * options.task_steps,
        LANGUAGE: languages * (language * options.language_steps + options.head_steps),
    }


def settings_of(options: argparse.Namespace, checksum: int) -> Callable[[str], dict]:
    """{kind of job: all that its result depends on beside learning rate, seed, language and raw text}."""
    shared = ["task", "batch_size", "max_length", "density"]
    fields = {TASK: ["task_steps"], LANGUAGE: ["language_steps", "head_steps"]}
    fields[BOTH] = fields[TASK] + fields[LANGUAGE]
    needs_language = {BOTH} if options.bare else {BOTH, TASK}

    def settings(kind: str) -> dict:
        found = {field: getattr(options, field) for field in shared + fields[BOTH if kind in needs_language else kind]}
        rates = {TASK: options.rates[FULL][0], LANGUAGE: METHODS[FULL].language_rate}
        dense = rates if kind in needs_language else {kind: rates[kind]}
        if kind in needs_language:
            found["language_seed"] = options.seeds[0]
        if not options.bare and kind != LANGUAGE:
            found["source_adapter"] = SOURCES[options.task].language
        return {"model": Path(options.model).name, "data": checksum, "dense_rates": dense, **found}

    return settings


# ---- one run ---------------------------------------------------------------------------------------


def run(job: Job, bench: Bench, task: Task, scorer: Scorer) -> dict:
    """What a job finds out; adapters that it needs and that are not there are trained."""
    if job.kind == BOTH:
        return run_both(job, bench, task)
    corpus = bench.task if job.kind == TASK else bench.language(job.language or "")
    before = bench.start_loss(corpus.name) if job.kind == LANGUAGE else 0.0
    # What several methods share counts for each of them, though it ran once.
    seconds = bench.dense_seconds(job.method, corpus, job.seed)
    start = time.process_time()
    adapter = bench.adapter(job.method, corpus, job.rate, job.seed)
    seconds += time.process_time() - start
    if job.kind == LANGUAGE:
        after = bench.language_loss(corpus.name, job.method, adapter)
        return {"loss_before": before, "loss_after": after, "seconds": seconds}
    model = bench.with_task(job.method, adapter)
    answers, loss = predict(model, task.valid, bench.tokenizer)
    return {
        "valid": scorer.score_rows(answers, [row["labels"] for row in task.valid]),
        "valid_loss": loss,
        "predictions": {name: predict(model, rows, bench.tokenizer)[0] for name, rows in task.tests.items()},
        "trained": bench.trained(job.method, adapter),
        "seconds": seconds,
    }


def run_both(job: Job, bench: Bench, task: Task) -> dict:
    """The sum of a task adapter and a language adapter, on the language's test."""
    language = bench.language(job.language or "")
    task_adapter = bench.adapter(job.method, bench.task, job.rate, job.seed)
    model = bench.with_both(job.method, task_adapter, bench.language_adapter(job.method, language.name))
    return {"predictions": {language.name: predict(model, task.tests[language.name], bench.tokenizer)[0]}}


def told(job: Job, found: dict, scorer: Scorer) -> str:
    """A line about a finished job."""
    name = f"{job.method} {job.rate:g} seed {job.seed}"
    if job.kind == LANGUAGE:
        losses = f"{found['loss_before']:.3f} -> {found['loss_after']:.3f}"
        return f"{name}, language {job.language}: held-out loss {losses} in {found['seconds']:.0f} s"
    scores = " ".join(f"{lang} {scorer.of(lang, p):.1f}" for lang, p in found["predictions"].items())
    if job.kind == BOTH:
        return f"{name} + language: {scores}"
    return f"{name}: valid {found['valid']:.1f} (loss {found['valid_loss']:.3f}), {scores} in {found['seconds']:.0f} s"


def run_all(bench: Bench, options: argparse.Namespace, task: Task, scorer: Scorer, results, console: Console) -> None:
    steps = steps_of(options)
    scale = options.batch_size * options.max_length / (16 * 64)
    seconds = sum(scale * STEP_SECONDS[kind] * count for kind, count in steps.items())
    console.print(
        f"{steps[TASK]:,} steps of the task, {steps[LANGUAGE]:,} of language modelling: about {seconds / 60:.0f} "
        "minutes of processor time for a model like MiniLM, evaluation a sixth more, less what is there already"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(steps.values()))
        bench.advance = lambda: progress.advance(bar)
        for job in plan(options, results):
            if results.get(*job.key) is None:
                progress.update(bar, description=" ".join(str(part) for part in job.key if part is not None))
                found = run(job, bench, task, scorer)
                results.add({**dict(zip(FIELDS, job.key, strict=True)), **found})
                console.print(told(job, found, scorer))


# ---- the table -------------------------------------------------------------------------------------


def rows_of(options: argparse.Namespace, results: Results) -> list[Row]:
    """What has run so far: each method at its better learning rate, alone and with language adapters."""
    rows = []
    for name in options.methods:
        rate = best_rate(options, results, name)
        if rate is None:
            continue
        runs = {seed: found for seed in options.seeds if (found := results.get(TASK, name, rate, seed, None))}
        alone = {seed: found["predictions"] for seed, found in runs.items()}
        trained = next(iter(runs.values()))["trained"]
        rows.append(Row(name, TASK, trained, rate, mean(found["seconds"] for found in runs.values()), alone))
        both: dict[int, dict] = {}
        seconds = []
        for language in options.languages if options.language else []:
            own = results.get(LANGUAGE, name, METHODS[name].language_rate, options.seeds[0], language)
            seconds += [own["seconds"]] if own else []
            for seed in options.seeds:
                if found := results.get(BOTH, name, rate, seed, language):
                    both.setdefault(seed, {}).update(found["predictions"])
        if both:
            rows.append(Row(name, BOTH, trained, rate, mean(seconds), both))
    return rows


def report(options: argparse.Namespace, results: Results, scorer: Scorer, console: Console) -> None:
    rows = rows_of(options, results)
    if not rows:
        return
    languages = list(scorer.truth)
    reference = LT_SFT if LT_SFT in options.methods else rows[0].method
    title = f"{options.task}, {Path(options.model).name}: {scorer.metric}, trained on {SOURCES[options.task].language}"
    headings, lines = cells(rows, languages, scorer, reference)
    console.print(rich_table(title, headings, lines))
    options.output.with_suffix(".md").write_text(markdown(title, headings, lines), encoding="utf-8")
    plot(rows, languages, scorer, options.output.with_suffix(".png"), title)
    console.print(f"results, table and plot: {options.output.with_suffix('')}.{{jsonl,md,png}}")


# ---- command line ----------------------------------------------------------------------------------


def rates_of(changes: list[str]) -> dict[str, tuple[float, ...]]:
    """{method: candidates for the learning rate of its task adapter}."""
    rates = {name: method.rates for name, method in METHODS.items()}
    for change in changes:
        name, _, given = change.partition("=")
        try:
            rates[name] = tuple(float(rate) for rate in given.split(","))
            # The dense phase that others share runs at the one rate of full fine-tuning.
            if name not in METHODS or (name == FULL and len(rates[name]) > 1):
                raise ValueError
        except ValueError:
            known = ", ".join(METHODS)
            raise SystemExit(
                f"--learning-rates takes METHOD=A[,B] with one of {known}, and one rate for {FULL}; got {change!r}"
            ) from None
    return rates


def has_biases(model: str) -> bool:
    with torch.device("meta"):
        built = AutoModel.from_config(AutoConfig.from_pretrained(model))
    return any(name.endswith("bias") for name, _ in built.named_parameters())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(SOURCES), default="sentiment")
    parser.add_argument("--model", default=str(MODEL), help="an encoder, or a decoder: directory or hub id")
    parser.add_argument("--data", default=str(DATA), help="folder, laid out as above")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--languages", nargs="+", help="to transfer to [four of the task's]")
    parser.add_argument("--no-language", dest="language", action="store_false", help="task adapters alone")
    parser.add_argument("--bare", action="store_true", help="task adapters without the source language's below them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task-steps", type=int, default=128, help="optimizer steps of a phase of a task adapter")
    parser.add_argument("--language-steps", type=int, default=100, help="the same of a language adapter")
    parser.add_argument("--head-steps", type=int, default=100, help="of the head that predicts words")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64, help="tokens; longer rows are cut")
    parser.add_argument("--density", type=float, default=0.05, help="share of the encoder's weights")
    parser.add_argument("--rows", type=int, help="rows of each file of the task to use [all]")
    parser.add_argument("--learning-rates", nargs="*", default=[], metavar="METHOD=A[,B]", help="of task adapters")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="[outputs/crosslingual_TASK.jsonl]")
    parser.add_argument("--larger", action="store_true", help="longer training and rows, five seeds")
    parser.add_argument("--quick", action="store_true", help="3 steps on short rows, to see that all methods run")
    options = parser.parse_args()
    options.bare = options.bare or not options.language
    options.languages = options.languages or list(SOURCES[options.task].languages)
    if options.larger:
        options.task_steps, options.language_steps, options.head_steps = 640, 3000, 2000
        options.max_length, options.seeds = 128, [0, 1, 2, 3, 4]
    if options.quick:
        options.task_steps = options.language_steps = options.head_steps = 3
        options.batch_size, options.max_length, options.rows = 4, 16, 16
        options.seeds, options.languages = options.seeds[:2], options.languages[:1]
    name = f"crosslingual_{options.task}{'_quick' * options.quick}.jsonl"
    options.rates = rates_of(options.learning_rates)
    options.output = options.output or Path("outputs") / name
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Wide enough for the table also where the output is a file.
    console = wide_console()
    if BITFIT in options.methods and not has_biases(options.model):
        console.print(f"{BITFIT} is left out: the model has no biases")
        options.methods.remove(BITFIT)
    source, tokenizer = SOURCES[options.task], AutoTokenizer.from_pretrained(options.model)
    lengths = {"length": options.max_length, "rows": options.rows}
    task = read_task(Path(options.data), source, options.languages, tokenizer, **lengths)
    truth = {language: task.truth(language) for language in task.tests}
    scorer = Scorer(source.metric, len(task.labels), truth, task.ids, options.languages)
    settings = settings_of(options, task.checksum())
    results = Results(options.output, FIELDS, settings)
    folder = options.output.with_suffix("") / f"{zlib.crc32(repr(settings(BOTH)).encode()):08x}"
    bench = Bench(options, task, source, tokenizer, folder=folder, advance=lambda: None)
    try:
        run_all(bench, options, task, scorer, results, console)
    finally:
        report(options, results, scorer, console)


if __name__ == "__main__":
    main()
