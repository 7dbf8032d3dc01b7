"""One file of any kind, or one split of a data set of the Hub, as rows; what is wrong is said in one line."""

from __future__ import annotations

import csv
import difflib
import glob
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from peft_sparse.errors import SparseError

Row = dict[str, Any]
# What data sets call their splits.
SPLITS = {"train": ("train",), "valid": ("valid", "dev", "validation"), "test": ("test",)}
csv.field_size_limit(2**31 - 1)


def bad(message: str, option: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


def run(main: Callable[..., None]) -> None:
    """Run an example's command line: what the user can mend is one line on stderr and exit status 1, no traceback."""
    try:
        typer.run(main)
    except (SparseError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def read_file(path: Path, *, option: str = "--data") -> list[Row]:
    """The rows of a file, by its suffix; a text file has a row {"text": line} for each line that is not blank."""
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        raise bad(f"there is no file {path}; {what_is_there(path)}", option)
    if reader is None:
        raise bad(f"{path}: the kinds of files are {', '.join(READERS)}", option)
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise bad(f"{path} is not in UTF-8 ({error})", option) from error
    except ValueError as error:
        raise bad(f"{path}, {error}", option) from error


def _read_text(path: Path) -> Iterator[Row]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return ({"text": line} for line in lines if line)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: no JSON ({error})") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: no JSON object")
                yield row


def _read_csv(path: Path) -> Iterator[Row]:
    """Cells are text, as they are in the file: "NA" and "007" too, which other readers take for numbers."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in lines:
                if None in row or None in row.values():
                    raise ValueError(f"line {lines.line_num}: not as many cells as the header has")
                yield row
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from error


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object of columns, alone or as "data" in an object; or JSONL under another name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return _read_jsonl(path)
    rows = content.get("data", content) if isinstance(content, dict) else content
    if isinstance(rows, dict):
        rows = _rows_of_columns(rows)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("which is no list of JSON objects")
    return iter(rows)


def _rows_of_columns(columns: dict[str, Any]) -> list[Row]:
    """The rows of {column: cells}; an object with anything but lists is a row."""
    if not columns or not all(isinstance(cells, list) for cells in columns.values()):
        return [columns]
    lengths = {name: len(cells) for name, cells in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"which has columns of different lengths, {lengths}: give a list of JSON objects")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _read_parquet(path: Path) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return _named(load_dataset("parquet", data_files=glob.escape(str(path)), split="train"))
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"which is no Parquet file: {first_line(error.__cause__ or error)}") from error


def _read_conllu(path: Path) -> Iterator[Row]:
    """Words, universal tags, heads and relations; parts of multiword tokens as they are, empty nodes left out.

    A block without words, of comments alone, is no sentence.
    """
    import conllu

    with open(path, encoding="utf-8-sig") as file:
        number = 1
        try:
            for sentence in conllu.parse_incr(file):
                words = [token for token in sentence if isinstance(token["id"], int)]
                if not words:
                    continue
                fields = {"tokens": "form", "upos": "upos", "heads": "head", "relations": "deprel"}
                yield {field: [word[theirs] for word in words] for field, theirs in fields.items()}
                number += 1
        except conllu.exceptions.ParseException as error:
            raise ValueError(f"sentence {number}: {error}") from error


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".conllu": _read_conllu,
    ".txt": _read_text,
}


def read_hub(where: str, split: str, *, config: str | None = None, option: str = "--data") -> list[Row]:
    """The rows of a split of a data set; `where` is its id, or id:configuration."""
    from datasets import load_dataset

    name, _, own = where.partition(":")
    failed: Exception | None = None
    for candidate in SPLITS[split]:
        try:
            return _named(load_dataset(name, own or config, split=candidate))
        except ValueError as error:  # no such split or configuration; the error lists those that there are
            failed = failed or error
        except (OSError, RuntimeError) as error:
            failed = failed or error
            break
    raise bad(f"{where!r} is no file or folder here, and the Hub does not give it: {first_line(failed)}", option)


def _named(dataset: Any) -> list[Row]:
    """Rows whose labels are names, not the numbers that the Hub keeps for them."""
    from datasets import ClassLabel

    def names(feature: Any) -> list[str] | None:
        inner = getattr(feature, "feature", feature)
        return inner.names if isinstance(inner, ClassLabel) else None

    def name(value: Any, known: list[str]) -> Any:
        if isinstance(value, list):
            return [name(one, known) for one in value]
        return None if value is None or value < 0 else known[value]  # tests without labels have -1

    known = {column: found for column, feature in dataset.features.items() if (found := names(feature))}
    return [{**row, **{column: name(row[column], own) for column, own in known.items()}} for row in dataset.to_list()]


def first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def what_is_there(path: Path) -> str:
    """What the nearest folder of a path that is not there has, the names most like it first."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in folder.iterdir())
    alike = difflib.get_close_matches(path.relative_to(folder).parts[0], names, n=3)
    names = [*alike, *(name for name in names if name not in alike)]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{'this folder' if folder == Path() else folder} has {listed or 'nothing'}"


def is_local(where: str) -> bool:
    """Whether it names a place on this machine, rather than a data set of the Hub."""
    path = Path(where).expanduser()
    looks_local = path.suffix.lower() in READERS or where.startswith((".", "/", "~")) or where.count("/") > 1
    return looks_local or "{" in where or path.exists()
