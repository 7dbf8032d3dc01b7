"""What is known of the gradients of some positions of a tensor after the updates of a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.indices import positions, union

ESTIMATE_PARTS = ("indices", "nominated", "total", "total_squared", "updates", "scale")


@dataclass
class Estimate:
    """Running sums over the updates of a window.

    Attributes:
        indices: [c] watched positions, sorted and unique: candidates, and a few active weights.
        nominated: [c] bool, which of them are candidates.
        total: [c] float32, sum of the updates' gradients.
        total_squared: [c] float32, sum of their squares.
        updates: how many updates are in the sums.
        scale: what clipping and unscaling made of the last update's gradients; states of older versions lack it.
    """

    indices: Tensor
    nominated: Tensor
    total: Tensor
    total_squared: Tensor
    updates: int = 0
    scale: float = 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of its parts, by name."""
        return {part: torch.as_tensor(getattr(self, part)).clone() for part in ESTIMATE_PARTS}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], device: torch.device) -> Estimate:
        """What `state_dict` was taken of, on a device."""
        numbers = {"updates": int(state["updates"]), "scale": float(state.get("scale", 1.0))}
        tensors = {part: state[part].to(device, copy=True) for part in ESTIMATE_PARTS if part not in numbers}
        return cls(**tensors, **numbers)

    @property
    def mean(self) -> Tensor:
        """[c] mean gradient of an update."""
        return self.total / max(1, self.updates)

    @property
    def mean_squared(self) -> Tensor:
        """[c] mean of an update's squared gradient."""
        return self.total_squared / max(1, self.updates)


def zero_estimate(nominees: Tensor, probes: Tensor) -> Estimate:
    """Sums of zero at candidates and probes, both [n] sorted positions."""
    indices = union([nominees, probes])
    zeros = torch.zeros(indices.numel(), dtype=torch.float32, device=indices.device)
    return Estimate(indices, positions(nominees, indices)[1], zeros, zeros.clone())
