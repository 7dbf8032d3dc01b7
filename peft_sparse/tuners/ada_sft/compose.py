"""The sum of Ada-SFT's adapters: what `add_weighted_adapter` puts into a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..common.combining import Combined
from .config import COMPOSED, AdaSftConfig
from .iteration import iter_masked


def combined(
    tuner: nn.Module, adapters: list[str], weights: list[float], fields: dict[str, Any], *, combination_type: str
) -> Combined:
    """What adapters change, added up: the sum of weight * ((W + D) * M - W), as one difference for each weight.

    Args:
        tuner: the model that holds them, with their configs.
        adapters, weights: the adapters, and one factor of any sign for each.
        fields: of the new config.
        combination_type: "linear". There is no other: a product with a mask changes every weight, so that nothing is
            left for pruning and votes to work on.

    Raises:
        ConfigError: another combination type.

    Cost: one float64 tensor of the size of a weight at a time, beside the new adapter.
    """
    if combination_type != "linear":
        raise ConfigError(
            f"combination_type must be 'linear' for adapters of Ada-SFT, got {combination_type!r}. For the others make "
            "them sparse first: sparse_from_ada(model, name, density=...)"
        )
    tuned = {name for adapter in adapters for name, _, _ in iter_masked(tuner, adapter)}
    targets = sorted(name.rpartition(".")[0] for name in tuned)

    def write(adapter_name: str) -> None:
        for _, layer, masked in iter_masked(tuner, adapter_name):
            total = torch.zeros(masked.shape, dtype=torch.float64, device=masked.trained.device)
            for adapter, weight in zip(adapters, weights, strict=True):
                for part in layer.masked([adapter]):
                    total.add_(part.change(layer.original, dtype=torch.float64), alpha=weight)
            masked.trained.data.copy_(total)

    return Combined(AdaSftConfig(phase=COMPOSED, target_modules=targets, **fields), write)
