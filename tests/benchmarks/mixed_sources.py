"""What labelled, translated and few labelled rows are worth in a language without labels: chapter 6's arms on NusaX.

    python tests/benchmarks/mixed_sources.py --model PATH --data PATH
    python tests/benchmarks/mixed_sources.py --rehearse          # invented languages, a tiny BERT, a few steps

**The data** are those of `examples/cross_lingual/mixed_data.py`, whose arms these are: Indonesian rows alone
(zero-shot); with 20 or 100 rows of the target language, once and counted tenfold; with the rows translated word by word
by NusaX's lexicon; and with the same rows as people translated them (an upper bound for translation). Each arm runs
with language adapters, of both languages, and without.

Task adapters are LT-SFT; every arm has the same number of steps, so that arms with more data see each row less often.
What is drawn at random (few-shot rows, heads, orders) depends on the seed; language adapters are trained once, with the
first seed. Raw text of NusaX's training rows is that of the language adapters where there is no other.

Results are stored as they come, a line of `--output` each, and a call with the same settings goes on where the last one
stopped. The table has the mean of macro F1 over seeds, its standard deviation, and the difference to zero-shot with
language adapters: seeds are paired, and its 95 % interval is a bootstrap over test rows of the first seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from pathlib import Path
from statistics import mean

import mixed_data
import transformers
from _bench_runs import Results, spread
from _invented import tiny_bert
from _report import paired_bootstrap
from _training import Schedule, Workshop, use
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from peft_sparse import Source

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = Path(os.environ.get("PEFT_SPARSE_MODELS", Path.home() / ".cache" / "peft-sparse-models")) / "minilm"
FIELDS = ("target", "arm", "language", "seed")
SHOTS = (20, 100)
WITH, WITHOUT = "with", "without"


class Bench:
    """Runs arms of one target language.

    Args:
        options: of the command line.
        target: the language.
    """

    def __init__(self, options: argparse.Namespace, target: str) -> None:
        self.options, self.target = options, target
        self.folder = options.output.with_suffix("") / f"{zlib.crc32(repr(settings_of(options)).encode()):08x}" / target
        if options.rehearse:
            self.mixture, world = mixed_data.invented(0)
            self.base = str(tiny_bert(self.folder / "tiny_bert", world, steps=options.steps))
        else:
            self.mixture, self.base = mixed_data.nusax(options.data, options.source, target), str(options.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.labels = mixed_data.TASK.labels(self.mixture.labelled)
        self._adapters: dict[str, Path] = {}

    def arms(self, seed: int) -> dict:
        return mixed_data.arms(self.mixture, SHOTS, seed=seed)

    def adapters(self) -> dict[str, Path]:
        """Of both languages, trained once."""
        for code, text in self.mixture.text.items() if not self._adapters else ():
            steps = self.options.language_steps
            schedule = Schedule(steps, steps, 16, self.options.language_rate, 0.05, 64, 0.1)
            shop = Workshop(self.base, self.tokenizer, "lt_sft", seed=self.options.seeds[0], output=self.folder)
            folder = self.folder / f"language-{code}"
            self._adapters[code] = folder if folder.is_dir() else shop.language(code, text, schedule)
        return self._adapters

    def run(self, arm: str, language: str, seed: int) -> dict:
        """Answers on the target's test rows, and their score."""
        steps = self.options.steps
        task = mixed_data.TASK
        schedule = Schedule(steps, steps, 16, self.options.rate, 0.08, 64)
        sources = {
            name: Source(
                task.encode(self.tokenizer, one.examples, self.labels, 64), one.language, one.upsampling, one.origin
            )
            for name, one in self.arms(seed)[arm].items()
        }
        below = self.adapters() if language == WITH else {}
        shop = Workshop(self.base, self.tokenizer, "lt_sft", seed=seed, output=self.folder / "run")
        adapter = shop.task(task, sources, self.labels, below, schedule)
        composed = shop.composed(task, self.labels, adapter, below)
        use(composed, self.mixture.target if below else None)
        answers = task.predict(composed, self.tokenizer, self.mixture.test, self.labels, 64)
        return {"answers": answers, "score": 100 * task.score(self.mixture.test, answers)}


def settings_of(options: argparse.Namespace) -> dict:
    """All that results depend on beside the fields."""
    names = ("source", "steps", "language_steps", "rate", "language_rate", "rehearse")
    return {"model": Path(options.model).name, **{name: getattr(options, name) for name in names}}


def report(options: argparse.Namespace, results: Results, benches: dict[str, Bench], console: Console) -> None:
    """A table for each target language, of what has run so far."""
    for target, bench in benches.items():
        table = Table("rows", "language adapters", "macro F1", "sd", "seeds", "above zero-shot [95 %]", title=target)
        for arm in bench.arms(0):
            for language in (WITH, WITHOUT):
                found = {s: run for s in options.seeds if (run := results.get(target, arm, language, s))}
                base = {s: run for s in options.seeds if (run := results.get(target, "zero-shot", WITH, s))}
                if not found:
                    continue
                scores = [run["score"] for run in found.values()]
                cells = [f"{mean(scores):.1f}", spread(scores, 1), str(len(scores)), compared(bench, found, base)]
                table.add_row(arm, language, *cells)
        console.print(table)


def compared(bench: Bench, found: dict[int, dict], base: dict[int, dict]) -> str:
    """The mean difference over the seeds that both have, and the interval over test rows of the first of them."""
    shared = [seed for seed in found if seed in base]
    if not shared:
        return "-"
    difference = mean(found[seed]["score"] - base[seed]["score"] for seed in shared)
    one, other = found[shared[0]]["answers"], base[shared[0]]["answers"]
    interval = paired_bootstrap(bench.mixture.test, one, other, mixed_data.TASK.score, resamples=500)
    return f"{difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="an encoder: directory or hub id")
    parser.add_argument("--data", type=Path, default=DATA, help="folder, laid out as NusaX")
    parser.add_argument("--source", default="ind")
    parser.add_argument("--targets", nargs="+", default=["ace", "min", "jav"])
    parser.add_argument("--arms", nargs="+", help="[all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=128, help="of each phase of a task adapter")
    parser.add_argument("--language-steps", type=int, default=200, help="the same of a language adapter")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--language-rate", type=float, default=2e-4)
    parser.add_argument("--no-language", dest="language", action="store_false", help="without language adapters alone")
    parser.add_argument("--rehearse", action="store_true", help="invented languages and 3 steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/mixed_sources.jsonl"))
    options = parser.parse_args()
    if options.rehearse:
        options.steps = options.language_steps = 3
        options.targets, options.seeds = ["far"], options.seeds[:1]
        options.output = options.output.with_stem(f"{options.output.stem}_rehearsal")
    return options


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = Results(options.output, FIELDS, lambda _: settings_of(options))
    benches = {target: Bench(options, target) for target in options.targets}
    try:
        # Seeds outermost: after the first of them the table means something.
        for seed in options.seeds:
            for target, bench in benches.items():
                for arm in options.arms or bench.arms(seed):
                    for language in (WITH, WITHOUT) if options.language else (WITHOUT,):
                        if results.get(target, arm, language, seed) is None:
                            found = bench.run(arm, language, seed)
                            results.add({**dict(zip(FIELDS, (target, arm, language, seed), strict=True)), **found})
                            told = f"{target} {arm}, {language} language adapters, seed {seed}"
                            console.print(f"{told}: {found['score']:.1f}")
    finally:
        report(options, results, benches, console)


if __name__ == "__main__":
    main()
