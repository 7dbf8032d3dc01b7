"""What growth criteria that also look at the weights multiply the sizes of gradients by (SpIEL-AG)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.sharded import is_sharded
from ...errors import ConfigError
from ...selection.criteria import Criterion, GradientMeans
from ...tuners.sparse_ft.layers.base import SparseLayer


@dataclass(frozen=True)
class GrowthFactors:
    """What a criterion multiplies the size of a gradient by, at every position of one tensor.

    Args:
        layer: the tuned layer.
        which: "weight" or "bias".
        criterion: whose scores are proportional to the size of the mean gradient.
    """

    layer: SparseLayer
    which: str
    criterion: Criterion

    def __call__(self) -> Tensor:
        """[numel] float32, from the pretrained tensor as it is now.

        Raises:
            ConfigError: this process holds only a part of it.
        """
        weight = self.layer.base_tensor(self.which)
        if weight is None or is_sharded(weight):
            raise ConfigError(
                "grow_by looks at the base weights, and this process holds only a part of them. Use "
                "grow_by='gradient', or DDP."
            )
        weight = weight.detach()
        ones = torch.ones(weight.shape, dtype=torch.float32, device=weight.device)
        return self.criterion.score(weight, GradientMeans(ones, None, 1)).float().reshape(-1)
