"""MAD-G on real text: masked loss on held-out text of languages that its training saw, and of those that it did not.

    python tests/benchmarks/madg_quality.py --data DIR --typology FILE    # about two hours on one core
    python tests/benchmarks/madg_quality.py --steps 4000 --own-steps 1000
    python tests/benchmarks/madg_quality.py --quick                       # do all parts run?

**The data**: DIR/text/<language>.txt, raw text, a sentence or paragraph a line (also <language>_<anything>.txt and
nusax_train_<language>.txt), cut into blocks; a twentieth of a language, at most 128 blocks, is held out. FILE holds the
languages' typological vectors, as `load_typology` takes them.

**The encoder** comes first: all its weights are trained by masked language modelling on the base languages' text,
and stay frozen from then on. That gives an English encoder the head that predicts words, and stands in for the
pretraining of a multilingual one. Only then are compared, on the same masks:

- none: the encoder as it is;
- MAD-G, MAD-G-LS: trained on all seen languages (the base languages among them), a language a batch; the adapter
  generated for the language itself;
- MAD-G-en, MAD-G-LS-en: the adapter generated for the pivot, on every language;
- own: an adapter of the same shape, trained for `--own-steps` on that language's text alone, also where MAD-G has not
  seen it. MAD-G shows each seen language `--steps` / (number of languages) batches on average;
- mean of own: for a language that is not seen the mean of the seen ones' own adapters, weighted by typology;
- generated / new, 1,000 words: for such a language, MAD-G's generated adapter and a new one, fine-tuned alike on the
  first thousand words of its text.

Learning rates are one for each kind of training, with linear decay after warm-up over a tenth, no weight decay, and
bfloat16 autocast over float32 weights where that is fast. What is trained is stored in the folder of `--output`, and
its losses as a line of the file: a call with the same settings goes on where the last one stopped. The table lies
beside it as markdown, with a plot.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from _bench_runs import DATA, DEVICE, MODELS, Results, train, write_whole
from _console import wide_console
from _crosslingual_data import MASKED, read_text
from _madg_report import GENERATED, KINDS, MEAN, NEW, NONE, OWN, PARTS, report
from _masked_training import MaskedTrainer, masked_loss
from peft import PeftModel, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    set_seed,
)

from peft_sparse import (
    LanguageSwitch,
    MadGConfig,
    MultiSourceCollator,
    MultiSourceDataset,
    add_language_adapter,
    load_typology,
)

MODEL = MODELS / "minilm"
BASE = ["eng", "es", "ind"]
SEEN = [*BASE, "jav", "min", "bbc", "bug", "aym", "gn", "hch", "shp", "bzd"]
UNSEEN = ["sun", "ace", "quy", "cni"]
FILES = ("{}.txt", "{}_*.txt", "nusax_train_{}.txt")
WORDS = 1000
Rows = list[dict]


class Bench:
    """Trains the encoder and the adapters into a folder, each once, and measures them on held-out text.

    Args:
        options: of the command line.
        folder: what was trained with the same settings before is found there.
        results: where losses are kept.
        advance: called after each optimizer step.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, results: Results, advance: Callable[[], None]):
        self.options, self.folder, self.results, self.advance = options, folder, results, advance
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        codes = dict.fromkeys([*options.base, *options.seen, *options.unseen])
        how = {"length": options.max_length, "files": FILES}
        found = {code: read_text(options.data, code, self.tokenizer, **how) for code in codes}
        self.train = {code: rows for code, (rows, _) in found.items()}
        self.held_out = {code: rows[: options.held_out] for code, (_, rows) in found.items()}
        self.typology = load_typology(options.typology)
        self.typology.vectors(codes)

    # ---- training ------------------------------------------------------------------------------------

    def encoder(self) -> nn.Module:
        """The frozen encoder that all adapters stand on."""
        path = self.folder.parent / f"encoder_{digest(settings(self.options, of_encoder=True))}"
        if not path.exists():
            set_seed(self.options.seed)
            model = AutoModelForMaskedLM.from_pretrained(self.options.model, dtype=torch.float32)
            self._fit(model, self._some(self.options.base), self.options.base_steps, self.options.base_rate)
            write_whole(path, model.save_pretrained)
        return AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False).to(DEVICE)

    def config(self, layer_dim: int | None) -> MadGConfig:
        return MadGConfig(bottleneck_size=self.options.bottleneck, layer_dim=layer_dim, typology=self.typology)

    def mad_g(self, kind: str) -> PeftModel:
        path = self.folder / kind
        if not path.exists():
            set_seed(self.options.seed)
            model = get_peft_model(self.encoder(), self.config(KINDS[kind]))
            self._fit(model, self._some(self.options.seen), self.options.steps, self.options.rate)
            write_whole(path, model.save_pretrained)
        model = PeftModel.from_pretrained(self.encoder(), path)
        model.set_typology(self.typology)
        return model

    def own(self, language: str) -> PeftModel:
        """The adapter of one language's own. All start from the same values, so that a mean of them makes sense."""
        path = self.folder / "own" / language
        if not path.exists():
            set_seed(self.options.seed)
            model = get_peft_model(self.encoder(), self.config(None).bottleneck_config())
            self._fit(model, self._some([language]), self.options.own_steps, self.options.own_rate)
            write_whole(path, model.save_pretrained)
        return PeftModel.from_pretrained(self.encoder(), path)

    def mean_of_own(self, language: str) -> PeftModel:
        model = self.own(self.options.seen[0])
        for seen in self.options.seen:
            model.load_adapter(self.folder / "own" / seen, adapter_name=seen)
        adapters = {seen: seen for seen in self.options.seen}
        add_language_adapter(model, language, adapters, adapter_name="mean", typology=self.typology)
        model.set_adapter("mean")
        return model

    def after_few_words(self, name: str, language: str) -> PeftModel:
        if name == NEW:
            set_seed(self.options.seed)
            model = get_peft_model(self.encoder(), self.config(None).bottleneck_config())
        else:
            model = self.mad_g("MAD-G").generate_adapter(language, adapter_name="default").add_to(self.encoder())
        few, words = [], 0
        for row in self.train[language]:
            if words < WORDS:
                few.append(row)
                words += len(self.tokenizer.decode(row["input_ids"], skip_special_tokens=True).split())
        self._fit(model, {language: few}, self.options.few_steps, self.options.own_rate)
        return model

    def _some(self, languages: list[str]) -> dict[str, Rows]:
        return {language: self.train[language] for language in languages}

    def _fit(self, model: nn.Module, text: dict[str, Rows], steps: int, rate: float) -> None:
        model.train()
        mad_g = isinstance(model, PeftModel) and model.peft_type == "MAD_G"
        batches_ = MultiSourceDataset(text, num_batches=steps, batch_size=self.options.batch_size)
        collate = MultiSourceCollator(DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=MASKED))
        how = {"seed": self.options.seed, "batch_size": 1, "advance": self.advance, "trainer": MaskedTrainer}
        with LanguageSwitch(model, text, activate=None if mad_g else lambda *_: None):
            train(model, batches_, collate, steps=steps, rate=rate, **how)

    # ---- measuring -----------------------------------------------------------------------------------

    def loss(self, model: nn.Module, language: str) -> float:
        """Mean loss per masked token (nats) on a language's held-out text."""
        return masked_loss(model, self.held_out[language], self.tokenizer)

    def measure(self, name: str, languages: list[str], model_of: Callable[[str], nn.Module]) -> None:
        """Losses of one row of the table, those that are not there yet."""
        for language in languages:
            if self.results.get(name, language, self.options.seed) is None:
                start = time.process_time()
                loss = self.loss(model_of(language), language)
                run = {"name": name, "language": language, "seed": self.options.seed, "loss": loss}
                self.results.add({**run, "seconds": round(time.process_time() - start, 1)})

    def run(self) -> None:
        seen, unseen, parts = self.options.seen, self.options.unseen, self.options.parts
        encoder = self.encoder()
        if NONE in parts:
            self.measure(NONE, [*seen, *unseen], lambda _: encoder)
        for kind in (kind for kind in KINDS if kind in parts):
            model = self.mad_g(kind)

            def speaking(language: str, model: PeftModel = model) -> PeftModel:
                model.set_language(language)
                return model

            self.measure(kind, [*seen, *unseen], speaking)
            self.measure(f"{kind}-en", [*seen, *unseen], lambda _, speak=speaking: speak(self.options.pivot))
        for name in (name for name in (GENERATED, NEW) if name in parts):
            self.measure(name, unseen, lambda language, name=name: self.after_few_words(name, language))
        if OWN in parts:
            self.measure(OWN, [*seen, *unseen], self.own)
        if MEAN in parts:
            self.measure(MEAN, unseen, self.mean_of_own)


