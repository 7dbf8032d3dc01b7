"""The six tasks: which fields their rows have, how they are encoded, predicted and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer
from _data import Reader, as_list, as_text, as_written, told_apart
from _readers import bad
from _squad import best_span, f1, windows
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from peft_sparse import BiaffineParser, ParserCollator, attachment_scores, encode_sentences

Row = dict[str, Any]
EVAL_BATCH = 32
# What a feature holds that is not for the model: which word a token begins; of a window, its characters and its row.
WORDS, OFFSETS, ROW = "words", "offsets", "row"
KEPT_BESIDE = (WORDS, OFFSETS, ROW)
DROPPED_ENTITIES = ("DATE", "MISC")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        fields: that rows must have.
        metric: name of the score.
        labels: of rows: the names of the head's outputs, in the order of their ids; None for a head without.
        load: (folder or id, labels) -> model.
        encode: (tokenizer, rows, labels, longest) -> what a trainer takes.
        collator: tokenizer -> collator.
        predict: (model, tokenizer, rows, labels, longest) -> an answer for each row.
        score: (rows, answers) -> in [0, 1].
        clean: what rows are before anything else.
        cells: {field: how its cells are read}.
        least_labels: of training rows; with one, there would be nothing to tell apart.
    """

    fields: tuple[str, ...]
    metric: str
    labels: Callable[[Sequence[Row]], list[str] | None]
    load: Callable[[str, list[str] | None], Any]
    encode: Callable[..., list[dict]]
    collator: Callable[[Any], Callable]
    predict: Callable[..., list[Any]]
    score: Callable[[Sequence[Row], Sequence[Any]], float]
    cells: Mapping[str, Reader]
    clean: Callable[[Row], Row] = dict
    least_labels: int = 2


def batched(model, features: list[dict], collate: Callable):
    """The model's outputs, a batch at a time, with the features of the batch."""
    model.eval()
    for start in range(0, len(features), EVAL_BATCH):
        part = features[start : start + EVAL_BATCH]
        batch = {name: tensor.to(model.device) for name, tensor in collate(part).items()}
        with torch.no_grad():
            yield part, model(**batch)


def padding(tokenizer) -> Callable[[list[dict]], dict]:
    """Pads what the model takes, and leaves out what is kept beside it."""
    collate = DataCollatorWithPadding(tokenizer)
    return lambda part: dict(collate([{k: v for k, v in f.items() if k not in KEPT_BESIDE} for f in part]))


def ids_of(labels: Sequence[str], row: Row, names: Sequence[Any]) -> list[int]:
    """Labels as numbers; one that training has not seen is an error, not a guess."""
    unknown = next((name for name in names if name not in labels), None)
    if unknown is not None:
        raise typer.BadParameter(f"the label {unknown!r} is none of the source's: {list(labels)}", param_hint="--data")
    return [labels.index(name) for name in names]


def labels_of(task: Task, train: Sequence[Row], tests: Mapping[str, Sequence[Row]]) -> list[str] | None:
    """The labels of the training rows, by which the head has its outputs; says what of tests is none of them."""
    labels = task.labels(train)
    if labels is None:
        return None
    told_apart(labels, least=task.least_labels)
    for code, rows in tests.items():
        own = task.labels(rows) or []
        unknown = [label for label in own if label not in labels]
        if unknown and len(unknown) == len(own):
            raise bad(
                f"{code!r} is tested on the labels {own[:8]}, and training has none of them: {labels[:8]}", "--data"
            )
        if unknown:
            typer.echo(f"Training has no label {unknown[:8]}, which {code!r} is tested on: never predicted.", err=True)
    return labels


