"""Where rows and raw text are: in files, folders, patterns of names with {language}, or on the Hub.

All examples read by this module. What is missing is said in one line that names what is there.
"""

from __future__ import annotations

import ast
import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from _readers import READERS, SPLITS, Row, bad, first_line, is_local, read_file, read_hub, what_is_there

# ---- whole data sets -------------------------------------------------------------------------------


def read_set(where: str, split: str = "train", *, option: str = "--data") -> list[Row]:
    """The rows of a file, of the split's file in a folder, or of a set of the Hub."""
    path = Path(where).expanduser()
    if path.is_dir():
        found = split_file(path, split)
        if found is None:
            raise bad(f"{path} has no file of the split {split!r}; {what_is_there(path / split)}", option)
        path = found
    rows = read_file(path, option=option) if is_local(where) else read_hub(where, split, option=option)
    if not rows:
        raise bad(f"{path if is_local(where) else where} has no rows", option)
    return rows


def split_file(folder: Path, split: str) -> Path | None:
    """<split>.<suffix> in a folder, by any of the split's names."""
    tried = (folder / f"{name}{suffix}" for name in SPLITS[split] for suffix in READERS)
    return next((path for path in tried if path.is_file()), None)


def with_columns(
    rows: list[Row],
    columns: Mapping[str, str],
    needed: Iterable[str],
    *,
    name: str,
    option: str = "--data",
    lists: Iterable[str] = (),
    named_by: Callable[[str], str] = lambda field: f"--{field.replace('_', '-')}-column NAME",
) -> list[Row]:
    """Rows with the fields that an example knows.

    Args:
        rows: as they were read.
        columns: {field: what the data call it}, where that differs.
        needed: fields that each row must have.
        name: of the data, for errors.
        option: that named the data.
        lists: fields that are lists; in CSV a cell is a JSON list, or words with spaces between them.
        named_by: field -> the option that says what it is called in the data.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        own = {**row, **{field: row.get(theirs) for field, theirs in columns.items()}}
        for field in [*columns, *needed]:
            if own.get(field) is None:
                theirs = columns.get(field, field)
                raise bad(
                    f"{name}, row {number}: no {theirs!r}. It has {sorted(map(str, row))}; "
                    f"{named_by(field)} says what it is called there",
                    option,
                )
        try:
            found.append({**own, **{field: _as_list(own[field]) for field in lists if own.get(field) is not None}})
        except ValueError as error:
            raise bad(f"{name}, row {number}: {error}", option) from error
    return found


def field_names(pairs: Iterable[str] | None) -> dict[str, str]:
    """{field: what the data call it} of options FIELD=NAME."""
    found = dict(pair.partition("=")[::2] for pair in pairs or ())
    if wrong := next((pair for pair in pairs or () if "" in pair.partition("=")), None):
        raise bad(f"--column takes FIELD=NAME, got {wrong!r}", "--column")
    return found


def _as_list(cell: Any) -> list:
    if not isinstance(cell, str):
        return list(cell)
    if not cell.lstrip().startswith("["):
        return cell.split()
    try:
        return json.loads(cell)
    except ValueError:
        try:
            written = ast.literal_eval(cell.strip())
        except (SyntaxError, ValueError):
            written = None
        # A list as numpy prints it, ['a' 'b'], is to Python the list ['ab'].
        if isinstance(written, list) and repr(written) == cell.strip():
            return written
    raise ValueError(f"{cell[:60]!r} is no list: give it as JSON, or words with spaces between them")


# ---- languages -------------------------------------------------------------------------------------


def read_rows(
    where: str,
    language: str,
    split: str,
    *,
    columns: Mapping[str, str],
    needed: Iterable[str],
    lists: Iterable[str] = (),
    option: str = "--data",
    named_by: Callable[[str], str] = lambda field: f"--column {field}=NAME",
) -> list[Row]:
    """The rows of a language's split.

    Args:
        where: a pattern of file names with {language} and {split}; a folder with <language>/<split>.<suffix>, or one
            folder with that in it; a file, which is then of this language; or the id of a data set on the Hub, whose
            configurations are the languages (id:configuration takes one).
        language, split: which; a split may have another of its usual names ("dev").
        columns, needed, lists, option, named_by: as in `with_columns`.
    """
    path = find_file(where, language, split, option=option)
    rows = read_hub(where, split, config=language, option=option) if path is None else read_file(path, option=option)
    name = str(path or f"{where} ({language}, {split})")
    if not rows:
        raise bad(f"{name} has no rows", option)
    return with_columns(rows, columns, needed, name=name, option=option, lists=lists, named_by=named_by)


def find_file(where: str, language: str, split: str, *, option: str = "--data") -> Path | None:
    """The file of a split; None if `where` is no place on this machine."""
    path = Path(where).expanduser()
    if path.is_file():
        return path
    if not is_local(where):
        return None
    if "{" in where:
        tried = [filled(path, language, option=option, split=name) for name in SPLITS[split]]
        found = next((one for one in tried if one.is_file()), None)
        listed = ", ".join(map(str, tried))
    elif path.is_dir():
        inside = [one for one in sorted(path.glob(f"*/{language}")) if split_file(one, split)]
        if split_file(path / language, split) is None and len(inside) > 1:
            raise bad(
                f"{path} has rows of {language!r} in several folders; name one: {', '.join(map(str, inside))}", option
            )
        found = split_file(path / language, split) or (split_file(inside[0], split) if inside else None)
        listed = f"{path / language / SPLITS[split][0]}, with any of {', '.join(READERS)},"
    else:
        raise bad(f"{where} is no folder, and no pattern: {option} 'rows/{{language}}/{{split}}.csv'", option)
    if found is None:
        there = what_is_there(path / language / split if path.is_dir() else tried[0])
        raise bad(f"no rows of {language!r}: none of {listed} exists; {there}", option)
    return found


def apart(train: Path | None, test: Path | None, *, option: str = "--data") -> None:
    """Refuse to test on the file that was trained on; None is a place that is no file here."""
    if train is not None and train == test:
        raise bad(f"{train} would be both trained and tested on: a pattern with {{split}} tells the two apart", option)


def filled(pattern: Path, language: str, *, option: str, split: str = "") -> Path:
    """The file of a language's split."""
    if "{language}" not in str(pattern):
        raise bad(f"{pattern} is a pattern without {{language}}", option)
    return Path(str(pattern).replace("{language}", language).replace("{split}", split))


