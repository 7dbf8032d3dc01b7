"""Labelled, translated and few labelled rows in one task adapter (thesis, chapter 6), and what each of them is worth.

    python examples/cross_lingual/mixed_data.py

Every source is a `Source`: rows of one language and one origin, and how much they count. Each batch is of one source,
and its language's adapter is active below the task adapter, which all of them train. The arms:

- zero-shot: rows of the source language alone
- few-shot K: K rows of the target language beside them, once, and counted tenfold
- lexicon: the source's rows translated word by word, where a dictionary has the word; a stand-in for machine
  translation, which `translate_rows` does with a model
- gold: the source's rows in the target language as people translated them; an upper bound for translation

Without `--data` two invented languages stand in for real ones.

    python examples/cross_lingual/mixed_data.py --model MODEL --data DIR --source ind --target ace

takes real ones: rows as for `run.py`, of which those of both languages with one "id" are translations of each other;
`--lexicon`, a file with a column for each language or those that `--lexicon-columns` names (without it there is no such
arm); and raw text, by default in DIR/text.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from _adapters import MethodName
from _data import apart, as_written, field_names, find_file, read_rows, read_set, read_text, with_columns
from _invented import SOURCE, TARGET, World, tiny_bert
from _readers import run
from _recipes import LANGUAGE
from _report import paired_bootstrap, plot, save, table
from _tasks import TASKS, labels_of
from _training import Schedule, Workshop, use
from rich.console import Console
from transformers import AutoTokenizer

from peft_sparse import Source, few_shot

console = Console()
TASK = TASKS["sentiment"]
Rows = Sequence[dict]


@dataclass(frozen=True)
class Mixture:
    """What there is to mix.

    Attributes:
        source, target: the languages.
        labelled: rows of the source language.
        gold: rows of the target language, to draw few of them from; those of one place are translations of `labelled`.
        test: rows of the target language.
        lexicon: {word of the source: word of the target}; empty if there is none.
        text: {language: sentences}.
    """

    source: str
    target: str
    labelled: Rows
    gold: Rows
    test: Rows
    lexicon: Mapping[str, str]
    text: Mapping[str, Sequence[str]]


def word_by_word(rows: Rows, lexicon: Mapping[str, str]) -> list[dict]:
    """Rows whose words are replaced where the lexicon has them; other words stay."""
    return [{**row, "text": " ".join(lexicon.get(word.lower(), word) for word in row["text"].split())} for row in rows]


def arms(mixture: Mixture, shots: Sequence[int], *, seed: int, upsampling: float = 10) -> dict[str, dict[str, Source]]:
    """{arm: {name of a source: source}}; rows are not encoded yet."""
    own = {mixture.source: Source(mixture.labelled, mixture.source)}
    found = {"zero-shot": own}
    for k in shots:
        few = few_shot(mixture.gold, k, seed=seed, stratify="label")
        for factor in (1, upsampling):
            name = f"few-shot {k}" + (f" x{factor:g}" if factor != 1 else "")
            found[name] = {**own, f"{mixture.target} gold": Source(few, mixture.target, upsampling=factor)}
    if mixture.lexicon:
        translated = word_by_word(mixture.labelled, mixture.lexicon)
        found["lexicon"] = {**own, f"{mixture.target} lexicon": Source(translated, mixture.target, origin="lexicon")}
    found["gold"] = {**own, f"{mixture.target} gold": Source(mixture.gold, mixture.target)}
    return found


def invented(seed: int) -> tuple[Mixture, World]:
    world = World(seed)
    near, far = world.words[SOURCE], world.words[TARGET]
    # A dictionary that has two thirds of the words.
    lexicon = {near[meaning]: far[meaning] for number, meaning in enumerate(near) if number % 3}
    rows = {code: world.rows("sentiment", code, 200, seed=1) for code in (SOURCE, TARGET)}
    text = {code: world.text(code, 800, seed=3) for code in (SOURCE, TARGET)}
    test = world.rows("sentiment", TARGET, 150, seed=2)
    return Mixture(SOURCE, TARGET, rows[SOURCE], rows[TARGET], test, lexicon, text), world


def real(
    data: str, source: str, target: str, *, text: str = "", columns: Mapping[str, str] | None = None, **lexicon: Any
) -> Mixture:
    """Rows, raw text and `read_lexicon`'s words; each row of the source has its translation in the target language."""
    how = {"columns": columns or {}, "needed": ("id", *TASK.fields), "cells": TASK.cells}
    parts = ((source, "train"), (target, "train"), (target, "test"))
    apart(*(find_file(data, target, split) for split in ("train", "test")))
    labelled, gold, test = ([TASK.clean(row) for row in read_rows(data, *part, **how)] for part in parts)
    for code, own in ((source, labelled), (target, gold)):
        if twice := [one for one, count in Counter(str(row["id"]) for row in own).items() if count > 1]:
            raise typer.BadParameter(
                f"{code!r} has {len(twice)} ids of several rows, {twice[0]!r} for one: which row is the translation of "
                "which is not known",
                param_hint="--data",
            )
    ids = {str(row["id"]): row for row in gold}
    if missing := [row["id"] for row in labelled if str(row["id"]) not in ids]:
        raise typer.BadParameter(f"{target!r} has no translation of {source!r}'s row {missing[0]}", param_hint="--data")
    where = text or str(Path(data.partition("{")[0]).expanduser() / "text")
    texts = {code: read_text(where, code) for code in (source, target)}
    translations = [ids[str(row["id"])] for row in labelled]
    return Mixture(source, target, labelled, translations, test, read_lexicon(source, target, **lexicon), texts)