def numbered(labels: Sequence[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


# ---- a label for each word: parts of speech, entities ---------------------------------------------


def encode_words(tokenizer, rows, labels, longest, *, field: str, with_labels: bool = True) -> list[dict]:
    """The label of a word is that of its first subword."""
    encoded = tokenizer(
        [list(map(str, row["tokens"])) for row in rows], is_split_into_words=True, truncation=True, max_length=longest
    )
    found = []
    for number, row in enumerate(rows):
        if len(row["tokens"]) != len(row[field]):
            raise typer.BadParameter(
                f"row {number + 1}: {len(row['tokens'])} tokens and {len(row[field])} {field}", param_hint="--data"
            )
        places = encoded.word_ids(number)
        is_first = [p is not None and (i == 0 or places[i - 1] != p) for i, p in enumerate(places)]
        feature: dict[str, Any] = {name: encoded[name][number] for name in encoded}
        if with_labels:
            ids = ids_of(labels, row, row[field])
            feature["labels"] = [ids[p] if first else -100 for p, first in zip(places, is_first, strict=True)]
        else:
            feature[WORDS] = [p if first else None for p, first in zip(places, is_first, strict=True)]
        found.append(feature)
    return found


def predict_words(model, tokenizer, rows, labels, longest, *, field: str) -> list[list[str]]:
    """The label of each word; a word that was cut off, or of which no subword is left, gets the most neutral one."""
    features = encode_words(tokenizer, rows, labels, longest, field=field, with_labels=False)
    neutral = "O" if "O" in labels else "X" if "X" in labels else labels[0]
    answers = []
    for part, output in batched(model, features, padding(tokenizer)):
        for feature, row_scores in zip(part, output.logits.argmax(-1).tolist(), strict=True):
            own = [neutral] * len(rows[len(answers)][field])
            # The collator pads at the tokenizer's side.
            shift = len(row_scores) - len(feature[WORDS]) if tokenizer.padding_side == "left" else 0
            for place, word in enumerate(feature[WORDS]):
                if word is not None:
                    own[word] = labels[row_scores[place + shift]]
            answers.append(own)
    return answers


def word_accuracy(rows, answers) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score([tag for row in rows for tag in row["upos"]], [t for own in answers for t in own]))


def entity_f1(rows, answers) -> float:
    from seqeval.metrics import f1_score

    return float(f1_score([list(row["tags"]) for row in rows], [list(own) for own in answers], zero_division=0))


def without_dropped(row: Row) -> Row:
    """MasakhaNER's dates and CoNLL's miscellany are no entities, in training and test."""
    return {**row, "tags": ["O" if tag.rpartition("-")[2] in DROPPED_ENTITIES else tag for tag in row["tags"]]}


def token_model(where: str, labels):
    return AutoModelForTokenClassification.from_pretrained(where, num_labels=len(labels), **numbered(labels))


def with_texts(field: str, row: Row) -> Row:
    """A label that is a number is its name, whichever kind of file it is from."""
    return {**row, field: [str(label).strip() for label in row[field]]}


def of_words(field: str, metric: str, score: Callable, clean: Callable = dict) -> Task:
    return Task(
        fields=("tokens", field),
        metric=metric,
        labels=lambda rows: sorted({tag for row in rows for tag in row[field]}),
        load=token_model,
        encode=lambda *given: encode_words(*given, field=field),
        collator=DataCollatorForTokenClassification,
        predict=lambda *given: predict_words(*given, field=field),
        score=score,
        clean=lambda row: clean(with_texts(field, row)),
        cells=dict.fromkeys(("tokens", field), as_list),
    )


# ---- dependency trees ------------------------------------------------------------------------------


def with_numbers(row: Row) -> Row:
    try:
        heads = [int(head) for head in row["heads"]]
    except (TypeError, ValueError) as error:
        raise bad(f"heads must be numbers of words, 0 the root, got {row['heads']}", "--data") from error
    return {**row, "heads": heads, "relations": [str(relation).strip() for relation in row["relations"]]}


def encode_trees(tokenizer, rows, labels, longest) -> list[dict]:
    sentences = [{**row, "words": row["tokens"]} for row in rows]
    return encode_sentences(tokenizer, sentences, label2id=numbered(labels)["label2id"], max_length=longest)[0]


def predict_trees(model, tokenizer, rows, labels, longest) -> list[tuple[list[int], list[str]]]:
    """Heads and relations; a sentence that is too long has none right."""
    features, too_long = encode_sentences(tokenizer, [{"words": row["tokens"]} for row in rows], max_length=longest)
    found = []
    for part, output in batched(model, features, ParserCollator(tokenizer)):
        for feature, heads, relations in zip(part, output.arcs.tolist(), output.relations.tolist(), strict=True):
            count = max(feature["word_ids"]) + 1
            found.append((heads[:count], [labels[i] for i in relations[:count]]))
    rest = iter(found)
    nothing = [([-1] * len(row["tokens"]), [""] * len(row["tokens"])) for row in rows]
    return [nothing[i] if i in set(too_long) else next(rest) for i in range(len(rows))]


def labelled_attachment(rows, answers) -> float:
    gold = [(row["heads"], [relation.partition(":")[0] for relation in row["relations"]]) for row in rows]
    return attachment_scores(answers, gold)["las"]


# ---- a label for a text, or for two ----------------------------------------------------------------


def encode_texts(tokenizer, rows, labels, longest, *, fields, with_labels: bool = True) -> list[dict]:
    encoded = tokenizer(*[[row[field] for row in rows] for field in fields], truncation=True, max_length=longest)
    found = [{name: encoded[name][number] for name in encoded} for number in range(len(rows))]
    if with_labels:
        for feature, row in zip(found, rows, strict=True):
            feature["labels"] = ids_of(labels, row, [row["label"]])[0]
    return found


def predict_texts(model, tokenizer, rows, labels, longest, *, fields) -> list[str]:
    features = encode_texts(tokenizer, rows, labels, longest, fields=fields, with_labels=False)
    outputs = batched(model, features, DataCollatorWithPadding(tokenizer))
    return [labels[i] for _, output in outputs for i in output.logits.argmax(-1).tolist()]


def text_accuracy(rows, answers) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score([row["label"] for row in rows], answers))


