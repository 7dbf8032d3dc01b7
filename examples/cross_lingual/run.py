"""Zero-shot transfer of a task, as chapters 4 to 6 of the thesis train it, with any method.

    python examples/cross_lingual/run.py --task ner

Language adapters come from raw text, a task adapter from labelled rows of the source language with that language's
adapter active; the target language's adapter and the task adapter together do the task in the target language. Without
`--data` two invented languages and a tiny BERT stand in for real ones, in less than a minute.

    python examples/cross_lingual/run.py --task ner --model FacebookAI/xlm-roberta-base --source eng --target hau \\
        --data 'ner/{language}/{split}.jsonl' --text 'text/{language}.txt'

takes real ones, with the recipe of the thesis (`_recipes.py`). Rows are JSON, JSONL, CSV, TSV, Parquet or CoNLL-U, or a
data set of the Hub; their fields by task: pos tokens, upos; ner tokens, tags; dp tokens, heads, relations; nli premise,
hypothesis, label; sentiment text, label; qa question, context, answer, answer_start. It differs from the thesis in that
the last weights are taken, not the best on validation rows.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from _adapters import MethodName
from _data import apart, field_names, find_file, read_rows, read_text
from _invented import SOURCE, TARGET, World, tiny_bert
from _readers import run
from _recipes import LANGUAGE, RECIPES
from _report import paired_bootstrap, plot, save, table
from _tasks import TASKS, Task, labels_of
from _training import Schedule, Workshop, steps_of, use
from rich.console import Console
from transformers import AutoTokenizer

from peft_sparse import Source

console = Console()
TaskName = Enum("TaskName", {name: name for name in TASKS}, type=str)
# For the invented world: short runs at high rates, on a model of two layers.
INVENTED_LANGUAGE = Schedule(400, 400, 32, 1e-3, 0.3, 32, LANGUAGE.l1)
INVENTED_TASK = Schedule(120, 80, 16, 2e-3, 0.2, 32)


def schedules(task: str, sources: dict[str, Source], steps: int | None, language_steps: int | None):
    """Of a language adapter and of the task adapter, by the chapters' recipes."""
    recipe = RECIPES[task]
    size = {"batch_size": recipe.batch_size}
    long = steps or steps_of(sources, epochs=recipe.epochs, **size)
    short = steps or steps_of(sources, epochs=recipe.dense_epochs, **size)
    of_task = Schedule(long, short, recipe.batch_size, recipe.rate, recipe.density, recipe.max_length)
    count = language_steps or LANGUAGE.steps
    of_language = Schedule(
        count, count, LANGUAGE.batch_size, LANGUAGE.rate, LANGUAGE.density, LANGUAGE.max_length, LANGUAGE.l1
    )
    return of_language, of_task


def read_tables(task: Task, data: str, test_data: str, source: list[str], target: list[str], columns: dict[str, str]):
    """{language: rows} of the sources' training split and of the targets' test split."""
    for place, codes, option in ((data, source, "--data"), (test_data or data, target, "--test-data")):
        if Path(place).is_file() and (len(codes) > 1 or not test_data):
            raise typer.BadParameter(
                f"{place} is one file, so of one language and split: give a pattern with {{language}} and {{split}}, "
                "or --data for one source and --test-data for one target",
                param_hint=option,
            )
    files = [find_file(data, code, "train") for code in source]
    for code in target:
        for file in files:
            apart(file, find_file(test_data or data, code, "test"))
    how = {"columns": columns, "needed": task.fields, "cells": task.cells}
    train = {code: read_rows(data, code, "train", **how) for code in source}
    return train, {code: read_rows(test_data or data, code, "test", **how) for code in target}


