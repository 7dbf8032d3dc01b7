"""add_weighted_adapter: from adapters that stand in a model to a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...composition.chance import warn_of_coinciding_draws
from ...composition.combine import combine
from ...core.delta import SparseDelta
from ..common.combining import check_names, choose_head, copy_heads, inherited
from .configs.base import SparseConfig
from .iteration import iter_deltas

if TYPE_CHECKING:
    from .model import SparseModel


def add_weighted_adapter(
    tuner: SparseModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    *,
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
    head_from: str | None = None,
) -> None:
    """Add up adapters into a new one, which is not activated.

    Args:
        tuner: the model that holds them.
        adapters: names of the adapters to combine.
        weights: one factor per adapter, of any sign.
        adapter_name: name of the new adapter.
        combination_type: "linear" (exact on the union of the supports), "ties", "dare_linear", "dare_ties" or
            "magnitude_prune".
        density: share of each adapter's weights to keep, in (0, 1]; for all types but "linear".
        majority_sign_method: "total" or "frequency", for the "ties" types.
        head_from: the adapter whose heads (`modules_to_save`) the new one gets; the only one that has any if None.

    Raises:
        ConfigError: an unknown or missing name, a name that is taken, or heads in several adapters without `head_from`.
        ValueError: an argument that `combine` refuses.
    """
    check_names(tuner, adapters, weights, adapter_name)
    head = choose_head(tuner, adapters, head_from)
    parts = [{name: delta.delta for name, _, _, delta in iter_deltas(tuner, adapter)} for adapter in adapters]
    warn_of_coinciding_draws(adapters, [tuner.peft_config[adapter].method for adapter in adapters], parts)
    shapes = {name: delta.shape for part in parts for name, delta in part.items()}
    combined = {
        name: combine(
            [part.get(name, SparseDelta.empty(shape)) for part in parts],
            weights,
            combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
        )
        for name, shape in shapes.items()
    }
    counts = {name: delta.count for name, delta in combined.items()}
    dtypes = {tuner.peft_config[adapter].values_dtype for adapter in adapters}
    tuner.peft_config[adapter_name] = SparseConfig(
        method="fixed",
        num_weights=max(1, sum(counts.values())),
        counts=counts,
        target_modules=sorted({name.rpartition(".")[0] for name in counts}),
        values_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        **inherited(tuner, adapters, head),
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, _, _, delta in iter_deltas(tuner, adapter_name):
        delta.set_support(combined[name].indices, combined[name].values)
    if head:
        copy_heads(tuner, head, adapter_name)
    tuner.set_requires_grad(adapter_name, requires_grad=False)