def macro_f1(rows, answers) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score([row["label"] for row in rows], answers, average="macro", zero_division=0))


def text_model(where: str, labels):
    return AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(labels), **numbered(labels))


def of_texts(fields: tuple[str, ...], metric: str, score: Callable) -> Task:
    named = (*fields, "label")
    return Task(
        fields=named,
        metric=metric,
        labels=lambda rows: sorted({row["label"] for row in rows}),
        load=text_model,
        encode=lambda *given: encode_texts(*given, fields=fields),
        collator=DataCollatorWithPadding,
        predict=lambda *given: predict_texts(*given, fields=fields),
        score=score,
        cells={**dict.fromkeys(fields, as_text), "label": as_written},
        # A label that is a number is its name, whichever kind of file it is from.
        clean=lambda row: {**row, "label": str(row["label"]).strip()},
    )


# ---- answers to questions --------------------------------------------------------------------------


def predict_answers(model, tokenizer, rows, labels, longest) -> list[str]:
    features = windows(tokenizer, rows, longest, with_answers=False)
    best: list[tuple[float, int, int]] = [(float("-inf"), 0, 0)] * len(rows)
    left = tokenizer.padding_side == "left"
    for part, output in batched(model, features, padding(tokenizer)):
        for feature, starts, ends in zip(part, output.start_logits.tolist(), output.end_logits.tolist(), strict=True):
            shift = len(starts) - len(feature[OFFSETS]) if left else 0
            found = best_span(starts[shift:], ends[shift:], feature[OFFSETS])
            best[feature[ROW]] = max(best[feature[ROW]], found)
    return [row["context"][first:last] for row, (_, first, last) in zip(rows, best, strict=True)]


def answer_f1(rows, answers) -> float:
    return sum(f1(answer, row["answer"]) for row, answer in zip(rows, answers, strict=True)) / len(rows)


def squad_row(row: Row) -> Row:
    """A question with its first answer; rows of SQuAD have their answers in a list."""
    answers = row.get("answers")
    if isinstance(answers, dict):
        texts, starts = answers["text"], answers["answer_start"]
        row = {**row, "answer": texts[0], "answer_start": starts[0]} if len(texts) else row
    if row.get("answer") is None or row.get("answer_start") is None:
        raise typer.BadParameter(
            f"the question {row['question']!r} has no 'answer' with its 'answer_start', and no 'answers'; its row has "
            f"{sorted(row)}",
            param_hint="--data",
        )
    first = int(row["answer_start"])
    if not row["context"].startswith(row["answer"], first):
        raise typer.BadParameter(
            f"the answer {row['answer']!r} of {row['question']!r} is not at character {first} of its context",
            param_hint="--data",
        )
    return {**row, "answer_start": first}


TASKS = {
    "pos": of_words("upos", "accuracy", word_accuracy),
    "ner": of_words("tags", "F1", entity_f1, without_dropped),
    "dp": Task(
        fields=("tokens", "heads", "relations"),
        metric="LAS",
        labels=lambda rows: sorted({relation.partition(":")[0] for row in rows for relation in row["relations"]}),
        load=lambda where, labels: BiaffineParser.from_pretrained(where, labels=labels),
        encode=encode_trees,
        collator=ParserCollator,
        predict=predict_trees,
        score=labelled_attachment,
        clean=with_numbers,
        cells=dict.fromkeys(("tokens", "heads", "relations"), as_list),
        least_labels=1,
    ),
    "nli": of_texts(("premise", "hypothesis"), "accuracy", text_accuracy),
    "sentiment": of_texts(("text",), "macro F1", macro_f1),
    "qa": Task(
        fields=("question", "context"),
        metric="F1",
        labels=lambda rows: None,
        load=lambda where, labels: AutoModelForQuestionAnswering.from_pretrained(where),
        encode=lambda tokenizer, rows, labels, longest: windows(tokenizer, rows, longest, with_answers=True),
        collator=DataCollatorWithPadding,
        predict=predict_answers,
        score=answer_f1,
        cells={"question": as_text, "context": as_text, "answer": as_written},
        clean=squad_row,
    ),
}
