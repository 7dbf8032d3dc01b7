"""Saving an adapter that lives in no model: the folder appears, or changes, only once all of it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from peft import PeftConfig
from torch import Tensor

from ..files import AtomicFolder, save_tensors
from .adapter_files import CONFIG_FILE
from .card import README
from .native import SOURCE

ADAPTER = "adapter"


def save_adapter(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: PeftConfig, *, overwrite: bool = False
) -> int:
    """Write adapter file, config and card.

    Args:
        directory: where; files of other names that are there stay, as does what others wrote into the card.
        tensors: contiguous, by their names in the file.
        config: of them; of a sparse adapter with their counts.
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
