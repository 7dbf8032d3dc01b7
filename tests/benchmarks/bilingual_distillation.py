"""What distillation for two languages costs and brings (BiStil, thesis chapter 5): NusaX, Indonesian to Javanese.

    python tests/benchmarks/bilingual_distillation.py --model PATH --data PATH
    python tests/benchmarks/bilingual_distillation.py --tiny      # invented languages, a tiny BERT, two steps

The vocabulary is reduced to what the raw text of both languages and the labelled rows use (test rows are not counted),
and teacher and students are of that model. The teacher is LT-SFT on it. Students have every second layer. All learn
the task by LT-SFT on the same Indonesian rows, with the same number of steps, batches and rates:

- teacher: all layers
- TF: phase 1 (attention maps and hidden states, on text of both languages), then phase 2 by teacher forcing
- ST: phase 1, then phase 2 on labels alone ("self-taught")
- TF, no phase 1; ST, no phase 1: layers copied from the teacher, and phase 2
- layers and labels: as TF, but by labels and the teacher's layers, without its predictions
- TF and labels: as TF, with the labels beside all that. Ours, not the thesis's
- random start: as TF, phase 1 included, from random weights. The thesis's Scratch learns by masked language modelling
  instead, for 200,000 steps

What the seed draws: heads, orders, masks, and random weights; the vocabulary is reduced once. With `--language-steps 0`
the teacher has no language adapters, as the thesis's mDeBERTa and MiniLMv2 have none.

**What would confirm the thesis's order** (its Tables 5.3 to 5.6; teacher > TF > ST > no phase 1 > random), written down
before the first run: in macro F1 on Javanese, the mean over seeds of each of the differences below is above 0 and its
95 % interval over test rows leaves 0 out. **What would refute it**: an interval that lies below 0. All else is open.
`PAIRS` has the differences and what the thesis has for them. The goal beyond: TF, or TF and labels, less than the
thesis's 0.4 to 1.3 points below the teacher.

The bootstrap draws test rows, the same ones for both arms and all seeds, and takes the mean difference over seeds: it
speaks of these seeds' models; the standard deviation over seeds stands beside it. Results are stored as they come, a
line of `--output` each, models beside them, and a call with the same settings goes on where the last one was stopped.
Several calls may share the work, by `--arms` and `--seeds`; `--report` then prints the tables of all.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import torch
import transformers
from _bench_runs import DATA, MODELS, Results, write_whole
from _bilingual_report import report
from _console import wide_console
from _invented import SOURCE, TARGET, World, tiny_bert
from _tasks import TASKS, numbered
from _training import Schedule, Workshop, use
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
    set_seed,
)

from peft_sparse import (
    DistillationTrainer,
    MultiSourceCollator,
    MultiSourceDataset,
    Source,
    SparseTrainer,
    Teacher,
    distilled_trainer,
    make_student,
    reduce_vocabulary,
)
from peft_sparse.distillation import DistillationLoss

MODEL = MODELS / "minilm"
FIELDS = ("arm", "seed")
TASK = TASKS["sentiment"]
DENSITY = 0.08
TIME = "time"


@dataclass(frozen=True)
class Arm:
    """A student: how it begins, whether there is a phase 1, and what phase 2 goes by."""

    loss: str | DistillationLoss
    general: bool = True
    start: str = "copied"


TEACHER = "teacher"
ARMS = {
    TEACHER: None,
    "TF": Arm("teacher_forcing"),
    "ST": Arm("self_taught"),
    "TF, no phase 1": Arm("teacher_forcing", general=False),
    "ST, no phase 1": Arm("self_taught", general=False),
    "TF and labels": Arm(DistillationLoss(prediction=1.0, labels=1.0)),
    "layers and labels": Arm(DistillationLoss(labels=1.0)),
    "random start": Arm("teacher_forcing", start="random"),
}
# (which, less which, what the thesis has for it at half of the layers)
PAIRS = (
    (TEACHER, "TF", "0.4 to 1.3 (LAS, F1, accuracy)"),
    ("TF", "ST", "0.9 LAS, 1.5 F1"),
    ("TF", "TF, no phase 1", "not given"),
    ("ST", "ST, no phase 1", "not given"),
    ("ST, no phase 1", "random start", "25 LAS from ST to Scratch"),
    ("TF", "layers and labels", "not given"),
    (TEACHER, "TF and labels", "not given; the goal is below 0.4"),
)


@dataclass(frozen=True)
class Data:
    """Two languages.

    Attributes:
        source, target: their codes; the source has the labels.
        text: {language: sentences}.
        train: labelled rows of the source.
        tests: {language: rows}.
    """

    source: str
    target: str
    text: dict[str, list[str]]
    train: list[dict]
    tests: dict[str, list[dict]]

    @property
    def labels(self) -> list[str]:
        return TASK.labels(self.train)


def read_data(folder: Path, source: str, target: str) -> Data:
    """NusaX, and the raw text of `text/` with its own training rows."""

    def rows(language: str, split: str) -> list[dict]:
        lines = (folder / "nusax_senti" / language / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def text(language: str) -> list[str]:
        names = (f"{language}.txt", f"{language}_wiki.txt", f"nusax_train_{language}.txt")
        found = [path for name in names if (path := folder / "text" / name).is_file()]
        if not found:
            raise SystemExit(f"no raw text of {language!r} in {folder / 'text'}")
        return [line for path in found for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    languages = (source, target)
    tests = {language: rows(language, "test") for language in languages}
    return Data(source, target, {one: text(one) for one in languages}, rows(source, "train"), tests)


def invented() -> Data:
    world = World(0)
    languages = (SOURCE, TARGET)
    return Data(
        SOURCE,
        TARGET,
        {one: world.text(one, 200, seed=3) for one in languages},
        world.rows("sentiment", SOURCE, 64, seed=1),
        {one: world.rows("sentiment", one, 40, seed=2) for one in languages},
    )


class Bench:
    """Makes teachers and students, each once, and tests them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.output.with_suffix("") / f"{zlib.crc32(repr(settings_of(options)).encode()):08x}"
        self.data = invented() if options.tiny else read_data(options.data, options.source, options.target)
        length = options.length
        self.of_task = Schedule(
            options.steps,
            options.dense_steps,
            options.batch_size,
            options.rate,
            DENSITY,
            length,
            dense_rate=options.dense_rate,
        )
        self.of_language = Schedule(
            options.language_steps, options.language_steps, options.batch_size, options.rate, DENSITY, length, 0.1
        )

    # ---- what all seeds share ----------------------------------------------------------------------

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        folder = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        # Arms and seeds may run side by side, and share what they begin with.
        with open(self.folder / f".{name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                write_whole(folder, make)
        return folder

    @cached_property
    def whole(self) -> str:
        if self.options.tiny:
            return str(tiny_bert(self.folder / "tiny_bert", World(0), steps=self.options.steps))
        return str(self.options.model)

    @cached_property
    def base(self) -> str:
        """The encoder with a reduced vocabulary."""
        model, tokenizer = AutoModel.from_pretrained(self.whole), AutoTokenizer.from_pretrained(self.whole)
        labelled = {self.data.source: [row["text"] for row in self.data.train]}
        texts = {code: [*own, *labelled.get(code, [])] for code, own in self.data.text.items()}

        def make(folder: Path) -> None:
            reduce_vocabulary(model, tokenizer, texts=texts).save_pretrained(folder)

        return str(self._once("base", make))

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def languages(self) -> dict[str, Path]:
        """Adapters of both, on the reduced model; none with --language-steps 0."""
        shop = Workshop(
            self.base, self.tokenizer, "lt_sft", seed=self.options.seeds[0], output=self.folder / f"run-{os.getpid()}"
        )
        return {
            code: self._once(
                f"language-{code}",
                lambda folder, c=code, t=text: os.rename(shop.language(c, t, self.of_language), folder),
            )
            for code, text in self.data.text.items()
            if self.options.language_steps
        }

    # ---- one seed ----------------------------------------------------------------------------------

    def general(self, start: str, seed: int) -> str:
        """A student after phase 1: an encoder of its own, without adapters."""

        def make(folder: Path) -> None:
            set_seed(seed)
            # With a head, for language adapters name layers as models with heads have them.
            whole = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=2)
            student = make_student(whole, stride=2, start=start)
            self._distil(student, Teacher(whole, languages=self.languages or None), seed)
            student.base_model.save_pretrained(folder)

        return str(self._once(f"general-{start}-{seed}", make))

    def _distil(self, student, teacher: Teacher, seed: int) -> None:
        blocks = {code: self._blocks(text) for code, text in self.data.text.items()}
        steps = self.options.general_steps
        batches = MultiSourceDataset(
            blocks, num_batches=steps, batch_size=self.options.batch_size, exponent=0.0, seed=seed
        )
        args = TrainingArguments(
            output_dir=str(self.folder / f"run-{os.getpid()}"), max_steps=steps, per_device_train_batch_size=1,
            learning_rate=self.options.general_rate, weight_decay=0.0, logging_steps=max(1, steps // 4),
            save_strategy="no", report_to="none", seed=seed, dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        collator = MultiSourceCollator(DataCollatorForLanguageModeling(self.tokenizer))
        DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=batches, data_collator=collator
        ).train()

    def _blocks(self, text: list[str]) -> list[dict]:
        cut = self.tokenizer(text, truncation=True, max_length=self.options.length, return_overflowing_tokens=True)
        return [{"input_ids": ids} for ids in cut["input_ids"] if len(ids) >= 8]

    def start_of(self, arm: Arm, seed: int) -> str:
        """The encoder that phase 2 begins with."""
        if arm.general:
            return self.general(arm.start, seed)

        def make(folder: Path) -> None:
            set_seed(seed)
            make_student(AutoModel.from_pretrained(self.base), stride=2, start=arm.start).save_pretrained(folder)

        return str(self._once(f"shortened-{arm.start}-{seed}", make))

    def _task(self, base: str, name: str, seed: int, below: dict[str, Path], **how) -> Path:
        labels = self.data.labels
        rows = TASK.encode(self.tokenizer, self.data.train, labels, self.options.length)

        def make(folder: Path) -> None:
            shop = Workshop(base, self.tokenizer, "lt_sft", seed=seed, output=self.folder / f"run-{os.getpid()}")
            sources = {self.data.source: Source(rows, self.data.source)}
            os.rename(shop.task(TASK, sources, labels, below, self.of_task, **how), folder)

        return self._once(f"task-{name.replace(' ', '-').replace(',', '')}-{seed}", make)

    def adapter(self, name: str, seed: int) -> tuple[str, Path]:
        """(the encoder of an arm, the task's adapter on it)."""
        arm = ARMS[name]
        below = {code: self.languages[code] for code in (self.data.source,) if self.languages}
        if arm is None:
            return self.base, self._task(self.base, name, seed, below)
        base = self.start_of(arm, seed)
        if arm.loss == "self_taught":
            return base, self._task(base, name, seed, {})
        labels = self.data.labels
        whole = AutoModelForSequenceClassification.from_pretrained(
            self.base, num_labels=len(labels), **numbered(labels)
        )
        teacher = Teacher(whole, languages=below or None, task=self.adapter(TEACHER, seed)[1])
        trainer = partial(distilled_trainer(SparseTrainer), teacher=teacher, loss=arm.loss)
        return base, self._task(base, name, seed, {}, trainer=trainer)

    def composed(self, name: str, seed: int):
        base, adapter = self.adapter(name, seed)
        below = self.languages if name == TEACHER else {}
        shop = Workshop(base, self.tokenizer, "lt_sft", seed=seed, output=self.folder / f"run-{os.getpid()}")
        return shop.composed(TASK, self.data.labels, adapter, below), below, adapter

    def run(self, name: str, seed: int) -> dict:
        """Answers on the test rows of both languages, their scores, and the model's size."""
        model, below, adapter = self.composed(name, seed)
        answers, scores = {}, {}
        for code, rows in self.data.tests.items():
            use(model, code if below else None)
            answers[code] = TASK.predict(model, self.tokenizer, rows, self.data.labels, self.options.length)
            scores[code] = 100 * TASK.score(rows, answers[code])
        folder = Path(self.adapter(name, seed)[0])
        return {
            "answers": answers,
            "scores": scores,
            "parameters": sum(p.numel() for p in AutoModel.from_pretrained(folder).parameters()),
            "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
            "adapter_megabytes": sum(f.stat().st_size for f in adapter.iterdir()) / 1e6,
        }

    def time(self, seed: int, *, rows: int = 40) -> dict:
        """Milliseconds of processor time an example, one at a time on one thread: teacher and TF in turns, merged."""
        threads = torch.get_num_threads()
        models = {}
        for name in (TEACHER, "TF"):
            model, below, _ = self.composed(name, seed)
            use(model, self.data.target if below else None)
            models[name] = model.merge_and_unload().eval()
        batches = [self.tokenizer(row["text"], return_tensors="pt") for row in self.data.tests[self.data.target][:rows]]
        spent: dict[str, list[float]] = {name: [] for name in models}
        torch.set_num_threads(1)
        with torch.no_grad():
            for model in models.values():
                model(**batches[0])
            for batch in batches:
                for name, model in models.items():
                    start = time.process_time()
                    model(**batch)
                    spent[name].append(1000 * (time.process_time() - start))
        torch.set_num_threads(threads)
        ratios = [a / b for a, b in zip(spent[TEACHER], spent["TF"], strict=True)]
        return {"milliseconds": {name: median(own) for name, own in spent.items()}, "ratio": median(ratios)}

    def vocabulary(self) -> dict:
        """How many tokens are left, and the share of test rows that are cut as before."""
        whole = AutoTokenizer.from_pretrained(self.whole)
        cut = {}
        for code, rows in self.data.tests.items():
            same = [whole.tokenize(row["text"]) == self.tokenizer.tokenize(row["text"]) for row in rows]
            cut[code] = sum(same) / len(same)
        sizes = [sum(p.numel() for p in AutoModel.from_pretrained(one).parameters()) for one in (self.whole, self.base)]
        return {"tokens": [len(whole), len(self.tokenizer)], "test rows cut alike": cut, "parameters": sizes}


def settings_of(options: argparse.Namespace) -> dict:
    """All that results depend on beside the fields."""
    names = (
        "source", "target", "general_steps", "general_rate", "dense_steps", "steps", "dense_rate", "rate",
        "language_steps", "batch_size", "length", "tiny",
    )  # fmt: skip
    return {"model": Path(options.model).name, **{name: getattr(options, name) for name in names}}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="an encoder: directory or hub id")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with NusaX and text/")
    parser.add_argument("--source", default="ind")
    parser.add_argument("--target", default="jav")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--general-steps", type=int, default=100, help="of phase 1")
    parser.add_argument("--general-rate", type=float, default=5e-4)
    parser.add_argument("--dense-steps", type=int, default=32, help="of LT-SFT's first phase")
    parser.add_argument("--steps", type=int, default=96, help="of its second")
    parser.add_argument("--dense-rate", type=float, default=2e-4)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--language-steps", type=int, default=0, help="of each phase of a language adapter")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens")
    parser.add_argument("--tiny", action="store_true", help="invented languages and two steps, to see that it runs")
    parser.add_argument("--report", action="store_true", help="only the tables, of what there is")
    parser.add_argument("--output", type=Path, default=Path("outputs/bilingual_distillation.jsonl"))
    options = parser.parse_args(arguments)
    if options.tiny:
        options.general_steps = options.dense_steps = options.steps = options.language_steps = 2
        options.model, options.source, options.target, options.seeds = "tiny", SOURCE, TARGET, options.seeds[:1]
        options.output = options.output.with_stem(f"{options.output.stem}_tiny")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    transformers.logging.set_verbosity_error()
    console = wide_console()
    results = Results(options.output, FIELDS, lambda _: settings_of(options))
    bench = Bench(options)
    try:
        # Seeds outermost: after the first of them the table means something.
        for seed in options.seeds if not options.report else ():
            for name in options.arms:
                if results.get(name, seed) is None:
                    found = bench.run(name, seed)
                    results.add({"arm": name, "seed": seed, **found})
                    told = ", ".join(f"{code} {score:.1f}" for code, score in found["scores"].items())
                    console.print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: {told}")
            if results.get(TIME, seed) is None and all(results.get(name, seed) for name in (TEACHER, "TF")):
                results.add({"arm": TIME, "seed": seed, **bench.time(seed), "vocabulary": bench.vocabulary()})
    finally:
        report(results, list(ARMS), PAIRS, bench.data, options.seeds, console)


if __name__ == "__main__":
    main()