def read_lexicon(source: str, target: str, *, file: str = "", words: tuple[str, str] | None = None) -> dict[str, str]:
    """{word: translation} of a file whose columns are `words`, or the languages."""
    if not file:
        return {}
    columns = dict(zip(("from", "to"), words or (source, target), strict=True))
    rows = read_set(file.replace("{language}", target), option="--lexicon")
    named_by = "--lexicon-columns SOURCE TARGET"
    how = {"cells": dict.fromkeys(columns, as_written), "named_by": lambda field: named_by}
    rows = with_columns(rows, columns, (), name=file, option="--lexicon", **how)
    pairs = ((row["from"].strip().lower(), row["to"].strip()) for row in rows)
    return {word: translation for word, translation in pairs if word and translation}  # some words have none


def main(
    data: Annotated[str, typer.Option(help="Rows: a pattern, folder or Hub id. \\[default: invented languages]")] = "",
    text: Annotated[str, typer.Option(help="Raw text, as for run.py. \\[default: text/ in the folder --data]")] = "",
    lexicon: Annotated[str, typer.Option(help="File of word pairs, or a pattern with {language}, the target.")] = "",
    lexicon_columns: Annotated[
        tuple[str, str] | None, typer.Option(help="Its columns. \\[default: the languages]")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=NAME: what the data call a field; repeat it.")] = None,
    model: Annotated[str, typer.Option(help="Encoder for real data: a folder or Hub id.")] = "",
    source: Annotated[str, typer.Option(help="Language with labels, with --data.")] = "ind",
    target: Annotated[str, typer.Option(help="Language to transfer to, with --data.")] = "ace",
    method: Annotated[MethodName, typer.Option(help="Of language and task adapters.")] = MethodName.lt_sft,
    shots: Annotated[list[int] | None, typer.Option(help="K of the few-shot arms; repeat it.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; repeat it. \\[default: all]")] = None,
    language: Annotated[bool, typer.Option(help="Train and use language adapters.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Of each phase of the task adapter.")] = 120,
    language_steps: Annotated[int, typer.Option(min=1, help="The same of language adapters.")] = 120,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate. \\[default: 2e-3; 2e-4 with --data]")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each kind to use. \\[default: all]")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = 200,
    seed: Annotated[int, typer.Option(help="Of draws, heads and the invented languages.")] = 0,
    output: Annotated[Path, typer.Option(help="Where all is saved.")] = Path("outputs/mixed_data"),
) -> None:
    """Train a task adapter on each mixture, and test it in the target language under that language's adapter."""
    if not data:
        mixture, world = invented(seed)
        base = str(tiny_bert(output / "tiny_bert", world, seed=seed))
    elif model:
        columns, words = field_names(column), {"file": lexicon, "words": lexicon_columns}
        mixture, base = real(data, source, target, text=text, columns=columns, **words), model
    else:
        raise typer.BadParameter(
            "give an encoder for the languages in --data: a folder or Hub id", param_hint="--model"
        )
    if rows is not None:
        parts = {name: getattr(mixture, name)[:rows] for name in ("labelled", "gold", "test")}
        mixture = Mixture(**{**vars(mixture), **parts})
    rate = (2e-4 if data else 2e-3) if rate is None else rate
    of_language = Schedule(language_steps, language_steps, 16, 1.5 * rate, 0.2, 64, LANGUAGE.l1)
    of_task = Schedule(steps, steps, 16, rate, 0.2 if not data else 0.08, 64)
    tokenizer = AutoTokenizer.from_pretrained(base)
    labels = labels_of(TASK, mixture.labelled, {mixture.target: mixture.test})
    known = arms(mixture, shots or [20, 100], seed=seed)
    if unknown := [name for name in arm or [] if name not in known]:
        raise typer.BadParameter(f"must be of {', '.join(known)}, got {unknown[0]!r}", param_hint="--arm")

    languages = Workshop(base, tokenizer, method.value, seed=seed, output=output)
    adapters = {c: languages.language(c, t, of_language) for c, t in mixture.text.items()} if language else {}
    answers = {}
    for name in arm or known:
        workshop = Workshop(base, tokenizer, method.value, seed=seed, output=output / name.replace(" ", "-"))
        mixed = {
            key: Source(TASK.encode(tokenizer, one.examples, labels, 64), one.language, one.upsampling, one.origin)
            for key, one in known[name].items()
        }
        adapter = workshop.task(TASK, mixed, labels, adapters, of_task)
        composed = workshop.composed(TASK, labels, adapter, adapters)
        use(composed, mixture.target if language else None)
        answers[name] = TASK.predict(composed, tokenizer, mixture.test, labels, 64)
    _report(mixture, answers, resamples=resamples, output=output)


def _report(mixture: Mixture, answers: dict[str, list], *, resamples: int, output: Path) -> None:
    scores = {name: {TASK.metric: TASK.score(mixture.test, found)} for name, found in answers.items()}
    first = next(iter(answers))
    differences = {
        name: paired_bootstrap(mixture.test, found, answers[first], TASK.score, resamples=resamples)
        for name, found in answers.items()
    }
    title = f"{mixture.source} -> {mixture.target}: {TASK.metric}"
    console.print(table(title, scores, differences, of=f"above {first}"))
    plot(title, scores, output / "scores.png")
    save(
        output / "results.json",
        {"scores": scores, "differences": {name: vars(d) for name, d in differences.items()}, "answers": answers},
    )
    console.print(f"adapters, scores.png and results.json: {output}")


if __name__ == "__main__":
    run(main)