# ---- the command ---------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Masked loss of generated and trained language adapters.")
    parser.add_argument("--model", type=Path, default=MODEL, help="Encoder: a directory or hub id.")
    parser.add_argument("--data", type=Path, default=DATA, help="Folder that has a folder `text`.")
    parser.add_argument("--typology", type=Path, default=None, help="File of typological vectors; lang2vec's if none.")
    parser.add_argument("--base", nargs="+", default=BASE, help="Languages that the encoder is trained on first.")
    parser.add_argument("--seen", nargs="+", default=SEEN, help="Languages that MAD-G is trained on.")
    parser.add_argument("--unseen", nargs="+", default=UNSEEN, help="Languages that it is not trained on.")
    parser.add_argument("--pivot", default="eng", help="Language of the -en rows.")
    parser.add_argument("--base-steps", type=int, default=1500, help="Steps of training the encoder.")
    parser.add_argument("--steps", type=int, default=3000, help="Steps of MAD-G, all languages together.")
    parser.add_argument("--own-steps", type=int, default=400, help="Steps of each language's own adapter.")
    parser.add_argument("--few-steps", type=int, default=60, help="Steps on a thousand words.")
    parser.add_argument("--base-rate", type=float, default=5e-4, help="Learning rate of the encoder.")
    parser.add_argument("--rate", type=float, default=3e-4, help="Learning rate of MAD-G.")
    parser.add_argument("--own-rate", type=float, default=2e-3, help="Learning rate of single adapters.")
    parser.add_argument("--bottleneck", type=int, default=192, help="Width of the adapters.")
    parser.add_argument("--batch-size", type=int, default=16, help="Blocks in a batch.")
    parser.add_argument("--max-length", type=int, default=64, help="Tokens in a block.")
    parser.add_argument("--held-out", type=int, default=128, help="Blocks of each language to measure on, at most.")
    parser.add_argument("--seed", type=int, default=0, help="Of all that is drawn.")
    parser.add_argument("--threads", type=int, default=None, help="Threads of torch.")
    parser.add_argument("--output", type=Path, default=Path("madg_quality.jsonl"), help="File of results.")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="Rows of the table to fill.")
    parser.add_argument("--quick", action="store_true", help="A few steps and languages, to see that all parts run.")
    options = parser.parse_args()
    if options.quick:
        options.base, options.seen, options.unseen = ["eng"], ["eng", "jav"], ["sun"]
        options.base_steps = options.steps = options.own_steps = options.few_steps = 3
        options.held_out = 4
    if options.pivot not in options.seen:
        parser.error(f"--pivot must be one of --seen ({', '.join(options.seen)}), got {options.pivot}")
    return options


