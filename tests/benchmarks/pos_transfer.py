"""Part-of-speech tags carried from English into languages without labels: LT-SFT and Rand-SFT, Algorithm 1 of LT-SFT.

    python tests/benchmarks/pos_transfer.py --model PATH --data PATH     # hours on one core
    python tests/benchmarks/pos_transfer.py --language-steps 2000 --base-steps 2000 --steps 1000 --seeds 0 1 2
    python tests/benchmarks/pos_transfer.py --layers 3 --base-steps 1000 --language-steps 1000 --steps 200
    python tests/benchmarks/pos_transfer.py --tiny                       # invented languages, a few steps

**The data** are Universal Dependencies, `ud/{eng_ewt,mlt_mudt,fao_farpahc}/{train,dev,test}.conllu`, and raw English in
`text/eng_ewt.txt`. Maltese and Faroese are learnt from the sentences of their train and dev files as raw text, without
their tags; the last 64 sentences of dev are held out for the masked loss. Tags are tested on the test files.

**The encoder** is MiniLM, which comes without a head that predicts words: all its weights are first trained on English
by masked language modelling (`--base-steps`), and stay as they are from then on. Language adapters of English and of
both targets are then trained with norms frozen and an L1 penalty of 0.1 (density 0.043, as the thesis's); the task
adapter (density 0.08) is trained on the tags of English, over the frozen English adapter ("source") or on the encoder
alone ("bare"). Each is then tested with no language adapter, with English's, with the target's own, and with the other
target's. LT-SFT's dense phases are a part of its sparse ones, by `--dense-share`; everything is in float32, with linear
decay, one learning rate for each method and kind of training, and the last weights are taken.

**What is expected, written before it ran.** Standard errors are of a bootstrap over sentences, whose words are drawn
together.

- H1, a language adapter helps the task: over the source's adapter, the target's own adapter is above the source's by
  more than two standard errors in both languages. Refuted, for a method, if it is below or within two in either one.
- H2, it is the language that helps, not more training: the target's own adapter is above the other target's by more
  than two standard errors in both languages. Refuted if not.
- H3, the order of Algorithm 1 matters: a task adapter trained over the source's adapter, with the target's own, is
  above one trained on the bare encoder, with the target's own. Refuted if it is below or within two standard errors in
  either language.
- H4, selection matters: LT-SFT is above Rand-SFT, both with the target's own adapter over the source's. Refuted as H3.
  The thesis has Maltese 32.6 without and 80.6 with LT-SFT's (random 77.6), Faroese 72.9 and 87.9, on mBERT after 30,000
  updates and more: hundreds of updates on an English encoder of 22 million weights need not come near, and a refutation
  here says nothing of that length.
- H5, density (a second call with `--language-density 0.01 --than-density 0.043` and the first one's `--output`): a
  quarter of the weights know a language less, so the target's own adapter is below the denser one by more than two
  standard errors in both languages; and LT-SFT, which chooses what it keeps, loses less by it than Rand-SFT does.
  Refuted, each, if the sign is the other one in both languages; else open. Random weights may want a larger rate the
  fewer they are: `--language-rates rand=4e-3` gives them one, and the masked loss says which is best, for both methods.

The third call is the smallest that told something: under two hours of processor time (about 1,000 s for an LT-SFT
adapter of Maltese, with AVX2). With 300, 150 and 100 steps, half an hour, language adapters changed nothing.

One seed says nothing of seeds: more of them are `--seeds`. A finished part is a line of `--output`, and adapters lie in
a folder of the same name, so a call with the same settings goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from _bench_runs import DATA, MODELS, Results, write_whole
from _console import wide_console
from _data import read_file, read_text
from _invented import SOURCE, TARGET, World, tiny_bert
from _masked_training import MaskedTrainer, masked_loss
from _recipes import LANGUAGE, RECIPES
from _report import Difference, paired_bootstrap
from _tasks import TASKS, labels_of
from _training import TASK, Schedule, Workshop, use
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, set_seed

from peft_sparse import Source

MODEL = MODELS / "minilm"
TREEBANKS = {"eng": "eng_ewt", "mlt": "mlt_mudt", "fao": "fao_farpahc"}
POS = TASKS["pos"]
HELD_OUT = 64
# (language adapter's, dense phase's; task adapter's, dense phase's), from crosslingual_quality.py.
RATES = {"lt_sft": (5e-4, 2e-4, 5e-4, 2e-4), "rand": (1e-3, None, 2e-3, None)}
OVER, BARE = "source", "bare"
NONE, OWN, OTHER = "none", "own", "other"
FIELDS = ("kind", "method", "over", "language", "way", "seed")
Rows = list[dict]
Key = Callable[[str], tuple]  # of a language's result, but for the seed


@dataclass(frozen=True)
class Languages:
    """The source and the targets: raw text, held-out raw text, and rows with tags.

    Attributes:
        source: whose tags are trained on.
        targets: to carry them to.
        text, held_out: {language: lines}.
        train: rows of the source.
        test: {language: rows}.
    """

    source: str
    targets: list[str]
    text: dict[str, list[str]]
    held_out: dict[str, list[str]]
    train: Rows
    test: dict[str, Rows]


def read_languages(data: Path) -> Languages:
    source, *targets = TREEBANKS
    files = {
        code: {s: data / "ud" / f / f"{s}.conllu" for s in ("train", "dev", "test")} for code, f in TREEBANKS.items()
    }
    text = {source: read_text(str(data / "text"), "eng_ewt")}
    text |= {code: sentences(files[code]["train"]) + sentences(files[code]["dev"]) for code in targets}
    return Languages(
        source,
        targets,
        {code: lines[:-HELD_OUT] for code, lines in text.items()},
        {code: lines[-HELD_OUT:] for code, lines in text.items()},
        read_file(files[source]["train"]),
        # Long sentences together: less is padded.
        {code: sorted(read_file(f["test"]), key=lambda row: len(row["tokens"])) for code, f in files.items()},
    )


def sentences(path: Path) -> list[str]:
    """The raw text of a CoNLL-U file's sentences."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.partition("=")[2].strip() for line in lines if line.startswith("# text =")]


