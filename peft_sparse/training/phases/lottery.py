"""LT-SFT in a training loop of one's own: start the dense phase, select, start the sparse phase."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import SelectionError
from ...tuners.common.base_model import base_model_of
from ...tuners.sparse_ft.unselected import open_phase
from .dense_phase import DensePhase as DensePhase
from .dense_phase import start_dense_phase as start_dense_phase
from .targets import refuse_wrapper


def select(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Choose the weights that moved most in the open dense phase. See `DensePhase.select`."""
    return _open_phase(model, adapter_name).select()


def start_sparse_phase(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Rewind the model and go on with the selected weights alone. See `DensePhase.start_sparse_phase`.

    Raises:
        ConfigError: the model is still wrapped in DDP, DeepSpeed or FSDP.
    """
    refuse_wrapper(model)
    return _open_phase(model, adapter_name).start_sparse_phase()


def _open_phase(model: nn.Module, adapter_name: str) -> DensePhase:
    phase = open_phase(base_model_of(model))
    if not isinstance(phase, DensePhase) or phase.adapter_name != adapter_name:
        raise SelectionError(
            f"adapter {adapter_name!r} is in no dense phase. Call start_dense_phase(model, {adapter_name!r}) and train "
            "first."
        )
    return phase
