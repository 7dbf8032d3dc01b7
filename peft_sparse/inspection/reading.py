"""Adapters to look at: out of a folder, the Hub or a model. The base model is not read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints import adapter_files
from ..checkpoints.native import SOURCE
from ..core.delta import SparseDelta
from ..errors import ConfigError
from ..tuners.common.adapter_config import config_of
from ..tuners.sparse_ft.configs.base import SPARSE_FT
from ..tuners.sparse_ft.iteration import iter_deltas


@dataclass(frozen=True)
class Head:
    """A tensor that an adapter file holds whole, such as a classifier (`modules_to_save`).

    Attributes:
        name: its name in the base model.
        shape: its shape.
        dtype: as torch spells it ("float32").
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
        FormatError: it is damaged, pickled, or no sparse adapter.
    """
    files = adapter_files.read_adapter(where)
    return Adapter(
        name=name or os.path.basename(os.path.normpath(where)),
        source=files.source,
        config=files.config,
        deltas=files.deltas,
        heads=tuple(_head(name, files.others[name]) for name in sorted(files.others)),
        file_bytes=(files.folder / SOURCE).stat().st_size,
        digest=files.digest,
        folder=files.folder,
    )


def _head(name: str, tensor: Tensor) -> Head:
    return Head(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)


def read_adapters(places: Sequence[str | os.PathLike[str]]) -> list[Adapter]:
    """Read several adapters, under names that tell them apart: the last part of each place, or all of it.

    Raises:
        ConfigError: a place occurs twice; and as `read_adapter`.
        FormatError: as `read_adapter`.
    """
    places = adapter_files.in_list(places)
    whole = [os.path.normpath(place) for place in places]
    for place in whole:
        if whole.count(place) > 1:
            raise ConfigError(f"'{place}' is given more than once. Give each adapter once")
    short = [os.path.basename(place) for place in whole]
    names = [last if short.count(last) == 1 else place for last, place in zip(short, whole, strict=True)]
    return [read_adapter(place, name=name) for place, name in zip(places, names, strict=True)]


def adapter_of(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """An adapter of a model, as `read_adapter` gives that of a file.

    Args:
        model: a PeftModel, or its tuner.
        adapter_name: the adapter.

    Raises:
        ConfigError: the model has no such sparse adapter.
    """
    own = config_of(model, adapter_name, SPARSE_FT, called="a sparse adapter")
    deltas = {name: part.delta for name, _, _, part in iter_deltas(model, adapter_name)}
    config = own.to_dict()
    # To plain JSON values and back, as a file would hold them: enumerations become text.
    config = json.loads(json.dumps(config, default=lambda value: getattr(value, "value", str(value))))
    on_cpu = {name: SparseDelta(d.indices.cpu(), d.values.detach().cpu(), d.shape) for name, d in deltas.items()}
    return Adapter(name=adapter_name, source="a model", config=config, deltas=on_cpu)