def read_text(where: str, language: str, *, column: str = "text", option: str = "--text") -> list[str]:
    """Raw text, a sentence or paragraph a row, of files of any kind or of a set of the Hub.

    Args:
        where: a pattern with {language}; a folder with files called <language>, else <language>_<anything>, else
            <anything>_<language>, with any suffix; or the id of a data set whose configurations are the languages.
        language: which.
        column: of the text; text files have none.
        option: that named the text.
    """
    path = Path(where).expanduser()
    if not is_local(where):
        return _texts(read_hub(where, "train", config=language, option=option), column, where, option)
    if "{" in where:
        files = [filled(path, language, option=option)]
    elif path.is_dir():
        kinds = ([f"{language}{suffix}" for suffix in READERS], [f"{language}_*"], [f"*_{language}.*"])
        groups = (
            [one for name in names for one in sorted(path.glob(name)) if one.suffix in READERS] for names in kinds
        )
        files = next(filter(None, groups), [path / f"{language}.txt"])
    else:
        raise bad(f"{where} is no folder, and no pattern: {option} 'text/{{language}}.txt'", option)
    if not files[0].is_file():
        raise bad(f"no raw text of {language!r}: there is no file {files[0]}; {what_is_there(files[0])}", option)
    found = [line for file in files for line in _texts(read_file(file, option=option), column, str(file), option)]
    if not found:
        raise bad(f"no raw text of {language!r}: {files[0]} is empty", option)
    return found


def _texts(rows: list[Row], column: str, name: str, option: str) -> list[str]:
    columns = {} if column == "text" or Path(name).suffix.lower() == ".txt" else {"text": column}
    rows = with_columns(rows, columns, ["text"], name=name, option=option)
    return [text for row in rows if (text := str(row["text"]).strip())]


def read_texts(where: str, *, column: str = "text", language_column: str = "") -> dict[str, list[str]]:
    """{language: raw text} of all languages that there are.

    Args:
        where: a folder with <language>.<suffix> and <language>_<anything>.<suffix>, which are joined; a pattern with
            {language}; a file or set of the Hub with a column of languages; or a set whose configurations they are.
        column, language_column: of the text, and of its language.
    """
    path, found = Path(where).expanduser(), {}
    if language_column:
        rows = with_columns(read_set(where), {"text": column, "language": language_column}, (), name=where)
        for row in rows:
            found.setdefault(str(row["language"]), []).append(str(row["text"]).strip())
    elif path.is_dir() or "{" in where:
        for language, file in _files_of_languages(path):
            found.setdefault(language, []).extend(_texts(read_file(file), column, str(file), "--data"))
    elif is_local(where):
        read = read_file(path)  # or what is there instead
        raise bad(f"{path}: which column has the language? {sorted(read[0])}; --language-column NAME", "--data")
    else:
        from datasets import get_dataset_config_names

        try:
            configs = get_dataset_config_names(where)
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"is no file or folder here, and the Hub does not give it: {first_line(error)}"
            raise bad(f"{where!r} {reason}", "--data") from error
        for language in configs:
            rows = read_hub(where, "train", config=language)
            found[language] = _texts(rows, column, f"{where} ({language})", "--data")
    return {language: [text for text in own if text] for language, own in found.items()}


def _files_of_languages(path: Path) -> list[tuple[str, Path]]:
    if path.is_dir():
        files = [one for one in sorted(path.iterdir()) if one.suffix.lower() in READERS and one.is_file()]
        found = [(one.stem.partition("_")[0], one) for one in files]
        wanted = path / "<language>.txt"
    else:
        parts = str(path).split("{language}")
        code = re.compile("([^/]+)".join([re.escape(parts[0]), "\\1".join(map(re.escape, parts[1:]))]))
        files = sorted(glob.glob("*".join(map(glob.escape, parts))))
        found = [(match[1], Path(file)) for file in files if (match := code.fullmatch(file))]
        wanted = path
    if not found:
        raise bad(f"there is no file {wanted}; {what_is_there(wanted)}", "--data")
    return found
