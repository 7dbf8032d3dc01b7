"""Carry a task into a language without labels: language adapters from raw text plus a task adapter from labelled rows.

    python examples/language_and_task.py

All are LT-SFT: a dense phase finds the weights that matter, a sparse phase trains those from the pretrained model. As
in the paper (Algorithm 1) the task adapter is trained with the source language's adapter active, and at the end the
target language's delta and the task's are simply added up. Norms stay frozen, and language adapters have an L1 penalty
of 0.1. Without arguments two invented languages and a tiny BERT stand in for real ones.

    python examples/language_and_task.py --data DIR --model MODEL --source ind --target jav --density 0.08

takes real ones: DIR/text/<language>.txt of both languages, a sentence a line, and DIR/<language>/{train,test}.jsonl (or
in one folder of DIR) with the fields "text" and "label". Other places are patterns, as in
`--data 'rows/{language}-{split}.csv' --text 'raw/{language}.parquet'`, or Hub ids whose configurations are the
languages; `--text-column` and `--label-column` say what other data call the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from _readers import run
from _worlds import World, accuracy, encode, invented_world, read_world, tiny_bert
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_sparse import LotteryTicketConfig, SparseTrainer

console = Console()


@dataclass(frozen=True)
class Schedule:
    """Length, batch and peak learning rates of the two phases of LT-SFT."""

    steps: int
    batch_size: int
    dense: float
    sparse: float


def fit(model, rows: list[dict], collator, schedule: Schedule, output: Path, *, trainer_class=SparseTrainer) -> None:
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.sparse,
        warmup_steps=schedule.steps // 10,
        logging_steps=max(1, schedule.steps // 2),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    dense = {"dense_args": {"learning_rate": schedule.dense}} if trainer_class is SparseTrainer else {}
    trainer_class(model=model, args=args, train_dataset=rows, data_collator=collator, **dense).train()


def language_adapter(base: str | Path, tokenizer, text: list[str], config, schedule: Schedule, output: Path) -> None:
    """Masked-word prediction on raw text. The head that predicts words stays behind: it is in no file."""
    model, loading = AutoModelForMaskedLM.from_pretrained(base, output_loading_info=True)
    rows = [{"input_ids": ids} for ids in tokenizer(text, truncation=True, max_length=64)["input_ids"]]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    if loading["missing_keys"]:
        console.print("the model comes without a head that predicts words: fitting one first, all else frozen")
        model.base_model.requires_grad_(False)
        fit(model, rows, collator, schedule, output, trainer_class=Trainer)
    tuned = get_peft_model(model, config)
    fit(tuned, rows, collator, schedule, output)
    tuned.save_pretrained(output)


def task_adapter(
    base: str | Path, tokenizer, world: World, language: Path, density: float, schedule: Schedule, output: Path
) -> None:
    """Classification in the source language, whose adapter is active below the task's, and frozen.

    What the checkpoint lacks, the head, is trained densely and saved too.
    """
    model, loading = AutoModelForSequenceClassification.from_pretrained(base, **world.head, output_loading_info=True)
    head = sorted({name.rpartition(".")[0] for name in loading["missing_keys"]})
    tuned = PeftModel.from_pretrained(model, language, adapter_name="language")
    config = LotteryTicketConfig(density=density, target_modules="all", target_norms=False, modules_to_save=head)
    tuned.add_adapter("task", config)
    tuned.base_model.set_adapter(["language", "task"])
    tuned.set_requires_grad("language", requires_grad=False)
    fit(tuned, encode(tokenizer, world.train), DataCollatorWithPadding(tokenizer), schedule, output)
    tuned.save_pretrained(output, selected_adapters=["task"])  # in the folder "task"


def main(
    data: Annotated[
        str, typer.Option(help="Labelled rows: a folder, pattern or Hub id. \\[default: invented languages]")
    ] = "",
    text: Annotated[str, typer.Option(help="Raw text: the same. \\[default: text/ in the folder --data]")] = "",
    text_column: Annotated[str, typer.Option(help="What the data call the text.")] = "",
    label_column: Annotated[str, typer.Option(help="What the data call the label.")] = "",
    model: Annotated[str, typer.Option(help="Encoder for real data: a directory or hub id.")] = "",
    source: Annotated[str, typer.Option(help="Language of the labelled rows, with --data.")] = "ind",
    target: Annotated[str, typer.Option(help="Language of the raw text and of the test, with --data.")] = "jav",
    density: Annotated[float, typer.Option(help="Share of the targeted weights in each adapter.")] = 0.3,
    language_steps: Annotated[int, typer.Option(min=1, help="Steps in each phase of the language adapter.")] = 600,
    task_steps: Annotated[int, typer.Option(min=1, help="Steps in each phase of the task adapter.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the order of the rows, the heads and the invented languages.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the adapters are saved.")] = Path("outputs/language_and_task"),
) -> None:
    """Train language adapters and a task adapter, add two up, and test neither, each and both in both languages."""
    set_seed(seed)
    if not data:
        base, world = tiny_bert(output / "tiny_bert", seed=seed), invented_world(seed)
        languages = Schedule(language_steps, 32, dense=1e-3, sparse=1e-3)
        tasks = Schedule(task_steps, 16, dense=1e-3, sparse=1e-3)
    elif model:
        columns = {field: name for field, name in (("text", text_column), ("label", label_column)) if name}
        base, world = model, read_world(data, source, target, text=text, columns=columns)
        languages = Schedule(language_steps, 16, dense=1e-4, sparse=5e-4)
        tasks = Schedule(task_steps, 16, dense=2e-4, sparse=5e-4)
    else:
        raise typer.BadParameter(
            "give an encoder for the languages in --data: a directory or hub id", param_hint="--model"
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LotteryTicketConfig(density=density, target_modules="all", target_norms=False, l1=0.1)
    for language, name in ((world.source, "source_language"), (world.target, "language")):
        language_adapter(base, tokenizer, world.text[language], config, languages, output / name)
    task_adapter(base, tokenizer, world, output / "source_language", density, tasks, output)

    fresh = AutoModelForSequenceClassification.from_pretrained(base, **world.head)
    composed = PeftModel.from_pretrained(fresh, output / "language", adapter_name="language")
    composed.load_adapter(output / "task", adapter_name="task")
    table = Table("pretrained weights", f"{world.target} (test)", f"{world.source} (train)", title="accuracy")
    for name, weights in {"alone": (0, 0), "+ language": (1, 0), "+ task": (0, 1), "+ language + task": (1, 1)}.items():
        # Each with the task's head, so that only the encoders differ.
        adapter = "sum_{}_{}".format(*weights)
        composed.add_weighted_adapter(["language", "task"], weights, adapter, head_from="task")
        composed.set_adapter(adapter)
        table.add_row(name, *(f"{accuracy(composed, tokenizer, rows):.3f}" for rows in (world.test, world.train)))
    console.print(table)
    # The sum is an adapter like any other: one file, and it merges into an ordinary model.
    composed.save_pretrained(output, selected_adapters=["sum_1_1"])
    merged = composed.merge_and_unload()
    merged.save_pretrained(output / "merged")
    console.print(f"the sum as an adapter: {output / 'sum_1_1'}; merged: {output / 'merged'}")


if __name__ == "__main__":
    run(main)
