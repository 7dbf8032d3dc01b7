"""The sum of sparse adapters: what `add_weighted_adapter` puts into a new one."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...composition.coinciding_draws import warn_of_coinciding_draws
from ...composition.combine import combine
from ...core.delta import SparseDelta
from ..common.combining import Combined
from .configs.base import SparseConfig
from .iteration import iter_deltas


def combined(
    tuner: nn.Module,
    adapters: list[str],
    weights: list[float],
    fields: dict[str, Any],
    *,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> Combined:
    """The weighted sum of the deltas of adapters, on the union of their supports. See `combine` for the arguments.

    Args:
        tuner: the model that holds them, with their configs.
        fields: of the new config.
    """
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    parts = [{name: delta.delta for name, _, _, delta in iter_deltas(tuner, adapter)} for adapter in adapters]
    warn_of_coinciding_draws(adapters, [vars(config) for config in configs], parts, weights)
    shapes = {name: delta.shape for part in parts for name, delta in part.items()}
    total = {
        name: combine(
            [part.get(name, SparseDelta.empty(shape)) for part in parts],
            weights,
            combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
        )
        for name, shape in shapes.items()
    }
    counts = {name: delta.count for name, delta in total.items()}
    dtypes = {config.values_dtype for config in configs}
    config = SparseConfig(
        method="fixed",
        num_weights=max(1, sum(counts.values())),
        counts=counts,
        target_modules=sorted({name.rpartition(".")[0] for name in counts}),
        values_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        **fields,
    )

    def write(adapter_name: str) -> None:
        for name, _, _, delta in iter_deltas(tuner, adapter_name):
            delta.set_support(total[name].indices, total[name].values)

    return Combined(config, write)
