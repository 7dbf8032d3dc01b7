"""Which parts of the authors' recipe carry sentiment across languages: source adapter x norms x L1, on NusaX.

    python tests/benchmarks/nusax_factorial.py --model ENCODER --data PATH     # about two hours on one core
    python tests/benchmarks/nusax_factorial.py --rehearse                      # invented languages, a few steps

**The factors**, each as the papers have it and without, for LT-SFT and Rand-SFT (16 cells):

- source: the task adapter is trained over the frozen adapter of the source language, or on the bare encoder;
- norms: frozen, or tuned like all else, in language and task adapters;
- L1: 0.1 in the language adapters, or none.

In each cell the task adapter, trained on Indonesian rows, is tested with the target language's own adapter. `--model`
is best an encoder that was trained as a masked language model (`pos_transfer.py` leaves one beside its results).
All cells of a method share rates and steps; LT-SFT's dense phases are a part of its sparse ones, by `--dense-share`.

**What is expected, written before it ran.** A factor's effect is the mean over the four pairs of cells that differ in
it alone, as the papers have it less without. The papers do all three for better transfer, so an effect is confirmed if
its 95 % interval over test rows lies above 0, and refuted if it lies below; else it is open. That LT-SFT is above
Rand-SFT, in the mean over all eight cells, is the fourth.

Results are stored as they come, a line of `--output` each, and adapters in a folder of the same name: a call with the
same settings goes on where the last one stopped. One seed says nothing of seeds; more of them are `--seeds`.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from _bench_runs import DATA, MODELS, Results
from _console import wide_console
from _invented import tiny_bert
from _paired import paired
from _recipes import LANGUAGE, RECIPES
from _tasks import labels_of
from _training import TASK, Schedule, use
from mixed_data import TASK as SENTIMENT
from mixed_data import invented
from mixed_sources import nusax
from pos_transfer import RATES, Shop, whole
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from peft_sparse import Source

FACTORS = ("source", "norms", "l1")
FIELDS = ("method", *FACTORS, "seed")
Cell = tuple[bool, bool, bool]  # whether each factor is as the papers have it
CELLS: list[Cell] = list(product((True, False), repeat=len(FACTORS)))


class FactorShop(Shop):
    """Trains adapters that tune norms, too, or leave them as they are."""

    tunes_norms = False

    def _config(self, *args: Any, **kwargs: Any) -> Any:
        return replace(super()._config(*args, **kwargs), target_norms=self.tunes_norms)


class Bench:
    """Trains what is not there yet, and tests it.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.output.with_suffix("") / f"{zlib.crc32(repr(settings_of(options)).encode()):08x}"
        if options.rehearse:
            self.mixture, world = invented(0)
            self.base = str(tiny_bert(self.folder / "tiny_bert", world, steps=options.steps))
        else:
            self.mixture, self.base = nusax(options.data, options.source, options.target), str(options.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.labels = labels_of(SENTIMENT, self.mixture.labelled, {self.mixture.target: self.mixture.test})

    def shop(self, method: str, seed: int, *, norms: bool, part: str) -> FactorShop:
        folder = self.folder / f"{method}_{seed}" / ("norms_frozen" if norms else "norms_tuned") / part
        shop = FactorShop(self.base, self.tokenizer, method, seed=seed, output=folder)
        shop.tunes_norms = not norms
        return shop

    def language(self, method: str, seed: int, code: str, *, norms: bool, l1: bool) -> Path:
        shop = self.shop(method, seed, norms=norms, part="l1" if l1 else "no_l1")
        folder = shop.output / f"language-{code}"
        if not whole(folder):
            rate, dense_rate, _, _ = RATES[method]
            schedule = self._schedule(self.options.language_steps, rate, dense_rate, density=LANGUAGE.density)
            shop.language(code, self.mixture.text[code], replace(schedule, l1=LANGUAGE.l1 if l1 else 0.0))
        return folder

    def task(self, method: str, seed: int, cell: Cell) -> Path:
        over, norms, l1 = cell
        part = "bare" if not over else "over_l1" if l1 else "over_no_l1"
        shop = self.shop(method, seed, norms=norms, part=part)
        if not whole(shop.output / TASK):
            _, _, rate, dense_rate = RATES[method]
            schedule = self._schedule(self.options.steps, rate, dense_rate, density=RECIPES["sentiment"].density)
            rows = SENTIMENT.encode(self.tokenizer, self.mixture.labelled, self.labels, self.options.length)
            source = self.mixture.source
            below = {source: self.language(method, seed, source, norms=norms, l1=l1)} if over else {}
            shop.task(SENTIMENT, {source: Source(rows, source)}, self.labels, below, schedule)
        return shop.output / TASK

    def _schedule(self, steps: int, rate: float, dense_rate: float | None, *, density: float) -> Schedule:
        dense_steps = max(1, round(self.options.dense_share * steps))
        return Schedule(steps, dense_steps, 16, rate, density, self.options.length, dense_rate=dense_rate)

    def run(self, method: str, cell: Cell, seed: int) -> dict[str, Any]:
        """Answers on the target's test rows, and their score, with its own language adapter and with none."""
        _, norms, l1 = cell
        target, longest = self.mixture.target, self.options.length
        language = self.language(method, seed, target, norms=norms, l1=l1)
        task = self.task(method, seed, cell)
        model = self.shop(method, seed, norms=norms, part="tested").composed(
            SENTIMENT, self.labels, task, {target: language}
        )
        found: dict[str, Any] = {}
        for name, below in (("", target), ("_alone", None)):
            use(model, below)
            answers = SENTIMENT.predict(model, self.tokenizer, self.mixture.test, self.labels, longest)
            found[f"answers{name}"] = answers
            found[f"score{name}"] = 100 * SENTIMENT.score(self.mixture.test, answers)
        return found


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """All that results depend on beside the fields."""
    names = ("source", "target", "steps", "language_steps", "dense_share", "length", "rehearse")
    rates = {method: list(RATES[method]) for method in sorted(RATES)}
    return {"model": str(options.model), "rates": rates, **{name: getattr(options, name) for name in names}}


def report(options: argparse.Namespace, results: Results, bench: Bench, console: Console) -> None:
    """The cells and the factors' effects, of what has run so far."""
    cells = Table("method", *FACTORS, "macro F1", "without language adapter", "seeds", title="as the papers: yes or no")
    for method, cell in product(options.methods, CELLS):
        found = [run for seed in options.seeds if (run := results.get(method, *cell, seed))]
        if found:
            means = [f"{sum(run[name] for run in found) / len(found):.1f}" for name in ("score", "score_alone")]
            cells.add_row(method, *("yes" if one else "no" for one in cell), *means, str(len(found)))
    console.print(cells)
    effects = Table("effect", "method", "mean [95 % over rows]", "", "pairs")
    for name, method, pairs in comparisons(options, results):
        if pairs:
            truth = [row["label"] for row in bench.mixture.test]
            one = paired(truth, *zip(*pairs, strict=True))
            shown = f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"
            effects.add_row(name, method, shown, one.verdict, str(len(pairs)))
    console.print(effects)


def comparisons(options: argparse.Namespace, results: Results) -> Iterator[tuple[str, str, list[tuple[Any, Any]]]]:
    """(effect, method, pairs of answers that differ in it alone)."""

    def pairs(keys: list[tuple[tuple, tuple]], other: str = "answers") -> list[tuple[Any, Any]]:
        found = [(results.get(*one), results.get(*two)) for one, two in keys]
        return [(one["answers"], two[other]) for one, two in found if one and two]

    for method in options.methods:
        keys = [(method, *cell, seed) for cell in CELLS for seed in options.seeds]
        for place, factor in enumerate(FACTORS, start=1):
            with_it = [key for key in keys if key[place]]
            yield factor, method, pairs([(key, (*key[:place], False, *key[place + 1 :])) for key in with_it])
        yield "language adapter", method, pairs([(key, key) for key in keys], "answers_alone")
    both = [(("lt_sft", *cell, seed), ("rand", *cell, seed)) for cell in CELLS for seed in options.seeds]
    yield "LT-SFT less Rand-SFT", "both", pairs(both)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODELS / "minilm"), help="an encoder: directory or hub id")
    parser.add_argument("--data", type=Path, default=DATA, help="folder, laid out as NusaX")
    parser.add_argument("--source", default="ind")
    parser.add_argument("--target", default="jav")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=128, help="of a task adapter, 16 rows each")
    parser.add_argument("--language-steps", type=int, default=300, help="of a language adapter, 16 pieces each")
    parser.add_argument("--dense-share", type=float, default=0.4, help="LT-SFT's dense phase as a share of these")
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true", help="invented languages and 3 steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/nusax_factorial.jsonl"))
    options = parser.parse_args(arguments)
    if options.rehearse:
        options.steps = options.language_steps = 3
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = wide_console()
    bench = Bench(options)
    results = Results(options.output, FIELDS, lambda _: settings_of(options))
    try:
        for seed, cell, method in product(options.seeds, CELLS, options.methods):
            if results.get(method, *cell, seed) is None:
                found = bench.run(method, cell, seed)
                results.add({**dict(zip(FIELDS, (method, *cell, seed), strict=True)), **found})
                told = " ".join(f"{name}={'yes' if one else 'no'}" for name, one in zip(FACTORS, cell, strict=True))
                scores = f"{found['score']:.1f}, without language adapter {found['score_alone']:.1f}"
                console.print(f"{method} {told} seed {seed}: {scores} ({time.strftime('%H:%M')})")
    finally:
        report(options, results, bench, console)


if __name__ == "__main__":
    main()
