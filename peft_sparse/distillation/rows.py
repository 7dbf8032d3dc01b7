"""Which rows of a model's vocabulary matrices a reduction kept, and the file beside the model that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, FormatError
from ..files import atomic_file, save_tensors

ROWS_FILE = "reduced_vocabulary.safetensors"
_KEPT = "kept"


@dataclass(frozen=True, eq=False)
class VocabularyRows:
    """Old rows and new ones.

    Attributes:
        kept: [n] int64, the old row of each new one.
        old_size: rows before.
        tensors: {parameter or buffer: dimension that counts tokens} of the reduced model.
    """

    kept: Tensor
    old_size: int
    tensors: Mapping[str, int]

    def new_rows(self) -> Tensor:
        """[old_size] int64: the new row of each old one, -1 where it went."""
        rows = torch.full((self.old_size,), -1)
        rows[self.kept] = torch.arange(len(self.kept))
        return rows

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the file into the folder of the model."""
        about = {"old_size": str(self.old_size), "tensors": json.dumps(dict(self.tensors))}
        with atomic_file(Path(directory) / ROWS_FILE) as path:
            save_tensors({_KEPT: self.kept.to(torch.int32)}, path, metadata=about)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> VocabularyRows:
        """Read the file from the folder of a model.

        Raises:
            ConfigError: there is no such file.
            FormatError: it is damaged.
        """
        path = Path(directory) / ROWS_FILE
        if not path.is_file():
            raise ConfigError(f"{directory} has no {ROWS_FILE}: it is no model whose vocabulary was reduced here.")
        try:
            with safe_open(path, framework="pt") as file:
                kept, about = file.get_tensor(_KEPT).long(), file.metadata() or {}
                rows = cls(kept, int(about["old_size"]), json.loads(about["tensors"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise FormatError(f"{path} is damaged ({error!r}). Reduce the vocabulary again.") from error
        is_ordered = kept.dim() == 1 and bool((kept >= 0).all()) and len(kept.unique()) == len(kept)
        if not is_ordered or (len(kept) and int(kept.max()) >= rows.old_size):
            raise FormatError(f"{path} is damaged: rows twice, or beyond {rows.old_size}. Reduce the vocabulary again.")
        return rows
