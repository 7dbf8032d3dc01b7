"""Reading tables of typological features: lang2vec's data files, JSON, CSV. Nothing is imported or unpickled."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, SparseError
from ..untrusted import UNREADABLE, check_regular, unpacked_bytes

# lang2vec names a set "syntax_knn": a part of the grammar, and where the values come from.
_PREFIXES = {"syntax": "S_", "phonology": "P_", "inventory": "INV_"}
_SOURCES = {"knn": "predicted", "average": "avg"}
_FILES = {"knn": "feature_predictions.npz", "average": "feature_averages.npz"}
_OTHER_SOURCES = "features.npz"
_MISSING_TEXT = ("", "--")
_GLOTTOCODE_COLUMNS = ("glottocode", "id")
# lang2vec's largest array takes 119 MB, its lists of names 0.8 MB.
_MAX_BYTES, _MAX_NAMES_BYTES = 2**27, 2**23
_ISO_COLUMNS = ("iso_code", "iso639p3code")


_UNREADABLE: tuple[type[Exception], ...] = (*UNREADABLE, csv.Error)


@dataclass(frozen=True)
class Table:
    """Raw values: `values` [L, d] float32 with NaN where missing, for `languages` [L] and `feature_names` [d]."""

    languages: tuple[str, ...]
    feature_names: tuple[str, ...]
    values: np.ndarray
    source: str
    version: str | None = None


def read_package(features: Sequence[str]) -> Table:
    """The user's installed lang2vec, whose import fails under setuptools >= 82 and is not needed."""
    spec = find_spec("lang2vec")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "typological features need lang2vec's data, which are CC BY-SA and not shipped here: pip install lang2vec, "
            "name a file (.npz, .json, .csv or .tsv), or give vectors of your own with Typology.from_vectors"
        )
    table = _read_folder(Path(spec.submodule_search_locations[0], "data"), features)
    return Table(table.languages, table.feature_names, table.values, "lang2vec", metadata.version("lang2vec"))


def read_file(path: Path, features: Sequence[str]) -> Table:
    """A file of the user's, by its ending, or a folder with lang2vec's data files in it."""
    if path.is_dir():
        return _read_folder(path, features)
    readers = {".npz": _read_npz, ".json": _read_json, ".csv": _read_delimited, ".tsv": _read_delimited}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"typology must be a file that ends in {', '.join(readers)}, or a folder, got {str(path)!r}")
    check_regular(path, max_bytes=_MAX_BYTES)
    try:
        return readers[path.suffix.lower()](path, features)
    except (SparseError, FileNotFoundError):
        raise
    except _UNREADABLE as error:
        raise FormatError(f"{path} is not a readable table of features ({type(error).__name__}: {error})") from error


def read_glottocodes(path: Path | None) -> dict[str, str]:
    """Glottocode -> ISO 639-3, from a CSV file of Glottolog or URIEL+; from an installed URIEL+ if there is no path."""
    if path is None:
        spec = find_spec("urielplus")
        if spec is None or not spec.submodule_search_locations:
            return {}
        folder = Path(spec.submodule_search_locations[0], "database", "urielplus_csvs")
        path = folder / "uriel_glottocode_map.csv"
        if not path.is_file():
            return {}
    check_regular(path, max_bytes=_MAX_BYTES)
    try:
        return _glottocodes(path)
    except (SparseError, FileNotFoundError):
        raise
    except _UNREADABLE as error:
        raise FormatError(f"{path} is not a readable table of codes ({type(error).__name__}: {error})") from error


