"""Adapter files on disk and on the Hub, checked before a model is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.delta import SparseDelta
from ..errors import FormatError
from .native import SOURCE, verify

_CONFIG = "adapter_config.json"


def verify_file(path: str | os.PathLike[str], *, counts: Mapping[str, int] | None = None) -> dict[str, SparseDelta]:
    """Read and check an adapter file.

    Args:
        path: the file `adapter_model.safetensors`.
        counts: tuned weights by parameter, as adapter_config.json says; None takes the file's own.

    Returns:
        the deltas by parameter name, on the CPU.

    Raises:
        FormatError: the file is damaged or does not fit `counts`.
    """
    try:
        tensors = load_file(path, device="cpu")
    except SafetensorError as error:
        raise FormatError(
            f"{path} is not a readable safetensors file ({error}). Nothing was loaded. Download the adapter again, or "
            "save it again from the model that trained it."
        ) from error
    return verify(tensors, counts=counts, source=os.fspath(path))


def verify_before_loading(
    model_id: str | os.PathLike[str],
    counts: Mapping[str, int] | None,
    *,
    subfolder: str | None = None,
    **download_kwargs: Any,
) -> None:
    """Check the weights that belong to a config that is being loaded.

    PEFT adds the adapter to the model before it opens the weights. Loading the config is the only moment at which a bad
    file can be refused with the model still as it was.

    Args:
        model_id: directory or Hub repository that the config was loaded from.
        counts: the config's counts; None takes the file's own.
        subfolder: folder in it.
        download_kwargs: revision, token, cache_dir and so on, for `hf_hub_download`; PEFT asks for the same file next,
            and finds it in the cache.

    Raises:
        FormatError: the file is damaged or does not fit `counts`.
    """
    # Without such a file: a pickled adapter_model.bin, checked when its tensors are loaded; or no weights at all.
    path = _find(model_id, SOURCE, subfolder=subfolder, **download_kwargs)
    if path is not None:
        verify_file(path, counts=counts)


def read_counts(
    model_id: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None
) -> dict[str, int]:
    """How many weights of each parameter a saved adapter tunes, without opening its weights.

    Args:
        model_id: directory or Hub repository of a sparse adapter.
        subfolder: folder in it.
        revision: of the repository.

    Raises:
        FormatError: there is no adapter_config.json, or it is not that of a sparse adapter with weights.
    """
    path = _find(model_id, _CONFIG, subfolder=subfolder, revision=revision)
    if path is None:
        raise FormatError(f"{os.fspath(model_id)} holds no {_CONFIG}: name the folder or repository of an adapter.")
    try:
        counts = json.loads(path.read_text(encoding="utf-8")).get("counts")
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path} is not the configuration of an adapter ({error}).") from error
    if not isinstance(counts, dict) or not all(type(count) is int and count >= 0 for count in counts.values()):
        raise FormatError(
            f"{path} says of no parameter how many weights are tuned (counts={counts!r}): it is not that of a sparse "
            "adapter whose weights have been selected."
        )
    return counts


def read_supports(
    model_id: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None
) -> dict[str, Tensor]:
    """Which weights a saved adapter tunes.

    Args:
        model_id, subfolder, revision: as in `read_counts`.

    Returns:
        {parameter name: [k] sorted flat indices}, on the CPU.

    Raises:
        FormatError: there are no weights, or the file is damaged.
    """
    path = _find(model_id, SOURCE, subfolder=subfolder, revision=revision)
    if path is None:
        raise FormatError(
            f"{os.fspath(model_id)} holds no {SOURCE}: name the folder or repository of a sparse adapter."
        )
    return {name: delta.indices for name, delta in verify_file(path).items()}


def _find(model_id: str | os.PathLike[str], name: str, *, subfolder: str | None, **download_kwargs: Any) -> Path | None:
    """A file of a saved adapter, in a directory or on the Hub; None if it is not there."""
    folder = Path(model_id, subfolder or "")
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(model_id), name, subfolder=subfolder, **download_kwargs))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
