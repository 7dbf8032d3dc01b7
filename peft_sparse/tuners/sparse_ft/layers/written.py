"""What is written into a base parameter, and the parameter's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ....core.overlay import Overlay
from ....core.sharded import is_sharded
from .quick import Snapshot


@dataclass
class Written:
    """A delta that is in a base parameter right now, and what undoes it.

    Attributes:
        key: the adapters and the versions of their supports.
        overlay: where it is.
        originals: [u] the parameter's own entries there; None when the whole parameter was exchanged.
        parameter: the exchanged parameter; None when the entries were written in place.
        shape: of what was written into.
        target: the parameter that was written into in place.
        snapshot: tells whether it is up to date; None if nobody asked yet.
    """

    key: tuple[Any, ...]
    overlay: Overlay
    originals: Tensor | None = None
    parameter: nn.Parameter | None = None
    shape: tuple[int, ...] = ()
    target: Tensor | None = None
    snapshot: Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own memory, and a snapshot holds addresses.
        return {**vars(self), "snapshot": None}


def is_another(target: Tensor | None, own: Tensor) -> bool:
    return target is not None and target is not own


def is_all_there(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is in this process's memory as a whole."""
    return not is_sharded(parameter) and tuple(parameter.shape) == shape and parameter.untyped_storage().size() > 0


def flat(parameter: Tensor) -> Tensor:
    """A one-dimensional view of a parameter's memory, row-major, outside autograd."""
    data = parameter.data
    if not data.is_contiguous():
        raise ValueError(
            "a delta can only be written into a contiguous tensor, "
            f"got shape {tuple(data.shape)} with strides {data.stride()}. "
            "Make it contiguous first: module.weight.data = module.weight.data.contiguous()"
        )
    return data.view(-1)
