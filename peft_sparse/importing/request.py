"""What is to be imported: recognised by its files, and read by the reader of its kind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import TaskType
from torch import Tensor

from ..checkpoints.adapter_files import CONFIG_FILE, PICKLED, check_fields, find_file, need_file
from ..checkpoints.files import load_tensors, read_json
from ..checkpoints.native import SOURCE
from ..errors import ConfigError, FormatError
from .base_model_check import config_of_base
from .composable_sft import DIFF_FILE, base_by_vocabulary, read_composable_sft
from .foreign import COMPOSABLE_SFT, ROSA, SPIEL, Foreign
from .labels import TASKS, published_base, published_task
from .rosa import LowRank, read_rosa
from .spiel import read_spiel
from .torch_file import TorchFile

_OF_PEFT_TYPE = {"SFT": SPIEL, "ROSA": ROSA}


class Request:
    """What is to be imported, and for which base.

    Attributes:
        source: where the adapter is, as text.
        kind: of which library.
        path: the file that says so, on this machine.
        settings: the content of its adapter_config.json, if that is it.
        base: the base model; empty until it is known.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        base: str | os.PathLike[str] | None,
        base_revision: str | None,
        revision: str | None,
        task_type: str | None,
    ) -> None:
        self.source, self.revision, self.task_type = os.fspath(where), revision, task_type
        if Path(where).expanduser().is_file() and Path(where).name == DIFF_FILE:
            where = Path(where).expanduser().parent
        self.where = where
        self._is_given = base is not None
        self.base = os.fspath(base) if base is not None else ""
        self.base_revision = base_revision
        self.settings: dict[str, Any] = {}
        self.base_config: Any = None
        self.kind, self.path = self._recognise()

    def _recognise(self) -> tuple[str, Path]:
        diff = find_file(self.where, DIFF_FILE, revision=self.revision)
        config = find_file(self.where, CONFIG_FILE, revision=self.revision)
        if diff is not None and config is not None:
            raise ConfigError(
                f"'{self.source}' holds {DIFF_FILE} and {CONFIG_FILE}, so two adapters. Put the one to import into a "
                "folder of its own."
            )
        if diff is not None:
            return COMPOSABLE_SFT, diff
        if config is None:
            if not Path(self.where).is_dir():
                need_file(self.where, CONFIG_FILE, revision=self.revision)
            raise ConfigError(
                f"'{self.source}' holds neither {DIFF_FILE} (composable-sft, BiStil) nor {CONFIG_FILE} (SpIEL's fork, "
                "RoSA). Give the folder of an adapter."
            )
        self.settings = read_json(config)
        check_fields(self.settings, self.source)
        kind = self.settings.get("peft_type")
        task_type = self.settings.get("task_type")
        if task_type is not None and task_type not in list(TaskType):
            raise FormatError(f"'{self.source}': task_type must be one of PEFT's, got {task_type!r:.100}.")
        if kind in _OF_PEFT_TYPE:
            return _OF_PEFT_TYPE[kind], config
        if kind == "SPARSE_FT":
            raise ConfigError(f"'{self.source}' is an adapter of this library already. Load it with PeftModel.")
        raise FormatError(
            f"'{self.source}' is of peft_type {kind!r}, and only {list(_OF_PEFT_TYPE)} and {DIFF_FILE} are imported. "
            "A LoRA, SHiRA or Super-Tuning adapter is made sparse by: peft-sparse diff. One of the adapters library is "
            "loaded by load_adapter_hub."
        )

    def settle_base(self, *guesses: str | None, reason: str | None = None) -> None:
        """Find out which base it is, and read its config.json if it was given, or if there is a reason."""
        self.base = self.base or next((guess for guess in guesses if guess), "")
        if not self.base:
            raise ConfigError(
                f"'{self.source}' does not say which base model it belongs to. Give it: base=... (--base), a folder "
                "or an id of the Hub."
            )
        if self._is_given or reason is not None:
            self.base_config = config_of_base(self.base, revision=self.base_revision, reason=reason)

    def tensors(self) -> tuple[dict[str, Tensor], Path]:
        """The weights beside adapter_config.json, and their file."""
        path = find_file(self.where, SOURCE, revision=self.revision)
        pickled = find_file(self.where, PICKLED, revision=self.revision)
        if path is not None and pickled is not None:
            raise ConfigError(f"'{self.source}' holds {SOURCE} and {PICKLED}. Delete the one that is not meant.")
        if pickled is not None:
            return TorchFile(pickled).tensors(), pickled
        path = path or need_file(self.where, SOURCE, revision=self.revision)
        return load_tensors(path), path


def _read_composable(request: Request) -> tuple[Foreign, None]:
    foreign = read_composable_sft(request.path, source=request.source)
    folder = os.path.abspath(request.where) if Path(request.where).is_dir() else os.fspath(request.where)
    name = os.path.basename(folder.rstrip("/").partition("@")[0])
    request.settle_base(base_by_vocabulary(foreign), published_base(name))
    task = TASKS[task][0] if (task := published_task(name)) is not None else None
    return replace(foreign, task_type=request.task_type or task or foreign.task_type), None


def _read_spiel(request: Request) -> tuple[Foreign, None]:
    tensors, path = request.tensors()
    reason = "the weights' shapes, in which the positions count, are only in the base model's config"
    request.settle_base(request.settings.get("base_model_name_or_path"), reason=reason)
    foreign = read_spiel(
        request.settings, tensors, request.base_config, base=request.base, path=path, source=request.source
    )
    return replace(foreign, task_type=request.task_type or foreign.task_type), None


def _read_rosa(request: Request) -> tuple[Foreign, LowRank | None]:
    tensors, path = request.tensors()
    request.settle_base(request.settings.get("base_model_name_or_path"))
    if request.base_config is None:
        request.base_config = config_of_base(request.base, revision=request.base_revision)
    foreign, low_rank = read_rosa(
        request.settings, tensors, request.base_config, base=request.base, path=path, source=request.source
    )
    return replace(foreign, task_type=request.task_type or foreign.task_type), low_rank


READERS = {COMPOSABLE_SFT: _read_composable, SPIEL: _read_spiel, ROSA: _read_rosa}
