"""Saving an adapter that lives in no model: the folder appears, or changes, only once all of it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from torch import Tensor

from ..checkpoints.adapter_files import CONFIG_FILE
from ..checkpoints.card import README
from ..checkpoints.native import SOURCE
from ..files import AtomicFolder, save_tensors
from ..tuners.sparse_ft.configs.base import SparseConfig

ADAPTER = "adapter"


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
        ConfigError: see `files.AtomicFolder`.
    """
    with AtomicFolder(directory, overwrite=overwrite, what=ADAPTER, doors=(SOURCE, CONFIG_FILE)) as folder:
        if (folder.directory / README).is_file():
            shutil.copyfile(folder.directory / README, folder.staging / README)
        save_tensors(tensors, folder.staging / SOURCE, metadata={"format": "pt"})
        config.save_pretrained(os.fspath(folder.staging))
        return (folder.staging / SOURCE).stat().st_size
