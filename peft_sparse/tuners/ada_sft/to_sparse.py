"""From Ada-SFT to a sparse adapter: the weights that it changed most."""

from __future__ import annotations

import os

from peft import get_peft_model_state_dict
from torch import Tensor, nn

from ...checkpoints import native
from ...checkpoints.output import save_adapter
from ...core.delta import SparseDelta
from ...errors import ConfigError
from ...selection.lazy_tensors import LazyTensors
from ...selection.top_k import joint_top_k
from ..common.adapter_config import config_of
from ..common.base_model import base_model_of
from ..sparse_ft.allocation import plan_groups
from .config import ADA_SFT, AdaSftConfig
from .iteration import iter_masked
from .state import SLOT


def sparse_from_ada(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    density: float | None = None,
    budget: str | dict[str, float] | None = None,
    save_directory: str | os.PathLike[str] | None = None,
) -> dict[str, SparseDelta]:
    """The weights that an Ada-SFT adapter changed most, as a sparse delta: exactly as many as asked for.

    A model holds adapters of one type, so the sparse adapter goes to a folder, from where it loads onto the base model
    beside any other sparse one: `PeftModel.from_pretrained(base, save_directory)`. Heads go with it. Under
    `from_identity=False` the start has changed every weight already, the largest ones most, and those would be chosen.

    Args:
        model: a PeftModel that holds the adapter. It is not changed.
        adapter_name: its name; in whichever phase.
        density: share of the targeted weights to keep, in (0, 1]; the config's `density` if None.
        budget: "uniform", "global" (one joint selection over all targets) or {regex: share}; the config's if None.
        save_directory: where to save the sparse adapter ("SPARSE_FT"); None saves nothing.

    Returns:
        {parameter name: its delta}: indices of the K largest |(W + D) * M - W| (ties to the lowest), and these changes,
        float32. On the base model they give the adapted weights in these K places to the last bit of float32 or, where
        an adapted weight is less than half or more than twice the pretrained one, to that of the larger of the two.

    Raises:
        ConfigError: the adapter is none of Ada-SFT's, neither it nor the caller names a density, or the budget does not
            fit its targets.
        SelectionError: fewer weights changed than are asked for, or training diverged.

    Cost: three passes over the changes, one tensor of them in memory at a time.
    Source: Sharma and Chauhan, section 3.4 and 6, name sparser masks as the direction to go; the selection is LT-SFT's
        (Ansell et al. 2022, arXiv:2110.07560, section 3.1).
    """
    config: AdaSftConfig = config_of(model, adapter_name, ADA_SFT, called="an adapter of Ada-SFT")
    if density is None and config.density is None:
        raise ConfigError(
            f"density must be given, here or in the config of adapter {adapter_name!r}: the share of its weights to "
            "keep, in (0, 1]."
        )
    sparse = config.as_sparse(density=density, budget=budget)
    held = {name: (layer, masked) for name, layer, masked in iter_masked(model, adapter_name)}
    targets = {name.rpartition(".")[0]: ("weight",) for name in held}
    deltas: dict[str, SparseDelta] = {}
    for group in plan_groups(sparse, targets, base_model_of(model)):
        scores = LazyTensors(group.members, lambda name: held[name][1].change(held[name][0].original).abs_())
        for name, indices in joint_top_k(scores, group.count, min_score=0.0).items():
            layer, masked = held[name]
            change = masked.change(layer.original)
            deltas[name] = SparseDelta(indices, change.view(-1)[indices.long()], tuple(change.shape))
    deltas = {name: deltas[name] for name in held}
    if save_directory is not None:
        sparse.counts = {name: delta.count for name, delta in deltas.items()}
        sparse.target_modules = sorted(targets)
        sparse.inference_mode = True
        tensors = native.build(deltas, _heads(model, adapter_name))
        save_adapter(save_directory, {n: t.contiguous() for n, t in tensors.items()}, sparse, overwrite=True)
    return deltas


def _heads(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of `modules_to_save`, by name in the base model."""
    whole = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key.removeprefix(native.PREFIX): tensor for key, tensor in whole.items() if f".{SLOT}." not in key}
