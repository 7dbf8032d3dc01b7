"""Single files: found on disk or on the Hub, read, and adapters' checked before a model is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import FormatError
from ..untrusted import UNREADABLE, check_regular
from .native import SOURCE, Verified, canonical_name, digest_of, verify

# No description of an adapter or a checkpoint comes near it: the index of the largest models takes a few megabytes.
_MAX_JSON_BYTES = 2**24


def verify_before_loading(
    model_id: str | os.PathLike[str],
    counts: Mapping[str, int] | None,
    *,
    subfolder: str | None = None,
    **download_kwargs: Any,
) -> Verified | None:
    """Check the weights that belong to a config that is being loaded.

    PEFT adds the adapter to the model before it opens the weights. Loading the config is the only moment at which a bad
    file can be refused with the model still as it was.

    Args:
        model_id: directory or Hub repository that the config was loaded from.
        counts: the config's counts; None takes the file's own.
        subfolder: folder in it.
        download_kwargs: revision, token, cache_dir and so on, for `hf_hub_download`; PEFT asks for the same file next,
            and finds it in the cache.

    Returns:
        what was found, so that `verify` need not decode it again; None if there is no such file.

    Raises:
        FormatError: the file is damaged or does not fit `counts`.
    """
    # Without such a file: a pickled adapter_model.bin, checked when its tensors are loaded; or no weights at all.
    with suppress(EntryNotFoundError):
        path = fetch(model_id, SOURCE, subfolder=subfolder, **download_kwargs)
        tensors = load_tensors(path)
        deltas = verify(tensors, counts=counts, source=str(path))
        return Verified(deltas, bytes.fromhex(digest_of(tensors, source=str(path))))
    return None


def outline_of_weights(
    model_id: str | os.PathLike[str], *, subfolder: str | None = None, **download_kwargs: Any
) -> tuple[int, frozenset[str]] | tuple[None, None]:
    """Bytes of the weights that belong to a config, and the canonical names of the tensors; None if there are none in
    safetensors.

    Args:
        model_id, subfolder, download_kwargs: as for `verify_before_loading`.

    Raises:
        FormatError: the file is no safetensors file, or it is cut off.
    """
    with suppress(EntryNotFoundError):
        path = fetch(model_id, SOURCE, subfolder=subfolder, **download_kwargs)
        check_regular(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = frozenset(canonical_name(key) for key in file.keys())  # noqa: SIM118
        except UNREADABLE as error:
            raise _unreadable(path, error) from error
        return path.stat().st_size, names
    return None, None


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an adapter file, on the CPU.

    Raises:
        FormatError: it is no safetensors file, or it is cut off.
    """
    check_regular(path)
    try:
        return load_file(path, device="cpu")
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> FormatError:
    return FormatError(
        f"{path} is not a readable safetensors file ({error}). Nothing was loaded. Download the adapter again, or "
        "save it again from the model that trained it."
    )


def fetch(root: str | os.PathLike[str], name: str, *, subfolder: str | None = None, **download_kwargs: Any) -> Path:
    """A file of a folder, or of a repository on the Hub, which is downloaded if it is not in the cache.

    Args:
        root: the folder or the repository.
        name: the file.
        subfolder: folder in it.
        download_kwargs: revision, token, cache_dir and so on, for `hf_hub_download`.

    Raises:
        EntryNotFoundError: there is none of that name, or it is not in the cache and the Hub cannot be reached.
        HfHubHTTPError, HFValidationError: the Hub has no such repository, or `root` could not be one.
    """
    folder = Path(root, subfolder or "")
    if folder.is_dir():
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"{folder} has no {name}")
        return folder / name
    return Path(hf_hub_download(os.fspath(root), name, subfolder=subfolder, **download_kwargs))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that describes an adapter or a checkpoint.

    Raises:
        FormatError: it is damaged, too large to be one, or holds something else.
    """
    check_regular(path, max_bytes=_MAX_JSON_BYTES)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise FormatError(f"{path} is not valid JSON (nested too deep). Download or save it again.") from error
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}). Download or save it again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(content).__name__}. Download or save it again.")
    return content
