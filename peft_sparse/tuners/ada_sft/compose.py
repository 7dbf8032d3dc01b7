"""add_weighted_adapter for Ada-SFT: what adapters change, added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import ConfigError
from ..common.combining import check_names, choose_head, copy_heads, inherited
from .config import COMPOSED, AdaSftConfig
from .iteration import iter_masked

if TYPE_CHECKING:
    from .model import AdaSftModel


def add_weighted_adapter(
    tuner: AdaSftModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    *,
    combination_type: str = "linear",
    head_from: str | None = None,
) -> None:
    """Add up what adapters change into a new adapter, which is not activated and holds one difference per weight.

    Args:
        tuner: the model that holds them.
        adapters: names of the adapters to combine.
        weights: one factor per adapter, of any sign.
        adapter_name: name of the new adapter.
        combination_type: "linear": sum of weight * ((W + D) * M - W). There is no other: a product with a mask changes
            every weight, so that nothing is left for pruning and votes to work on.
        head_from: the adapter whose heads (`modules_to_save`) the new one gets; the only one that has any if None.

    Raises:
        ConfigError: an unknown or missing name, a name that is taken, another combination type, or heads in several
            adapters without `head_from`.

    Cost: one float64 tensor of the size of a weight at a time, beside the new adapter.
    """
    if combination_type != "linear":
        raise ConfigError(
            f"combination_type must be 'linear' for adapters of Ada-SFT, got {combination_type!r}. For the others make "
            "them sparse first: sparse_from_ada(model, name, density=...)"
        )
    check_names(tuner, adapters, weights, adapter_name)
    head = choose_head(tuner, adapters, head_from)
    tuned = {name for adapter in adapters for name, _, _ in iter_masked(tuner, adapter)}
    tuner.peft_config[adapter_name] = AdaSftConfig(
        phase=COMPOSED,
        target_modules=sorted(name.rpartition(".")[0] for name in tuned),
        **inherited(tuner, adapters, head),
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for _, layer, masked in iter_masked(tuner, adapter_name):
        total = torch.zeros(masked.shape, dtype=torch.float64, device=masked.trained.device)
        for adapter, weight in zip(adapters, weights, strict=True):
            for part in layer.masked([adapter]):
                total.add_(part.change(layer.original, dtype=torch.float64), alpha=weight)
        masked.trained.data.copy_(total)
    if head:
        copy_heads(tuner, head, adapter_name)
    tuner.set_requires_grad(adapter_name, requires_grad=False)