def invented() -> tuple[Languages, World]:
    world = World(0)
    text = {code: world.text(code, 60, seed=3) for code in (SOURCE, TARGET)}
    test = {code: world.rows("pos", code, 20, seed=2) for code in (SOURCE, TARGET)}
    held_out = {code: lines[-10:] for code, lines in text.items()}
    text = {code: lines[:-10] for code, lines in text.items()}
    return Languages(SOURCE, [TARGET], text, held_out, world.rows("pos", SOURCE, 40, seed=1), test), world


class Shop(Workshop):
    """Computes logits of masked tokens alone, on batches of like lengths."""

    language_trainer = MaskedTrainer
    arguments: ClassVar = {"train_sampling_strategy": "group_by_length", "disable_tqdm": True}

    def encoder(self, text: list[str], schedule: Schedule, folder: Path, *, layers: int | None) -> None:
        """The encoder, all of it trained as a masked language model; with `layers` its first so many."""
        kept = {} if layers is None else {"num_hidden_layers": layers}
        set_seed(self.seed)
        model = AutoModelForMaskedLM.from_pretrained(self.base, dtype=torch.float32, **kept)
        collator = DataCollatorForLanguageModeling(self.tokenizer)
        rows = self.rows(text, schedule.max_length)
        self._fit(model, rows, collator, schedule, trainer=self.language_trainer, rate=schedule.rate)

        def save(temporary: Path) -> None:
            model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)

        write_whole(folder, save)


