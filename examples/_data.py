"""Where rows and raw text are: in files, folders, patterns of names with {language}, or on the Hub.

All examples read by this module. What is missing is said in one line that names what is there.
"""

from __future__ import annotations

import ast
import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _readers import READERS, SPLITS, Row, bad, first_line, is_local, read_file, read_hub, what_is_there

from peft_sparse.checks import is_finite

# (what a cell holds, what the data call its field) -> what an example takes; a ValueError says what it must be.
Reader = Callable[[Any, str], Any]

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
    return next((path for name in SPLITS[split] for path in files_called(folder, name)), None)


def files_called(folder: Path, stem: str) -> list[Path]:
    """<stem>.<suffix> in a folder, of the kinds that are read and in their order; a suffix may be in capitals."""
    kinds = list(READERS)
    found = [one for one in folder.glob(f"{glob.escape(stem)}.*") if one.stem == stem and _is_read(one)]
    return sorted(found, key=lambda one: (kinds.index(one.suffix.lower()), one.name))


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in READERS and path.is_file()


def with_columns(
    rows: list[Row],
    columns: Mapping[str, str],
    needed: Iterable[str],
    *,
    name: str,
    option: str = "--data",
    cells: Mapping[str, Reader] | None = None,
    named_by: Callable[[str], str] = lambda field: f"--{field.replace('_', '-')}-column NAME",
) -> list[Row]:
    """Rows with the fields that an example knows.

    Args:
        rows: as they were read.
        columns: {field: what the data call it}, where that differs.
        needed: fields that each row must have.
        name: of the data, for errors.
        option: that named the data.
        cells: {field: how its cells are read}: by `as_text`, `as_written` or `as_list`; others stay as they are.
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
        for field, read in (cells or {}).items():
            if own.get(field) is None:
                continue
            try:
                own[field] = read(own[field], columns.get(field, field))
            except ValueError as error:
                raise bad(f"{name}, row {number}: {error}; {named_by(field)} names another column", option) from error
        found.append(own)
    return found


def field_names(pairs: Iterable[str] | None) -> dict[str, str]:
    """{field: what the data call it} of options FIELD=NAME."""
    found = dict(pair.partition("=")[::2] for pair in pairs or ())
    if wrong := next((pair for pair in pairs or () if "" in pair.partition("=")), None):
        raise bad(f"--column takes FIELD=NAME, got {wrong!r}", "--column")
    return found


def as_text(cell: Any, name: str) -> str:
    """Text as it is, and words in a list with spaces between them."""
    words = [cell] if isinstance(cell, str) else cell
    if isinstance(words, (list, tuple)) and all(isinstance(word, str) for word in words):
        return " ".join(words)
    raise ValueError(f"{name!r} must be text or a list of words, got {cell!r:.60}")


def as_written(cell: Any, name: str) -> str:
    """Text as it is, and a number as it is written: a label, an answer, a name."""
    if isinstance(cell, (str, bool)) or is_finite(cell):
        return str(cell)
    raise ValueError(f"{name!r} must be text or a number, got {cell!r:.60}: write it as text")


def as_list(cell: Any, name: str) -> list:
    """A list of words or numbers, one at least; in CSV a cell is a JSON list, or words with spaces between them."""
    found = _list_in(cell) if isinstance(cell, str) else cell
    if not isinstance(found, (list, tuple)) or not found:
        ways = "as JSON or as words with spaces between them"
        raise ValueError(f"{name!r} must be a list with a word at least, {ways}, got {cell!r:.60}")
    for place, one in enumerate(found):
        as_written(one, f"{name}[{place}]")
    return list(found)


def _list_in(cell: str) -> Any:
    if not cell.lstrip().startswith("["):
        return cell.split()
    try:
        return json.loads(cell)
    except ValueError:
        try:
            written = ast.literal_eval(cell.strip())
        except (SyntaxError, ValueError):
            return None
        # A list as numpy prints it, ['a' 'b'], is to Python the list ['ab'].
        return written if isinstance(written, list) and repr(written) == cell.strip() else None


# ---- languages -------------------------------------------------------------------------------------


def read_rows(
    where: str,
    language: str,
    split: str,
    *,
    columns: Mapping[str, str],
    needed: Iterable[str],
    cells: Mapping[str, Reader] | None = None,
    option: str = "--data",
    named_by: Callable[[str], str] = lambda field: f"--column {field}=NAME",
) -> list[Row]:
    """The rows of a language's split.

    Args:
        where: a pattern of file names with {language} and {split}; a folder with <language>/<split>.<suffix>, or one
            folder with that in it; a file, which is then of this language; or the id of a data set on the Hub, whose
            configurations are the languages (id:configuration takes one).
        language, split: which; a split may have another of its usual names ("dev").
        columns, needed, cells, option, named_by: as in `with_columns`.
    """
    path = find_file(where, language, split, option=option)
    rows = read_hub(where, split, config=language, option=option) if path is None else read_file(path, option=option)
    name = str(path or f"{where} ({language}, {split})")
    if not rows:
        raise bad(f"{name} has no rows", option)
    return with_columns(rows, columns, needed, name=name, option=option, cells=cells, named_by=named_by)


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
    if train is not None and test is not None and train.samefile(test):
        raise bad(f"{train} would be both trained and tested on: a pattern with {{split}} tells the two apart", option)


def told_apart(labels: Sequence[str], *, least: int = 2, option: str = "--data") -> None:
    """Refuse training rows with fewer labels than there must be."""
    if len(labels) < least:
        raise bad(f"all training rows have the label {labels[0]!r}: there is nothing to learn", option)


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
        column: of the text, or of its words; text files have none.
        option: that named the text.
    """
    path = Path(where).expanduser()
    if not is_local(where):
        return _texts(read_hub(where, "train", config=language, option=option), column, where, option)
    if "{" in where:
        files = [filled(path, language, option=option)]
    elif path.is_dir():
        others = (
            [one for one in sorted(path.glob(name)) if _is_read(one)] for name in (f"{language}_*", f"*_{language}.*")
        )
        files = next(filter(None, (files_called(path, language), *others)), [path / f"{language}.txt"])
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
    rows = with_columns(rows, columns, ["text"], name=name, option=option, cells={"text": as_text})
    return [text for row in rows if (text := row["text"].strip())]


def read_texts(where: str, *, column: str = "text", language_column: str = "") -> dict[str, list[str]]:
    """{language: raw text} of all languages that there are.

    Args:
        where: a folder with <language>.<suffix> and <language>_<anything>.<suffix>, which are joined; a pattern with
            {language}; a file or set of the Hub with a column of languages; or a set whose configurations they are.
        column, language_column: of the text, and of its language.
    """
    path, found = Path(where).expanduser(), {}
    if language_column:
        columns, cells = {"text": column, "language": language_column}, {"text": as_text, "language": as_written}
        for row in with_columns(read_set(where), columns, (), name=where, cells=cells):
            found.setdefault(row["language"], []).append(row["text"].strip())
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
        files = [one for one in sorted(path.iterdir()) if _is_read(one)]
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
