"""Rows and raw text of languages, from files of several kinds or from the Hub, with errors that say what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".conllu")
# What data sets call their splits.
SPLITS = {"train": ("train",), "valid": ("valid", "dev", "validation"), "test": ("test",)}


def read_rows(where: str, language: str, split: str, *, columns: Mapping[str, str], needed: Iterable[str]) -> list[Row]:
    """The rows of a language's split.

    Args:
        where: a pattern of file names with {language} and {split}; a folder with <language>/<split>.<suffix>; or the id
            of a data set on the Hub, whose configurations are the languages.
        language, split: which; a split may have another of its usual names ("dev").
        columns: {name here: name in the data}.
        needed: names that rows must have.
    """
    path = find_file(where, language, split)
    rows = read_file(path) if path is not None else _from_hub(where, language, split)
    name = str(path or f"{where} ({language}, {split})")
    if not rows:
        raise typer.BadParameter(f"{name} has no rows", param_hint="--data")
    rows = [{**row, **{own: row[theirs] for own, theirs in columns.items() if theirs in row}} for row in rows]
    for number, row in enumerate(rows):
        missing = [column for column in needed if row.get(column) is None]
        if missing:
            raise typer.BadParameter(
                f"{name}, row {number + 1}: no {missing[0]!r}. It has {sorted(map(str, row))}; "
                f"--column {missing[0]}=NAME says what it is called there",
                param_hint="--data",
            )
    return rows


def find_file(where: str, language: str, split: str) -> Path | None:
    """The file of a split; None if `where` is no place on this machine."""
    if "{" in where:
        tried = [Path(where.replace("{language}", language).replace("{split}", name)) for name in SPLITS[split]]
    elif Path(where).is_dir():
        folder = Path(where) / language
        tried = [folder / f"{name}{suffix}" for name in SPLITS[split] for suffix in SUFFIXES]
    elif Path(where).suffix in SUFFIXES or where.startswith((".", "/", "~")):
        raise typer.BadParameter(
            f"{where} is no folder, and no pattern: --data 'rows/{{language}}/{{split}}.csv'",
            param_hint="--data",
        )
    else:
        return None
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        listed = ", ".join(map(str, tried[:4])) + (", ..." if len(tried) > 4 else "")
        raise typer.BadParameter(f"no rows of {language!r}: none of {listed} exists", param_hint="--data")
    return found


def read_file(path: Path) -> list[Row]:
    """The rows of a file, by its suffix."""
    if path.suffix == ".conllu":
        return _read_conllu(path)
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path))
    if path.suffix in (".csv", ".tsv", ".parquet"):
        from datasets import load_dataset

        kind = "parquet" if path.suffix == ".parquet" else "csv"
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(kind, data_files=str(path), split="train", **options).to_list()
    raise typer.BadParameter(f"{path}: the kinds of files are {', '.join(SUFFIXES)}", param_hint="--data")


def _read_jsonl(path: Path) -> Iterable[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise typer.BadParameter(f"{path}, line {number}: no JSON ({error})", param_hint="--data") from error
            if not isinstance(row, dict):
                raise typer.BadParameter(f"{path}, line {number}: no JSON object", param_hint="--data")
            yield row


def _read_conllu(path: Path) -> list[Row]:
    """Words, universal tags, heads and relations; parts of multiword tokens as they are, empty nodes left out."""
    import conllu

    rows = []
    with open(path, encoding="utf-8") as file:
        try:
            for sentence in conllu.parse_incr(file):
                words = [token for token in sentence if isinstance(token["id"], int)]
                rows.append(
                    {
                        "tokens": [token["form"] for token in words],
                        "upos": [token["upos"] for token in words],
                        "heads": [token["head"] for token in words],
                        "relations": [token["deprel"] for token in words],
                    }
                )
        except conllu.exceptions.ParseException as error:
            raise typer.BadParameter(f"{path}, sentence {len(rows) + 1}: {error}", param_hint="--data") from error
    return rows


def _from_hub(where: str, language: str, split: str) -> list[Row]:
    from datasets import load_dataset

    failed = None
    for name in SPLITS[split]:
        try:
            return load_dataset(where, language, split=name).to_list()
        except (OSError, ValueError, RuntimeError) as error:
            failed = failed or error
    raise typer.BadParameter(
        f"{where!r} is no folder here, and cannot be had from the Hub ({language}, {split}): {failed}",
        param_hint="--data",
    )


def read_text(where: str, language: str) -> list[str]:
    """Raw text, a sentence or paragraph a line, from a pattern with {language} or a folder with <language>.txt."""
    path = Path(where.replace("{language}", language)) if "{" in where else Path(where) / f"{language}.txt"
    if not path.is_file():
        raise typer.BadParameter(f"no raw text of {language!r}: there is no file {path}", param_hint="--text")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise typer.BadParameter(f"no raw text of {language!r}: {path} is empty", param_hint="--text")
    return [line for line in lines if line]