def _glottocodes(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = {name.lower(): name for name in reader.fieldnames or ()}
        glottocode = next((columns[name] for name in _GLOTTOCODE_COLUMNS if name in columns), None)
        iso = next((columns[name] for name in _ISO_COLUMNS if name in columns), None)
        if glottocode is None or iso is None:
            raise FormatError(
                f"{path} must have a column of Glottocodes (glottocode or id) and one of ISO 639-3 codes "
                f"({' or '.join(_ISO_COLUMNS)}), it has {sorted(columns)}"
            )
        found: dict[str, str] = {}
        for row in reader:
            if row[glottocode] and row[iso]:
                found.setdefault(row[glottocode], row[iso])
    return found


def _read_folder(folder: Path, features: Sequence[str]) -> Table:
    tables = []
    for name in dict.fromkeys(_FILES.get(_suffix(wanted), _OTHER_SOURCES) for wanted in features):
        wanted = [feature for feature in features if _FILES.get(_suffix(feature), _OTHER_SOURCES) == name]
        if not (folder / name).is_file():
            raise ConfigError(f"features={wanted} need the file {name}, which is not in {folder}")
        tables.append(read_file(folder / name, wanted))
    if any(table.languages != tables[0].languages for table in tables):
        raise FormatError(f"the data files in {folder} do not describe the same languages: they are of two versions")
    names = tuple(name for table in tables for name in table.feature_names)
    source = ", ".join(table.source for table in tables)
    return Table(tables[0].languages, names, np.concatenate([table.values for table in tables], axis=1), source)


def _suffix(feature: str) -> str:
    return feature.partition("_")[2]


def _read_npz(path: Path, features: Sequence[str]) -> Table:
    _check_arrays(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            # An NpzFile decompresses a member each time it is asked for.
            data, languages, names, sources = (file[member] for member in ("data", "langs", "feats", "sources"))
    except ValueError as error:
        raise FormatError(f"{path} holds pickled objects or is damaged, and is not read ({error})") from error
    if data.ndim != 3 or data.shape != (len(languages), len(names), len(sources)):
        raise FormatError(
            f"{path}: data must have the shape [langs, feats, sources] = "
            f"{[len(languages), len(names), len(sources)]}, got {list(data.shape)}"
        )
    parts, chosen = [], []
    known = [str(source) for source in sources]
    suffixes = {source: suffix for suffix, source in _SOURCES.items()}
    for feature in features:
        part, _, suffix = feature.partition("_")
        source = _SOURCES.get(suffix, suffix.upper())
        columns = [i for i, name in enumerate(names) if part in _PREFIXES and str(name).startswith(_PREFIXES[part])]
        if not columns or source not in known:
            raise ConfigError(
                f"features={feature!r} is not in {path.name}: a set is one of {sorted(_PREFIXES)}, an underscore, and "
                f"one of {sorted(suffixes.get(name, name.lower()) for name in known)}"
            )
        parts.append(data[:, columns, known.index(source)])
        chosen += [str(names[i]) for i in columns]
    values = np.concatenate(parts, axis=1).astype(np.float32)
    values[values < 0] = np.nan  # lang2vec's mark for a missing value is -1
    return Table(tuple(str(language) for language in languages), tuple(chosen), values, path.name)


def _check_arrays(path: Path) -> None:
    """Refuse arrays that would unpack to more than any table of features has: zeros pack a thousand to one."""
    for member, size in unpacked_bytes(path).items():
        limit = _MAX_BYTES if member == "data.npy" else _MAX_NAMES_BYTES
        if size > limit:
            raise FormatError(
                f"{path}: {member} claims to unpack to {size} bytes, more than the {limit} that a table may have there"
            )
    with zipfile.ZipFile(path) as archive, archive.open("data.npy") as data:
        version = np.lib.format.read_magic(data)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(data)
    if prod(shape) * dtype.itemsize > _MAX_BYTES:
        raise FormatError(f"{path}: data.npy claims the shape {list(shape)}, more than a table of features may have")


def _read_json(path: Path, features: Sequence[str]) -> Table:
    content = json.loads(path.read_text(encoding="utf-8"))
    sets: dict[str, list[str]] = content["features"]
    vectors: dict[str, dict[str, list[Any]]] = content["vectors"]
    unknown = [feature for feature in features if feature not in sets]
    if unknown:
        raise ConfigError(f"features={unknown} are not in {path.name}, which has {sorted(sets)}")
    rows = []
    for language, by_set in vectors.items():
        for feature in features:
            if len(by_set[feature]) != len(sets[feature]):
                raise FormatError(
                    f"{path}: {language} has {len(by_set[feature])} values of {feature}, which has {len(sets[feature])}"
                )
        rows.append([_number(value, path) for feature in features for value in by_set[feature]])
    names = tuple(name for feature in features for name in sets[feature])
    values = np.array(rows, dtype=np.float32).reshape(len(rows), len(names))
    return Table(tuple(vectors), names, values, path.name, content.get("version"))


def _read_delimited(path: Path, features: Sequence[str]) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    rows = [row for row in rows if row]
    if len(rows) < 2 or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise FormatError(
            f"{path} must be a header and one row per language, all of one length: the code, then the features"
        )
    values = np.array([[_number(value, path) for value in row[1:]] for row in rows[1:]], dtype=np.float32)
    return Table(_column(row[0] for row in rows[1:]), _column(rows[0][1:]), values, path.name)


def _column(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts)


def _number(value: Any, path: Path) -> float:
    if value is None or (isinstance(value, str) and value.strip() in _MISSING_TEXT):
        return float("nan")
    try:
        return float(value)
    except ValueError as error:
        raise FormatError(f"{path}: {value!r} is not a number, nor an empty value or '--' for a missing one") from error