class Bench:
    """Trains what is not there yet, and tests it.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.output.with_suffix("") / f"{zlib.crc32(repr(settings_of(options)).encode()):08x}"
        if options.tiny:
            self.languages, world = invented()
            start = str(tiny_bert(self.folder / "tiny_bert", world, steps=options.base_steps))
        else:
            self.languages, start = read_languages(options.data), str(options.model)
        self.tokenizer = AutoTokenizer.from_pretrained(start, add_prefix_space=True)
        self.labels = labels_of(POS, self.languages.train, self.languages.test)
        self.start = start

    @cached_property
    def base(self) -> str:
        folder = self.folder / "encoder"
        if not folder.exists():
            schedule = Schedule(self.options.base_steps, 0, 16, self.options.base_rate, 0.0, self.options.max_length)
            shop = Shop(self.start, self.tokenizer, "rand", seed=0, output=self.folder)
            shop.encoder(self.languages.text[self.languages.source], schedule, folder, layers=self.options.layers)
        return str(folder)

    def shop(self, method: str, seed: int, part: str) -> Shop:
        return Shop(self.base, self.tokenizer, method, seed=seed, output=self.folder / f"{method}_{seed}" / part)

    def language(self, method: str, seed: int, code: str) -> Path:
        shop, options = self.shop(method, seed, "languages"), self.options
        folder = shop.output / f"language-{code}"
        if not whole(folder):
            steps = options.language_steps
            rate, dense_rate, _, _ = rates_of(options)[method]
            schedule = Schedule(
                steps, self._dense(steps), 16, rate, options.language_density, options.max_length, LANGUAGE.l1,
                dense_rate=dense_rate,
            )  # fmt: skip
            shop.language(code, self.languages.text[code], schedule)
        return folder

    def task(self, method: str, seed: int, over: str) -> Path:
        shop, options, source = self.shop(method, seed, over), self.options, self.languages.source
        if not whole(shop.output / TASK):
            _, _, rate, dense_rate = rates_of(options)[method]
            steps, longest = options.steps, RECIPES["pos"].max_length
            schedule = Schedule(
                steps, self._dense(steps), 16, rate, RECIPES["pos"].density, longest, dense_rate=dense_rate
            )
            rows = POS.encode(self.tokenizer, self.languages.train, self.labels, longest)
            below = {source: self.language(method, seed, source)} if over == OVER else {}
            shop.task(POS, {source: Source(rows, source)}, self.labels, below, schedule)
        return shop.output / TASK

    def _dense(self, steps: int) -> int:
        return max(1, round(self.options.dense_share * steps))

    def ways(self, code: str) -> dict[str, str | None]:
        """{name: the language whose adapter is active when one is tested}."""
        if code == self.languages.source:
            return {NONE: None, OWN: code}
        others = [other for other in self.languages.targets if other != code]
        return {NONE: None, OVER: self.languages.source, OWN: code, **({OTHER: others[0]} if others else {})}

    # ---- results -----------------------------------------------------------------------------------

    def masked(self, method: str, seed: int, code: str) -> dict:
        """A language adapter's masked loss on held-out text, beside that of the encoder."""
        adapter = self.language(method, seed, code)
        model = AutoModelForMaskedLM.from_pretrained(self.base, dtype=torch.float32)
        rows = self.shop(method, seed, "languages").rows(self.languages.held_out[code], self.options.max_length)
        before = masked_loss(model, rows, self.tokenizer)
        tuned = PeftModel.from_pretrained(model, adapter)
        return {"before": before, "after": masked_loss(tuned, rows, self.tokenizer)}

    def tested(self, method: str, seed: int, over: str, code: str) -> dict[str, dict]:
        """{way: how many words of each sentence are tagged rightly}."""
        ways = self.ways(code)
        adapters = {c: self.language(method, seed, c) for c in ways.values() if c is not None}
        task, rows = self.task(method, seed, over), self.languages.test[code]
        model = self.shop(method, seed, over).composed(POS, self.labels, task, adapters)
        found = {}
        for way, below in ways.items():
            use(model, below)
            answers = POS.predict(model, self.tokenizer, rows, self.labels, RECIPES["pos"].max_length)
            right = [sum(map(str.__eq__, own, row["upos"])) for own, row in zip(answers, rows, strict=True)]
            found[way] = {"right": right, "accuracy": 100 * accuracy(self.words(code), right)}
        return found

    def words(self, code: str) -> list[int]:
        return [len(row["tokens"]) for row in self.languages.test[code]]

    def majority(self, code: str) -> float:
        """Accuracy (per cent) of the source's most frequent tag, for every word."""
        tags = [tag for row in self.languages.train for tag in row["upos"]]
        most = max(set(tags), key=tags.count)
        own = [tag for row in self.languages.test[code] for tag in row["upos"]]
        return 100 * own.count(most) / len(own)


