"""Adapters to look at: out of a folder, the Hub or a model. The base model is not read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME
from safetensors import safe_open
from torch import nn

from ..checkpoints.files import verify_file
from ..checkpoints.native import DIGEST_KEY, SOURCE, canonical_name, parameter_of, stored_digest
from ..core.delta import SparseDelta
from ..errors import ConfigError, FormatError
from ..tuners.sparse_ft.config import SPARSE_FT
from ..tuners.sparse_ft.iteration import iter_deltas

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<folder>[^@]+?)/?)?(?:@(?P<revision>.+))?")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Head:
    """A tensor that an adapter file holds whole, such as a classifier (`modules_to_save`).

    Attributes:
        name: its name in the base model.
        shape: its shape.
        dtype: as safetensors spells it ("F32").
        bytes: what it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, read and checked.

    Attributes:
        name: what reports and plots call it.
        source: where it came from: a path, a Hub id, or "a model".
        config: what adapter_config.json says, field by field.
        deltas: by parameter name, on the CPU.
        heads: tensors that the file holds whole.
        file_bytes: size of the file; None for an adapter of a model.
        digest: the file's own, in hexadecimal; None for an adapter of a model.
        folder: where its files lie on this machine; None for an adapter of a model.
    """

    name: str
    source: str
    config: Mapping[str, Any]
    deltas: Mapping[str, SparseDelta]
    heads: Sequence[Head] = ()
    file_bytes: int | None = None
    digest: str | None = None
    folder: Path | None = None


def read_adapter(where: str | os.PathLike[str], *, name: str | None = None) -> Adapter:
    """Read an adapter's two files, and check them.

    Args:
        where: a folder, or a Hub id, which may go on with a folder and a revision: "owner/name/folder@revision".
        name: what to call it; the last part of `where` if None.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: it is damaged, or no sparse adapter.
    """
    config_path, weights_path = _locate(where)
    config = _read_config(config_path, where)
    deltas = verify_file(weights_path, counts=config.get("counts"))
    heads, digest = _read_rest(weights_path)
    return Adapter(
        name=name or os.path.basename(os.path.normpath(where)),
        source=os.fspath(where),
        config=config,
        deltas=deltas,
        heads=heads,
        file_bytes=weights_path.stat().st_size,
        digest=digest,
        folder=weights_path.parent,
    )


def read_adapters(places: Sequence[str | os.PathLike[str]]) -> list[Adapter]:
    """Read several adapters, under names that tell them apart: the last part of each place, or all of it.

    Raises:
        ConfigError: a place occurs twice; and as `read_adapter`.
        FormatError: as `read_adapter`.
    """
    whole = [os.path.normpath(place) for place in places]
    for place in whole:
        if whole.count(place) > 1:
            raise ConfigError(f"'{place}' is given more than once. Give each adapter once")
    short = [os.path.basename(place) for place in whole]
    names = [last if short.count(last) == 1 else place for last, place in zip(short, whole, strict=True)]
    return [read_adapter(place, name=name) for place, name in zip(places, names, strict=True)]


def adapter_of(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """An adapter that stands in a model, as `read_adapter` gives one that stands in a file.

    Args:
        model: a PeftModel, or its tuner.
        adapter_name: the adapter.

    Raises:
        ConfigError: the model has no such sparse adapter.
    """
    configs = getattr(model, "peft_config", {})
    known = [name for name, config in configs.items() if config.peft_type == SPARSE_FT]
    if adapter_name not in known:
        raise ConfigError(f"adapter_name must be that of a sparse adapter of this model, {known}, got {adapter_name!r}")
    deltas = {name: part.delta for name, _, _, part in iter_deltas(model, adapter_name)}
    config = configs[adapter_name].to_dict()
    # To plain JSON values and back, as a file would hold them: enumerations become text.
    config = json.loads(json.dumps(config, default=lambda value: getattr(value, "value", str(value))))
    on_cpu = {name: SparseDelta(d.indices.cpu(), d.values.detach().cpu(), d.shape) for name, d in deltas.items()}
    return Adapter(name=adapter_name, source="a model", config=config, deltas=on_cpu)


def _locate(where: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files of an adapter, downloaded if need be."""
    path = Path(where).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path / CONFIG_NAME, path / SOURCE
    if path.exists():
        raise ConfigError(f"'{where}' is a file. Give the folder that holds {CONFIG_NAME} and {SOURCE}")
    found = _HUB_ID.fullmatch(os.fspath(where))
    if found is None:
        raise ConfigError(f"There is no folder '{where}', and it is no id of the Hub (owner/name[/folder][@revision])")
    place = {"subfolder": found["folder"], "revision": found["revision"]}
    paths = []
    for name in (CONFIG_NAME, SOURCE):
        try:
            paths.append(Path(hf_hub_download(found["repo"], name, **place)))
        except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"There is no folder '{where}', and {name} of that name cannot be had from the Hub: {reason}"
            ) from error
    return paths[0], paths[1]


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" It holds the adapters {inside}: name one of these folders." if inside else ""
        raise ConfigError(f"'{folder}' is no adapter: it has no {CONFIG_NAME}.{hint}")
    if not (folder / SOURCE).is_file() and (folder / "adapter_model.bin").is_file():
        raise FormatError(
            f"'{folder}' holds adapter_model.bin, a pickle, which is never opened here. Save the adapter again with "
            "safe_serialization=True from the model that trained it."
        )
    if not (folder / SOURCE).is_file():
        raise ConfigError(f"'{folder}' has no {SOURCE}. Give the folder of an adapter that was saved whole")


def _read_config(path: Path, where: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}). Download or save the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != SPARSE_FT.value:
        found = f"peft_type {kind!r}" if kind else "no peft_type"
        raise FormatError(
            f"'{where}' is no sparse adapter ({CONFIG_NAME} says {found}). Only adapters of peft_type "
            f"'{SPARSE_FT.value}' say which of the model's own weights they change, so only these can be looked at."
        )
    if not isinstance(config.get("counts"), (dict, type(None))):
        raise FormatError(f"{path}: counts must map parameter names to numbers. Download or save the adapter again.")
    return config


def _read_rest(path: Path) -> tuple[tuple[Head, ...], str]:
    """What a checked file holds beside the deltas."""
    heads, digest = [], ""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            name = canonical_name(key)
            if name == DIGEST_KEY:
                digest = stored_digest(file.get_tensor(key), source=str(path))
            elif parameter_of(name) is None:
                entry = file.get_slice(key)
                shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
                heads.append(Head(name, shape, dtype, prod(shape) * _BYTES.get(dtype, 1)))
    return tuple(sorted(heads, key=lambda head: head.name)), digest
