"""The two phases of Ada-SFT: first the masks, then the weights under them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import ConfigError, FormatError, SelectionError
from ...files import write_atomically
from ...tuners.ada_sft.config import ADA_SFT, MASK, WEIGHTS, AdaSftConfig
from ...tuners.ada_sft.iteration import iter_masked
from ...tuners.common.adapter_config import config_of
from ...tuners.common.base_model import base_model_of
from ...tuners.sparse_ft.unselected import set_open_phase
from ..trainer.completeness import naming
from ..trainer.stored_adapters import load_adapters
from .phase import Phase, first_phase
from .targets import refuse_wrapper

logger = logging.getLogger(__name__)

FILE_NAME = "mask_phase.json"


def start_weight_phase(model: nn.Module, adapter_name: str = "default") -> int:
    """Fix an adapter's masks as they are, and let the weights under them train from the pretrained ones.

    Call it between two runs of your own; `SparseTrainer` does so itself. Make a new optimizer: what the old one
    holds is frozen now. Heads (`modules_to_save`) go on from where the first phase left them: the masks were learnt
    together with them, and the paper says nothing of starting anew.

        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0))
        start_weight_phase(model)
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0))

    Args:
        model: whatever carries the adapter. Not wrapped: DDP is made anew for each phase, after its start.
        adapter_name: the adapter, in its first phase.

    Returns:
        how many weights train now.

    Raises:
        ConfigError: the adapter is none of Ada-SFT's, is past its first phase, or is merged; or the model is wrapped.
        SelectionError: a score of a mask is NaN or infinite. The adapter is as it was.

    Cost: float32 zeros of the size of the masked weights.
    Source: Sharma and Chauhan, section 3.4: "the final learned mask is fixed and applied to the pre-trained model again
        while fine-tuning the parameters".
    """
    refuse_wrapper(model)
    config = _config_of(model, adapter_name)
    held = list(iter_masked(model, adapter_name))
    _check_first_phase(adapter_name, config)
    for name, layer, _ in held:
        if layer.merged:
            raise ConfigError(
                f"adapters {layer.merged_adapters} are merged into {name}: model.unmerge_adapter() first."
            )
    for name, _, masked in held:
        if not bool(torch.isfinite(masked.trained).all()):
            raise SelectionError(
                f"the mask phase diverged: the scores of {name} hold NaN or infinite values, so they mask nothing. "
                "Lower its learning rate, or clip gradients."
            )
    for _, _, masked in held:
        masked.enter(WEIGHTS)
    config.phase = WEIGHTS
    count = sum(masked.numel for _, _, masked in held)
    logger.info("adapter %r: masks are fixed, %d weights under them train", adapter_name, count)
    return count


def is_in_mask_phase(model: Any, adapter_name: str) -> bool:
    """Whether an adapter is one of Ada-SFT whose masks are there to be trained."""
    config = model.peft_config.get(adapter_name)
    return (
        isinstance(config, AdaSftConfig)
        and config.phase == MASK
        and any(masked.trained.requires_grad for _, _, masked in iter_masked(model, adapter_name))
    )


@first_phase
class MaskPhase(Phase):
    """The first phase of Ada-SFT as a trainer goes through it: what `DensePhase` is to LT-SFT.

    Nothing of the base model moves in it, so that there is nothing to take back: leaving it after an exception leaves
    the masks as they were learnt so far.

    Args:
        model: the model, with the adapter in its first phase.
        adapter_name: the adapter.
    """

    name: ClassVar = MASK
    next_name: ClassVar = WEIGHTS
    args_name: ClassVar = "mask_args"
    folder: ClassVar = "_mask"
    file_name: ClassVar = FILE_NAME

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        _check_first_phase(adapter_name, _config_of(model, adapter_name))
        self.model = model
        self.adapter_name = adapter_name
        self._root = base_model_of(model)

    @classmethod
    def is_before(cls, model: Any, adapter_name: str) -> bool:
        """Not where the masks are frozen, as in an adapter that was loaded to be used."""
        return is_in_mask_phase(model, adapter_name)

    @classmethod
    def begin(cls, trainer: Any, adapter_name: str) -> MaskPhase:
        """The phase on the trainer's model."""
        return cls(trainer.model, adapter_name)

    @property
    def numel(self) -> int:
        """How many weights are masked."""
        return sum(masked.numel for _, _, masked in iter_masked(self.model, self.adapter_name))

    def select(self) -> None:
        """Fix the masks, and start the second phase."""
        start_weight_phase(self.model, self.adapter_name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Mark a checkpoint, which holds the adapter already, as one of this phase."""
        write_atomically(Path(directory, FILE_NAME), json.dumps({"adapter": self.adapter_name}).encode())

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Take the masks and heads of a checkpoint."""
        _check_checkpoint(self, directory)
        load_adapters(self.model, os.fspath(directory), [self.adapter_name])

    def __enter__(self) -> MaskPhase:
        set_open_phase(self._root, self)
        return self

    def __exit__(self, *error: object) -> None:
        set_open_phase(self._root, None)


def _check_checkpoint(phase: MaskPhase, directory: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is none of this phase of this adapter.

    Raises:
        FormatError: it is of another adapter, or of another kind.
    """
    path = Path(directory, FILE_NAME)
    with naming(str(path)):
        found = json.loads(path.read_text(encoding="utf-8")).get("adapter") if path.is_file() else None
    if found != phase.adapter_name:
        raise FormatError(
            f"{path} must name the adapter {phase.adapter_name!r}, found {found!r}. Resume with the model and the "
            "config that the run was started with."
        )


def _config_of(model: nn.Module, adapter_name: str) -> AdaSftConfig:
    way_out = "get_peft_model(model, AdaSftConfig(...)) makes one."
    return config_of(model, adapter_name, ADA_SFT, called="an adapter of Ada-SFT", way_out=way_out)


def _check_first_phase(adapter_name: str, config: AdaSftConfig) -> None:
    if config.phase != MASK:
        what = "is a sum of others, without masks" if config.phase != WEIGHTS else "has its masks fixed already"
        raise ConfigError(
            f"adapter {adapter_name!r} {what} (phase={config.phase!r}). Train it as it is, or learn new masks in a new "
            "adapter: model.add_adapter(name, AdaSftConfig(...))"
        )
