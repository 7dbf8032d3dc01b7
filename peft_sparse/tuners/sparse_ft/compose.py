"""add_weighted_adapter: from adapters that stand in a model to a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper

from ...composition.combine import combine
from ...core.delta import SparseDelta
from ...errors import ConfigError
from .config import SparseConfig
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
    first: SparseConfig = tuner.peft_config[adapters[0]]
    counts = {name: delta.count for name, delta in combined.items()}
    dtypes = {tuner.peft_config[adapter].values_dtype for adapter in adapters}
    tuner.peft_config[adapter_name] = SparseConfig(
        method="fixed",
        num_weights=max(1, sum(counts.values())),
        counts=counts,
        target_modules=sorted({name.rpartition(".")[0] for name in counts}),
        modules_to_save=tuner.peft_config[head].modules_to_save if head else None,
        values_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        task_type=tuner.peft_config[head].task_type if head else first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, _, _, delta in iter_deltas(tuner, adapter_name):
        delta.set_support(combined[name].indices, combined[name].values)
    if head:
        copy_heads(tuner, head, adapter_name)
    tuner.set_requires_grad(adapter_name, requires_grad=False)


def check_names(tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Refuse adapters that are not there, a number of weights that is not theirs, and a name that is taken."""
    known = sorted(tuner.peft_config)
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown or not adapters:
        raise ConfigError(f"adapters must name adapters of this model, got {adapters}. It has {known}.")
    if len(adapters) != len(weights):
        raise ConfigError(f"weights must hold one number per adapter, got {len(weights)} for {len(adapters)} adapters.")
    if adapter_name in tuner.peft_config:
        raise ConfigError(
            f"adapter_name {adapter_name!r} is taken; this model has {known}. Delete it first, or choose another name."
        )


def choose_head(tuner: BaseTuner, adapters: list[str], head_from: str | None) -> str | None:
    """The adapter whose heads a new one gets: `head_from`, the only one that has any, or None."""
    having = [name for name in dict.fromkeys(adapters) if tuner.peft_config[name].modules_to_save]
    if head_from is not None:
        if head_from not in having:
            raise ConfigError(
                f"head_from must be one of the combined adapters that have heads ({having}), got {head_from!r}."
            )
        return head_from
    if len(having) > 1:
        raise ConfigError(
            f"the adapters {having} all have heads (modules_to_save): say whose to keep with head_from=..."
        )
    return having[0] if having else None


def copy_heads(tuner: BaseTuner, source: str, target: str) -> None:
    """Give one adapter the heads of another."""
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
