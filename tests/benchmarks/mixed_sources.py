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

**What the thesis has** (its Table 6.3, sentiment, SFT, means over targets): zero-shot without language adapters 70.4,
with them 78.0; 100 shots 78.3 and 83.2, counted tenfold 83.8; 20 shots tenfold 82.4; machine translation 79.4 and 83.4.
**What would confirm it here**, written down before the first real run: the mean over seeds of a difference that is
above 0 there is above 0 here, and its 95 % interval over test rows leaves 0 out; **what would refute it**: an interval
below 0. All else is open. For the lexicon, which is no machine translation, and the gold rows there is nothing to
compare with; that gold rows are above all else would confirm that they are an upper bound.

Results are stored as they come, a line of `--output` each, and a call with the same settings goes on where the last one
stopped. The table has the mean of macro F1 over seeds, its standard deviation, and the difference to zero-shot with
the same language adapters or none: seeds are paired, and the bootstrap for the 95 % interval draws test rows, the same
ones for all seeds.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from statistics import mean

import transformers
from _bench_runs import DATA, MODELS, Results, spread
from _console import wide_console
from _invented import tiny_bert
from _paired import paired
from _tasks import labels_of
from _training import Schedule, Workshop, use
from mixed_data import TASK, Mixture, arms, invented, real
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from peft_sparse import Source

MODEL = MODELS / "minilm"
FIELDS = ("target", "arm", "language", "seed")
SHOTS = (20, 100)
WITH, WITHOUT = "with", "without"


def nusax(folder: Path, source: str, target: str) -> Mixture:
    """NusaX and its lexicon, which is from Indonesian, in a folder."""
    lexicon = {"file": str(folder / "nusax_lexicon" / f"{target}.jsonl"), "words": ("ind", "x")}
    return real(str(folder / "nusax_senti"), source, target, text=str(folder / "text"), **lexicon)


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
            self.mixture, world = invented(0)
            self.base = str(tiny_bert(self.folder / "tiny_bert", world, steps=options.steps))
        else:
            self.mixture, self.base = nusax(options.data, options.source, target), str(options.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.labels = labels_of(TASK, self.mixture.labelled, {target: self.mixture.test})
        self._adapters: dict[str, Path] = {}

    def arms(self, seed: int) -> dict:
        return arms(self.mixture, SHOTS, seed=seed)

    def adapters(self) -> dict[str, Path]:
        """Of both languages, trained once."""
        for code, text in self.mixture.text.items() if not self._adapters else ():
            steps = self.options.language_steps
            schedule = Schedule(steps, steps, 16, self.options.language_rate, 0.05, self.options.length, 0.1)
            shop = Workshop(self.base, self.tokenizer, "lt_sft", seed=self.options.seeds[0], output=self.folder)
            folder = self.folder / f"language-{code}"
            self._adapters[code] = folder if folder.is_dir() else shop.language(code, text, schedule)
        return self._adapters

    def run(self, arm: str, language: str, seed: int) -> dict:
        """Answers on the target's test rows, and their score."""
        options, task = self.options, TASK
        schedule = Schedule(
            options.steps, options.dense_steps, 16, options.rate, 0.08, options.length, dense_rate=options.dense_rate
        )
        sources = {
            name: Source(
                task.encode(self.tokenizer, one.examples, self.labels, options.length),
                one.language,
                one.upsampling,
                one.origin,
            )
            for name, one in self.arms(seed)[arm].items()
        }
        below = self.adapters() if language == WITH else {}
        shop = Workshop(self.base, self.tokenizer, "lt_sft", seed=seed, output=self.folder / f"run-{seed}")
        adapter = shop.task(task, sources, self.labels, below, schedule)
        composed = shop.composed(task, self.labels, adapter, below)
        use(composed, self.mixture.target if below else None)
        answers = task.predict(composed, self.tokenizer, self.mixture.test, self.labels, options.length)
        return {"answers": answers, "score": 100 * task.score(self.mixture.test, answers)}


def settings_of(options: argparse.Namespace) -> dict:
    """All that results depend on beside the fields."""
    names = (
        "source", "steps", "dense_steps", "language_steps", "rate", "dense_rate", "language_rate", "length", "rehearse",
    )  # fmt: skip
    return {"model": Path(options.model).name, **{name: getattr(options, name) for name in names}}


def report(options: argparse.Namespace, results: Results, benches: dict[str, Bench], console: Console) -> None:
    """A table for each target language, of what has run so far."""
    for target, bench in benches.items():
        table = Table(
            "rows", "language adapters", "macro F1", "sd", "seeds", "above zero-shot [95 %]", "by seed", title=target
        )
        for arm in bench.arms(0):
            for language in (WITH, WITHOUT):
                found = {s: run for s in options.seeds if (run := results.get(target, arm, language, s))}
                base = {s: run for s in options.seeds if (run := results.get(target, "zero-shot", language, s))}
                if not found:
                    continue
                scores = [run["score"] for run in found.values()]
                cells = [f"{mean(scores):.1f}", spread(scores, 1), str(len(scores)), *compared(bench, found, base)]
                table.add_row(arm, language, *cells)
        console.print(table)


def compared(bench: Bench, found: dict[int, dict], base: dict[int, dict]) -> tuple[str, str]:
    """The mean difference over the seeds that both have, with its interval over test rows, and that of each seed."""
    shared = [seed for seed in found if seed in base]
    if not shared:
        return "-", "-"
    answers = [[runs[seed]["answers"] for seed in shared] for runs in (found, base)]
    difference = paired([row["label"] for row in bench.mixture.test], *answers)
    interval = f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
    return interval, ", ".join(f"{one:+.1f}" for one in difference.by_seed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="an encoder: directory or hub id")
    parser.add_argument("--data", type=Path, default=DATA, help="folder, laid out as NusaX")
    parser.add_argument("--source", default="ind")
    parser.add_argument("--targets", nargs="+", default=["ace", "min", "jav"])
    parser.add_argument("--arms", nargs="+", help="[all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=128, help="of the sparse phase of a task adapter")
    parser.add_argument("--dense-steps", type=int, default=64, help="of its dense phase")
    parser.add_argument("--language-steps", type=int, default=200, help="the same of a language adapter")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--dense-rate", type=float, default=2e-4)
    parser.add_argument("--language-rate", type=float, default=2e-4)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--no-language", dest="language", action="store_false", help="without language adapters alone")
    parser.add_argument("--rehearse", action="store_true", help="invented languages and 3 steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/mixed_sources.jsonl"))
    options = parser.parse_args()
    if options.rehearse:
        options.steps = options.dense_steps = options.language_steps = 3
        options.targets, options.seeds = ["far"], options.seeds[:1]
        options.output = options.output.with_stem(f"{options.output.stem}_rehearsal")
    return options


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    console = wide_console()
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
