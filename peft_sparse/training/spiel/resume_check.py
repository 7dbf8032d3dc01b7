"""Whether a resumed run brought back the state of the reselection together with that of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from ...errors import ConfigError
from ...tuners.sparse_ft.layers.delta import AdapterDelta


def check_resumed(adapter_name: str, optimizer: Optimizer, deltas: Iterable[AdapterDelta]) -> None:
    """Refuse to go on from a checkpoint that brought back the optimizer, and not the state of the reselection.

    To be asked at the first update that a reselection counts. Optimizers that count none themselves (SGD) tell nothing.

    Raises:
        ConfigError: the optimizer remembers earlier updates.
    """
    before = max((_updates(optimizer, delta) for delta in deltas), default=0) - 1
    if before > 0:
        raise ConfigError(
            f"the optimizer has made {before} updates of adapter {adapter_name!r} before, and its reselection knows of "
            "none: a checkpoint brought back the one and not the other. With accelerate, call "
            "accelerator.register_for_checkpointing(*iter_reselectors(model)) before save_state and before load_state; "
            "in another loop, save_training_state(model, folder) and load_training_state(model, folder). To go on "
            f"without that state: for reselector in iter_reselectors(model): reselector.skip_to({before})"
        )


def _updates(optimizer: Optimizer, delta: AdapterDelta) -> int:
    state = optimizer.state.get(delta.held_values, {})
    count = state.get("step", state.get("age", 0))
    if isinstance(count, torch.Tensor):
        return int(count.max()) if count.numel() else 0
    return int(count)
