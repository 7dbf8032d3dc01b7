"""Whether a resumed run brought back the state of the reselection together with that of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from ...core.sharded import whole
from ...errors import ConfigError
from ...optim.sm3 import SM3
from ...tuners.sparse_ft.layers.delta import AdapterDelta


def check_resumed(adapter_name: str, optimizer: Optimizer, deltas: Iterable[AdapterDelta]) -> None:
    """Refuse to go on from a checkpoint that brought back the optimizer, and not the state of the reselection.

    To be asked at the first update that a reselection counts, with the gradients that made it still there. Optimizers
    that neither count updates nor add up gradients (SGD) tell nothing.

    Raises:
        ConfigError: the optimizer remembers earlier updates.
    """
    deltas = list(deltas)
    before = max((_updates(optimizer, delta) for delta in deltas), default=0) - 1
    if isinstance(optimizer, SM3) and any(_remembers(optimizer, delta) for delta in deltas):
        made, known = "updates", "the number of them"
    elif before > 0:
        made, known = f"{before} updates", str(before)
    else:
        return
    raise ConfigError(
        f"the optimizer has made {made} of adapter {adapter_name!r} before, and its reselection knows of none: a "
        "checkpoint brought back the one and not the other. With accelerate, call "
        "accelerator.register_for_checkpointing(*iter_reselectors(model)) before save_state and before load_state; in "
        "another loop, save_training_state(model, folder) and load_training_state(model, folder). To go on without "
        f"that state: for reselector in iter_reselectors(model): reselector.skip_to({known})"
    )


def _updates(optimizer: Optimizer, delta: AdapterDelta) -> int:
    state = optimizer.state.get(delta.held_values, {})
    count = state.get("step", state.get("age", 0))
    if isinstance(count, torch.Tensor):
        return int(count.max()) if count.numel() else 0
    return int(count)


def _remembers(optimizer: SM3, delta: AdapterDelta) -> bool:
    """Whether the accumulators hold more than the squared gradients of the update that was just made.

    SM3 counts no updates.
    """
    held = delta.held_values
    state = optimizer.state.get(held, {})
    if held.grad is None or "accumulator_0" not in state:
        return False
    covers = [state[key] for key in ("accumulator_0", "accumulator_1") if key in state]
    squares = whole(held.grad).to(covers[0]).square()
    if len(covers) == 1:
        first = [squares]
    else:
        flat = delta.indices.long().to(squares.device)
        width = covers[1].numel()
        places = flat.div(width, rounding_mode="floor"), flat % width
        first = [
            torch.zeros_like(c).scatter_reduce_(0, at, squares, "amax") for c, at in zip(covers, places, strict=True)
        ]
    # Kernels may round a square in another way.
    return any(bool((cover > 1.001 * own).any()) for cover, own in zip(covers, first, strict=True))
