"""An adapter that is saved over another is there as a whole, or the other still is: whatever stops its writer.

PEFT writes the card, the weights and the config one after the other, and leaves what lies there under other names.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any

from peft import PeftModel

from ...checkpoints.adapter_files import CONFIG_FILE, PICKLED
from ...checkpoints.card import DEFAULT, README, read_card
from ...checkpoints.native import SOURCE
from ...errors import ConfigError
from ...files import AtomicFolder, told_as_os_error
from .config import WeightConfig

logger = logging.getLogger(__name__)

_MARK = "_peft_sparse_in_one_step"
# For processes that all save at once, without is_main_process.
_SECONDS_TO_WAIT = 60


def guard_saving() -> None:
    """Let `PeftModel.save_pretrained` write adapters of ours in one step; nothing changes for other types.

    Weights in the other of PEFT's two forms, which it would load in place of those that were saved, go.
    """
    if not hasattr(PeftModel.save_pretrained, _MARK):
        save = _guarded(PeftModel.save_pretrained)
        setattr(save, _MARK, True)
        PeftModel.save_pretrained = save


def _guarded(save: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save)

    @wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs)
        given.apply_defaults()
        if not all(isinstance(config, WeightConfig) for config in self.peft_config.values()):
            save(self, save_directory, *args, **kwargs)
            return
        if given.arguments["path_initial_model_for_weight_conversion"] is not None:
            # PEFT refuses it too, once it has written another config into that folder.
            raise ConfigError(
                "path_initial_model_for_weight_conversion is for LoRA that was started from the base weights (PiSSA, "
                "CorDA, OLoRA): these adapters leave them alone. Save without it; nothing was written."
            )
        folder = None
        names = list(given.arguments["selected_adapters"] or self.peft_config)
        places = [PurePosixPath() if name == DEFAULT else PurePosixPath(name) for name in names]
        if given.arguments["is_main_process"]:
            folder = _folder_for(save_directory, places)
        if folder is None:
            save(self, save_directory, *args, **kwargs)
            return
        with folder, told_as_os_error(folder.directory):
            left_alone = [
                place
                for place in {PurePosixPath(), *places}
                if not _copy_card(folder.directory / place, folder.staging / place)
            ]
            save(self, os.fspath(folder.staging), *args, **kwargs)
            for place in left_alone:
                (folder.staging / place / README).unlink(missing_ok=True)

    return save_pretrained


def _folder_for(save_directory: str | os.PathLike[str], places: Sequence[PurePosixPath]) -> AtomicFolder | None:
    """What collects the files of adapters that are saved at these places; None where another process still writes (a
    trained adapter must not be lost over it), and where PEFT is to say what is wrong.
    """
    own = {str(place / name) for place in places for name in (SOURCE, PICKLED)}
    try:
        # Made first, as by PEFT: some file systems can rename a file and no folder.
        os.makedirs(save_directory, exist_ok=True)
        return AtomicFolder(
            os.path.abspath(save_directory),
            overwrite=True,
            what="adapter",
            is_replaced=lambda name: name in own,
            doors=(PICKLED, SOURCE, CONFIG_FILE),
            wait=_SECONDS_TO_WAIT,
        )
    except (ConfigError, FileExistsError) as error:
        logger.warning("%s is not written in one step: %s", save_directory, error)
        return None


def _copy_card(folder: Path, staging: Path) -> bool:
    """Copy a card that is there, to which PEFT and the library add; returns False if they could not understand it, over
    which PEFT would save nothing.
    """
    if not (folder / README).is_file():
        return True
    if read_card(folder / README) is None:
        return False
    staging.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / README, staging / README)
    return True
