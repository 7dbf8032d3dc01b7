"""Writing deltas into a base parameter in place: what is in it and how to undo that, the lock, and checks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....core.overlay import Overlay
from ....core.sharded import how_sharded, is_sharded
from ....errors import ConfigError

if TYPE_CHECKING:
    from .active_weights import Snapshot

# The weights that kernels keep and write in one pass.
DTYPES = (torch.float32, torch.bfloat16)


class WriteLock:
    """The lock that is held while a layer's parameters are written into; one thread may take it several times.

    A reader that takes no lock compares `begun` before and after, and looks at `depth`, to see whether anybody wrote.

    Args:
        lock: of the layer.

    Attributes:
        begun: how often writing began.
        depth: how much of it is under way.
    """

    __slots__ = ("_lock", "begun", "depth")

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock, self.begun, self.depth = lock, 0, 0

    def __enter__(self) -> None:
        self._lock.__enter__()
        self.depth += 1
        self.begun += 1

    def __exit__(self, *exception: Any) -> None:
        self.depth -= 1
        self._lock.__exit__(*exception)


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


def can_be_put_back(written: Written, own: Tensor | None) -> bool:
    """Whether kernels can restore a parameter in whose memory this is written: it is the same and has the same size."""
    kept = written.originals
    if own is None or written.target is not own or type(own) is not nn.Parameter or kept is None:
        return False
    is_plain = own.is_cpu and kept.is_cpu and own.dtype is kept.dtype and own.dtype in DTYPES
    fits = tuple(own.shape) == written.shape and kept.numel() == written.overlay.support.numel()
    return is_plain and fits and own.is_contiguous() and kept.is_contiguous() and has_own_memory(own)


def has_own_memory(weight: Tensor) -> bool:
    """Whether a parameter is neither sharded nor managed by FSDP or DeepSpeed, and its memory is there."""
    return how_sharded(weight) is None and weight.untyped_storage().nbytes() > 0


def is_all_local(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a parameter has this shape and all of it is in this process's memory now."""
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


def written_in_copies() -> ConfigError:
    """The error for a model that `nn.DataParallel` copies while deltas are in its weights."""
    return ConfigError(
        "nn.DataParallel copies the model's weights, into which deltas are written now: by a forward of the model "
        "itself inside of resident(model), or by merge_adapter() under disable_adapter(). Leave that block, or start "
        "one process for each GPU (torchrun, accelerate launch), which is faster as well."
    )
