"""Files of texts or rows that a user gives: the lines of a text file, or JSON, one value a line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, FormatError

# Of files with a JSON value a line, and of files of rows that are not read here; any other is text.
_JSON = (".jsonl", ".json", ".ndjson")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".conllu")


@dataclass(frozen=True)
class Lines:
    """The lines of a file that are not empty.

    Attributes:
        file: where they are from.
        are_json: whether each is a JSON value; else they are text.
        numbered: [(number in the file, line)].
    """

    file: Path
    are_json: bool
    numbered: list[tuple[int, str]]

    def values(self) -> list[tuple[int, Any]]:
        """[(number, value)] of lines of JSON.

        Raises:
            FormatError: a line is no JSON.
        """
        return [(number, self._value(number, line)) for number, line in self.numbered]

    def _value(self, number: int, line: str) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise FormatError(f"{self.file}, line {number} is no JSON ({error}): one row a line.") from error


def read_lines(path: str | os.PathLike[str], what: str) -> Lines:
    """The lines of a text file, or of one of JSON lines (its suffix tells, in any case).

    Args:
        path: the file.
        what: it holds, for errors: "rows".

    Raises:
        ConfigError: there is no such file, or it is a table of another kind, such as CSV.
        FormatError: it is not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no file {os.fspath(path)!r} of {what}.")
    kind = file.suffix.lower()
    if kind in _TABLES:
        raise ConfigError(
            f"the {what} must be a .jsonl file, an object a line, or a text file, got {file}. Write it as JSONL: "
            "pandas reads such tables, and to_json('rows.jsonl', orient='records', lines=True) writes their rows."
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8 ({error}). Convert it.") from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    return Lines(file, kind in _JSON, numbered)
