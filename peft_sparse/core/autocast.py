"""What autocast would do to the operands of an operation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def _is_autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast `x` to, None if it would leave it alone (it leaves float64 alone)."""
    device_type = x.device.type
    if x.dtype == torch.float64 or not _is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off, for a backward that runs inside autocast: its products would be cast a second time."""
    return torch.autocast(device_type, enabled=False) if _is_autocast_enabled(device_type) else nullcontext()