def settings(options: argparse.Namespace, *, of_encoder: bool = False) -> dict:
    """All that a result depends on; or that the encoder does, which serves many settings of the adapters."""
    names = ("model", "data", "base", "base_steps", "base_rate", "batch_size", "max_length", "seed")
    if not of_encoder:
        names += ("typology", "seen", "unseen", "pivot", "steps", "own_steps", "few_steps", "rate", "own_rate")
        names += ("bottleneck", "held_out")
    return {name: value if isinstance(value := getattr(options, name), list) else str(value) for name in names}


def digest(of: dict) -> str:
    return f"{zlib.crc32(json.dumps(of).encode()):08x}"


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = wide_console()
    known = settings(options)
    folder = options.output.with_suffix("") / digest(known)
    results = Results(options.output, ("name", "language", "seed"), lambda _: known)
    steps = options.base_steps + sum(kind in options.parts for kind in KINDS) * options.steps
    steps += len(options.unseen) * sum(name in options.parts for name in (GENERATED, NEW)) * options.few_steps
    steps += (len(options.seen) + len(options.unseen)) * (OWN in options.parts) * options.own_steps
    console.print(f"{steps:,} steps in all, less what is there already")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("steps", total=steps)
        bench = Bench(options, folder, results, lambda: progress.advance(bar))
        try:
            bench.run()
        except KeyboardInterrupt:
            console.print("stopped: the same call goes on from here")
    report(results, options, console)


if __name__ == "__main__":
    main()
