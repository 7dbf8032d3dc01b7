"""Saving an adapter that lives in no model: the folder appears, or changes, only once all of it is written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.card import README
from ..checkpoints.native import SOURCE
from ..errors import ConfigError
from ..tuners.sparse_ft.config import SparseConfig


def check_output(directory: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a directory that holds something, unless it is to be overwritten.

    Raises:
        ConfigError: it does, or it is a file.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{directory} is a file, not a directory. Give another output directory.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ConfigError(
            f"{directory} exists and is not empty. Give another output directory, or replace the adapter in it with "
            "overwrite=True (--overwrite)."
        )


def save_adapter(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: SparseConfig, *, overwrite: bool = False
) -> int:
    """Write adapter file, config and card.

    Args:
        directory: where; files of other names that are there stay, as does what others wrote into the card.
        tensors: of `native.build`.
        config: with the counts of these tensors.
        overwrite: replace an adapter that is there.

    Returns:
        bytes of the adapter file.

    Raises:
        ConfigError: see `check_output`.
    """
    check_output(directory, overwrite=overwrite)
    target = Path(directory).resolve()
    # Where a rename reaches the directory: inside it if it is there (it may be a mount point), else beside it.
    staging = (target if target.is_dir() else target.parent) / f".{target.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    try:
        if (target / README).is_file():
            shutil.copyfile(target / README, staging / README)
        save_file(dict(tensors), staging / SOURCE, metadata={"format": "pt"})
        config.save_pretrained(os.fspath(staging))
        size = (staging / SOURCE).stat().st_size
        if target.is_dir():
            for path in staging.iterdir():
                os.replace(path, target / path.name)
        else:
            os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return size
