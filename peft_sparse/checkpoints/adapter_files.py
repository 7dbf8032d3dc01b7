"""Saved adapters without a model: where their files are, and what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from torch import Tensor

from ..checks import FLOAT_DTYPES, nearest
from ..core.delta import SparseDelta
from ..errors import ConfigError, FormatError
from .files import fetch, load_tensors, read_json
from .foreign import COMPOSABLE_SFT, how_to_import, how_to_use
from .native import DIGEST_KEY, SOURCE, canonical_name, parameter_of, stored_digest, verify

CONFIG_FILE = "adapter_config.json"
PICKLED = "adapter_model.bin"
_TEXTS = ("peft_type", "base_model_name_or_path", "revision")
# What of `auto_mapping` is read here.
_MAPPED = ("parent_library", "base_model_class")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:/(?P<folder>[^@]+?)/?)?(?:@(?P<revision>.+))?")


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """What the two files of a sparse adapter hold.

    Attributes:
        source: where they came from, as it was given.
        folder: where they lie on this machine.
        config: the content of adapter_config.json.
        deltas: {parameter: delta}, in the dtype that the file has.
        others: {name: tensor} of what else is in the file: heads, and embeddings that PEFT put there.
        digest: the file's own, in hexadecimal.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    deltas: Mapping[str, SparseDelta]
    others: Mapping[str, Tensor]
    digest: str


def read_adapter(where: str | os.PathLike[str]) -> AdapterFiles:
    """Read and check the files of a sparse adapter.

    Args:
        where: see `find_file`.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: it is damaged, pickled, or no sparse adapter.
    """
    config = read_sparse_config(where)
    path = need_file(where, SOURCE)
    tensors = load_tensors(path)
    deltas = verify(tensors, counts=config["counts"], source=str(path))
    named = {canonical_name(key): tensor for key, tensor in tensors.items()}
    digest = stored_digest(named.pop(DIGEST_KEY), source=str(path))
    others = {name: tensor for name, tensor in named.items() if parameter_of(name) is None}
    return AdapterFiles(os.fspath(where), path.parent, config, deltas, others, digest)


def in_list(adapters: Any) -> list[Any]:
    """Adapters as a list; one that is given alone is a list of one, not of the letters of its name."""
    return [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)