def whole(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").exists() and (folder / "adapter_config.json").exists()


def accuracy(words: list[int], right: list[int]) -> float:
    return sum(right) / sum(words)


def run(bench: Bench, results: Results, console: Console) -> None:
    """Seeds outermost, then methods: what is there after each part means something."""
    languages, options = bench.languages, bench.options
    codes = [languages.source, *languages.targets]

    def keep(key: tuple, found: dict, start: float) -> None:
        results.add({**dict(zip(FIELDS, key, strict=True)), **found, "seconds": round(time.process_time() - start, 1)})
        shown = {name: value for name, value in found.items() if name != "right"}
        console.print(*(str(part) for part in key if part is not None), shown, time.strftime("%H:%M"))

    for seed in options.seeds:
        for method in options.methods:
            for code in codes:
                key = ("language", method, None, code, None, seed)
                if results.get(*key) is None:
                    start = time.process_time()
                    keep(key, bench.masked(method, seed, code), start)
        for over in (OVER, BARE):
            for method in options.methods:
                for code in codes:
                    keys = {way: ("tags", method, over, code, way, seed) for way in bench.ways(code)}
                    if any(results.get(*key) is None for key in keys.values()):
                        start = time.process_time()
                        for way, found in bench.tested(method, seed, over, code).items():
                            keep(keys[way], found, start)


# ---- tables --------------------------------------------------------------------------------------------


def report(bench: Bench, results: Results, denser: Results) -> str:
    """Markdown: accuracies, and what the hypotheses ask for; `denser`, of another language density, is for H5."""
    parts = [accuracies(bench, results), losses(bench, results), hypotheses(bench, results, denser)]
    return "\n\n".join(filter(None, parts))


def runs_of(bench: Bench, results: Results, *key: Any) -> dict[int, dict]:
    return {seed: found for seed in bench.options.seeds if (found := results.get(*key, seed))}


def accuracies(bench: Bench, results: Results) -> str:
    columns = [(code, way) for code in bench.languages.test for way in bench.ways(code)]
    lines = [" | ".join(["method", "task trained on", *(f"{code}, {way}" for code, way in columns)])]
    lines.append(" | ".join(["majority tag", "", *(f"{bench.majority(code):.1f}" for code, _ in columns)]))
    for method in bench.options.methods:
        for over in (OVER, BARE):
            cells = []
            for code, way in columns:
                found = runs_of(bench, results, "tags", method, over, code, way)
                cells.append(f"{mean_of(found, 'accuracy'):.1f}" if found else "")
            lines.append(" | ".join([method, over, *cells]))
    return markdown(lines)


def losses(bench: Bench, results: Results) -> str:
    lines = ["method | " + " | ".join(bench.languages.test)]
    for method in bench.options.methods:
        cells = []
        for code in bench.languages.test:
            found = runs_of(bench, results, "language", method, None, code, None)
            cells.append(f"{mean_of(found, 'before'):.3f} -> {mean_of(found, 'after'):.3f}" if found else "")
        lines.append(" | ".join([method, *cells]))
    return markdown(lines)


def hypotheses(bench: Bench, results: Results, denser: Results) -> str:
    """Differences in points, with their standard errors; over seeds, means of both."""
    lines = ["hypothesis | method | " + " | ".join(bench.languages.targets)]

    def compare(name: str, method: str, one: Key, other: Key, of: Results = results) -> None:
        cells = []
        for code in bench.languages.targets:
            found, base = runs_of(bench, results, *one(code)), runs_of(bench, of, *other(code))
            both = [difference(bench.words(code), found[s], base[s]) for s in found if s in base]
            cells.append(f"{sum(d.mean for d in both) / len(both):+.1f} ({both[0].error:.1f})" if both else "")
        lines.append(" | ".join([name, method, *cells]))

    def tags(method: str, over: str, way: str) -> Key:
        return lambda code: ("tags", method, over, code, way)

    for method in bench.options.methods:
        own = tags(method, OVER, OWN)
        compare("H1: own - source's", method, own, tags(method, OVER, OVER))
        compare("own - none", method, own, tags(method, OVER, NONE))
        compare("H2: own - other's", method, own, tags(method, OVER, OTHER))
        compare("H3: over the source's - bare", method, own, tags(method, BARE, OWN))
        compare("bare: own - none", method, tags(method, BARE, OWN), tags(method, BARE, NONE))
        compare("H5: own - the denser's own", method, own, own, denser)
    if set(RATES) <= set(bench.options.methods):
        compare("H4: LT-SFT - Rand-SFT", "both", tags("lt_sft", OVER, OWN), tags("rand", OVER, OWN))
    return markdown(lines)


def difference(words: list[int], found: dict, base: dict) -> Difference:
    return paired_bootstrap(words, found["right"], base["right"], accuracy, resamples=1000)


def mean_of(runs: dict[int, dict], field: str) -> float:
    return sum(found[field] for found in runs.values()) / len(runs)


def markdown(lines: list[str]) -> str:
    rule = "|" + "---|" * (lines[0].count("|") + 1)
    return "\n".join([f"| {lines[0]} |", rule, *(f"| {line} |" for line in lines[1:])])


# ---- the command ---------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace) -> dict:
    """All that results depend on beside the fields."""
    names = (
        "layers",
        "steps",
        "language_steps",
        "base_steps",
        "base_rate",
        "dense_share",
        "language_density",
        "max_length",
        "tiny",
    )
    rates = rates_of(options)
    found = {"model": Path(options.model).name, "rates": rates, **{name: getattr(options, name) for name in names}}
    # As a line of the results gives it back.
    return {**found, "rates": {method: list(own) for method, own in rates.items()}}


def rates_of(options: argparse.Namespace) -> dict[str, tuple]:
    """`RATES`, with what the call changes."""
    return {**RATES, **{method: (rate, *RATES[method][1:]) for method, rate in options.language_rates}}


def method_and_rate(given: str) -> tuple[str, float]:
    method, _, rate = given.partition("=")
    if method not in RATES:
        raise argparse.ArgumentTypeError(f"takes METHOD=RATE with one of {', '.join(RATES)}, got {given!r}")
    return method, float(rate)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="an encoder: directory or hub id")
    parser.add_argument("--data", type=Path, default=DATA, help="folder, laid out as above")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base-steps", type=int, default=250, help="of the encoder, as a masked language model")
    parser.add_argument("--layers", type=int, help="of the model to keep, from the bottom [all]")
    parser.add_argument("--base-rate", type=float, default=3e-4)
    parser.add_argument("--language-steps", type=int, default=250, help="of a language adapter, 16 pieces each")
    parser.add_argument("--steps", type=int, default=200, help="of a task adapter, 16 sentences each")
    parser.add_argument("--dense-share", type=float, default=0.4, help="LT-SFT's dense phase as a share of these")
    parser.add_argument("--language-density", type=float, default=LANGUAGE.density)
    parser.add_argument(
        "--language-rates",
        type=method_and_rate,
        nargs="*",
        default=[],
        metavar="METHOD=RATE",
        help="of the sparse phase",
    )
    parser.add_argument("--than-density", type=float, help="of an earlier call with this --output, to compare with")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a piece of raw text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/pos_transfer.jsonl"))
    parser.add_argument("--tiny", action="store_true", help="invented languages and 3 steps, to see that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.base_steps = options.language_steps = options.steps = 3
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = wide_console()
    bench = Bench(options)
    settings = settings_of(options)
    results = Results(options.output, FIELDS, lambda _: settings)
    denser = Results(options.output, FIELDS, lambda _: {**settings, "language_density": options.than_density})
    try:
        run(bench, results, console)
    finally:
        table = report(bench, results, denser)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        console.print(table)


if __name__ == "__main__":
    main()