def main(
    task: Annotated[TaskName, typer.Option(help="What to transfer.")],
    method: Annotated[MethodName, typer.Option(help="Of language and task adapters.")] = MethodName.lt_sft,
    data: Annotated[str, typer.Option(help="Rows: a pattern with {language} and {split}, a folder, or a Hub id.")] = "",
    test_data: Annotated[str, typer.Option(help="The same for the targets' rows. \\[default: --data]")] = "",
    text: Annotated[str, typer.Option(help="Raw text: a pattern with {language}, a folder, or a Hub id.")] = "",
    text_column: Annotated[str, typer.Option(help="What raw text that is no text file calls its text.")] = "text",
    model: Annotated[str, typer.Option(help="Encoder for real data: a folder or Hub id.")] = "",
    source: Annotated[list[str] | None, typer.Option(help="Language with labels; several give multi-source.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Language to transfer to; repeat it.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=NAME: what the data call a field; repeat it.")] = None,
    language: Annotated[bool, typer.Option(help="Train and use language adapters.")] = True,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each phase of the task adapter. \\[default: the recipe's]")
    ] = None,
    language_steps: Annotated[int | None, typer.Option(min=1, help="The same of language adapters.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate of the task adapter, LT-SFT's.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each file to use. \\[default: all]")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = 200,
    seed: Annotated[int, typer.Option(help="Of heads, orders and the invented languages.")] = 0,
    output: Annotated[Path, typer.Option(help="Where adapters, table and plot are saved.")] = Path(
        "outputs/cross_lingual"
    ),
) -> None:
    """Train language adapters and a task adapter, put them together, and test in the target languages."""
    chosen = TASKS[task.value]
    columns = field_names(column)
    if not data:
        if source or target or text or model:
            raise typer.BadParameter("--source, --target, --text and --model are for real data: give --data")
        world = World(seed)
        train = {SOURCE: world.rows(task.value, SOURCE, 400, seed=1)}
        tests = {TARGET: world.rows(task.value, TARGET, rows or 150, seed=2)}
        texts = {code: world.text(code, 800, seed=3) for code in (SOURCE, TARGET)}
        base = str(tiny_bert(output / "tiny_bert", world, seed=seed))
    else:
        if not (model and source and target):
            raise typer.BadParameter("--data needs an encoder (--model), --source and --target")
        if language and not text:
            raise typer.BadParameter("language adapters need raw text: --text, or --no-language")
        train, tests = read_tables(chosen, data, test_data, source, target, columns)
        train, tests = ({code: own[:rows] for code, own in part.items()} for part in (train, tests))
        codes = dict.fromkeys([*source, *target]) if language else ()
        texts = {code: read_text(text, code, column=text_column) for code in codes}
        base = model
    train, tests = ({code: [chosen.clean(row) for row in own] for code, own in part.items()} for part in (train, tests))
    labels = labels_of(chosen, [row for own in train.values() for row in own], tests)
    tokenizer = AutoTokenizer.from_pretrained(base, add_prefix_space=True)
    if data:
        plain = {code: Source(own, code) for code, own in train.items()}
        of_language, of_task = schedules(task.value, plain, steps, language_steps)
    else:
        of_language = _with(INVENTED_LANGUAGE, language_steps)
        of_task = _with(INVENTED_TASK, steps)
    of_task = Schedule(**{**vars(of_task), "rate": of_task.rate if rate is None else rate})
    encoded = {
        code: Source(chosen.encode(tokenizer, own, labels, of_task.max_length), code) for code, own in train.items()
    }

    workshop = Workshop(base, tokenizer, method.value, seed=seed, output=output)
    adapters = {code: workshop.language(code, own, of_language) for code, own in texts.items()} if language else {}
    below = {code: adapters[code] for code in train} if language else {}
    adapter = workshop.task(chosen, encoded, labels, below, of_task)

    composed = workshop.composed(chosen, labels, adapter, adapters)
    first = next(iter(train))
    ways = {"task alone": lambda code: None}
    if language:
        ways |= {f"{first} + task": lambda code: first, "target + task": lambda code: code}
    answers: dict[str, dict[str, list]] = {}
    for code, own in tests.items():
        answers[code] = {}
        for way, below_task in ways.items():
            use(composed, below_task(code))
            answers[code][way] = chosen.predict(composed, tokenizer, own, labels, of_task.max_length)
    _report(task.value, method.value, tests, answers, resamples=resamples, output=output)


def _report(task: str, method: str, tests: dict, answers: dict, *, resamples: int, output: Path) -> None:
    chosen = TASKS[task]
    scores = {
        code: {way: chosen.score(tests[code], found) for way, found in own.items()} for code, own in answers.items()
    }
    differences = {}
    for code, own in answers.items():
        if len(own) > 1:
            first, *_, last = own.values()
            differences[code] = paired_bootstrap(tests[code], last, first, chosen.score, resamples=resamples)
    title = f"{task}, {method}: {chosen.metric}"
    console.print(table(title, scores, differences, of="target + task above task alone"))
    plot(title, scores, output / "scores.png")
    save(
        output / "results.json",
        {"scores": scores, "differences": {code: vars(d) for code, d in differences.items()}, "answers": answers},
    )
    console.print(f"adapters, scores.png and results.json: {output}")


def _with(schedule: Schedule, steps: int | None) -> Schedule:
    return schedule if steps is None else Schedule(**{**vars(schedule), "steps": steps, "dense_steps": steps})


if __name__ == "__main__":
    run(main)