def read_sparse_config(where: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of a sparse adapter, field by field, with its `counts` (None before weights are selected).

    Args:
        where: see `find_file`.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: the file is damaged, or that of another type of adapter.
    """
    config = read_config(where)
    if (kind := config.get("peft_type")) != "SPARSE_FT":
        raise FormatError(
            how_to_import(where, config)
            or f"'{os.fspath(where)}' is no sparse adapter: {CONFIG_FILE} says peft_type {kind!r}. Only adapters of "
            f"peft_type 'SPARSE_FT' say which of the model's own weights they change. {how_to_use(where, kind)}"
        )
    counts = config.setdefault("counts", None)
    is_map = isinstance(counts, dict) and all(type(count) is int and count >= 0 for count in counts.values())
    if counts is not None and not is_map:
        raise FormatError(
            f"{CONFIG_FILE} of '{os.fspath(where)}': counts must map parameter names to numbers of weights. Download "
            "or save the adapter again."
        )
    rules = {
        "modules_to_save": not isinstance(config.get("modules_to_save"), str),
        "values_dtype": config.get("values_dtype", "float32") in list(FLOAT_DTYPES),
    }
    _refuse_fields(config, rules, where)
    return config


def check_fields(config: Mapping[str, Any], where: str | os.PathLike[str]) -> None:
    """Refuse values of a type that the fields cannot have which are read here of adapters of any type.

    Args:
        config: the content of adapter_config.json.
        where: the folder or id that was given, for the message.

    Raises:
        FormatError: there is one.
    """
    modules, mapping = config.get("modules_to_save"), config.get("auto_mapping")
    rules = {name: isinstance(config.get(name), (str, type(None))) for name in _TEXTS}
    rules["modules_to_save"] = isinstance(modules, (str, type(None))) or (
        isinstance(modules, list) and all(type(one) is str for one in modules)
    )
    rules["auto_mapping"] = mapping is None or (
        isinstance(mapping, dict) and all(type(mapping.get(key, "")) is str for key in _MAPPED)
    )
    _refuse_fields(config, rules, where)


def _refuse_fields(config: Mapping[str, Any], rules: Mapping[str, bool], where: str | os.PathLike[str]) -> None:
    for name, holds in rules.items():
        if not holds:
            value = str(config[name])[:200]
            raise FormatError(
                f"{CONFIG_FILE} of '{os.fspath(where)}': {name} cannot be {value!r}. Download or save it again."
            )


def read_config(where: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """The configuration of an adapter of any type, field by field.

    Args:
        where, revision: see `find_file`.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: the file is damaged, or a field holds something that it cannot.
    """
    config = read_json(need_file(where, CONFIG_FILE, revision=revision))
    check_fields(config, where)
    return config


def find_file(where: str | os.PathLike[str], name: str, *, revision: str | None = None) -> Path | None:
    """A file of a saved adapter, downloaded if need be; None if there is none of that name.

    Args:
        where: a folder, or an id of the Hub, which may go on with a folder and a revision:
            "owner/name/folder@revision".
        name: the file.
        revision: branch, tag or commit on the Hub, where `where` does not say it.

    Raises:
        ConfigError: there is neither such a folder nor such a repository, or there are two revisions.
    """
    try:
        return _fetch(where, name, revision)
    except EntryNotFoundError:
        return None


def need_file(where: str | os.PathLike[str], name: str, *, revision: str | None = None) -> Path:
    """As `find_file`, but a file that is not there is an error.

    Raises:
        ConfigError: there is no such adapter, or it has no such file.
        FormatError: its weights are pickled, or it is an adapter of another library.
    """
    try:
        return _fetch(where, name, revision)
    except EntryNotFoundError as error:
        folder = Path(where).expanduser()
        if name == CONFIG_FILE and find_file(where, COMPOSABLE_SFT, revision=revision) is not None:
            raise FormatError(how_to_import(where)) from error
        if not folder.is_dir():
            raise _not_on_hub(where, name, error) from error
    if name == SOURCE and (folder / PICKLED).is_file():
        raise FormatError(
            f"'{folder}' holds {PICKLED}, a pickle, which is never opened here, since that runs the code in it. Load "
            "the adapter with PEFT and save it again."
        )
    inside = sorted(path.parent.name for path in folder.glob(f"*/{name}"))
    hint = f"It holds the adapters {inside}: name one of these folders" if inside else "Give the folder of an adapter"
    raise ConfigError(f"'{folder}' has no {name}. {hint}.")


def _fetch(where: str | os.PathLike[str], name: str, revision: str | None) -> Path:
    """A file of a saved adapter; EntryNotFoundError if there is none of that name."""
    path, given = Path(where).expanduser(), os.fspath(where)
    if path.is_dir():
        return fetch(path, name)
    if path.exists():
        raise ConfigError(f"'{given}' is a file. Give the folder that holds {CONFIG_FILE} and {SOURCE}.")
    found = _HUB_ID.fullmatch(given)
    if found is None:
        raise ConfigError(
            f"There is no folder '{given}', and it is no id of the Hub (owner/name[/folder][@revision]).{_nearby(path)}"
        )
    if found["folder"] and not found["revision"] and Path(path.parts[0]).is_dir():
        # Most likely a path with a mistake: the Hub is not asked, which takes long where it cannot be reached.
        raise ConfigError(
            f"There is no folder '{given}', though there is '{path.parts[0]}'.{_nearby(path)} If it is meant to be an "
            f"id of the Hub, name the revision: '{given}@main'."
        )
    if revision is not None and found["revision"] not in (None, revision):
        raise ConfigError(f"'{given}' names a revision, and another one is given beside it, {revision!r}. Give one.")
    revision = found["revision"] or revision
    try:
        return Path(hf_hub_download(found["repo"], name, subfolder=found["folder"], revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not _is_cached(found["repo"]):
            # The Hub cannot be reached, and was asked for long enough: no other file of it need be looked for.
            raise _not_on_hub(where, name, error) from error
        raise
    except (HfHubHTTPError, HFValidationError) as error:
        raise _not_on_hub(where, name, error) from error


def _is_cached(repo: str) -> bool:
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model")).is_dir()


def _not_on_hub(where: str | os.PathLike[str], name: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"There is no folder '{os.fspath(where)}', and {name} of that name cannot be had from the Hub: {reason}"
        f"{_nearby(Path(where).expanduser())}"
    )


def _nearby(path: Path) -> str:
    """The sentence, behind a blank, that names a folder beside the missing one with nearly its name; else nothing."""
    try:
        return nearest(path.name, [one.name for one in path.absolute().parent.iterdir() if one.is_dir()])
    except OSError:  # no such folder either, or one that may not be listed
        return ""
