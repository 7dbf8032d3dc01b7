"""Tensors that several modules share: found before they are tuned, and let go where merging broke the tie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..common.packed import own_parameters
from ..common.targets import named_targets
from .iteration import iter_deltas
from .layers.base import SparseLayer
from .layers.embedding import Embedding


def mark_tied(model: nn.Module, adapter_name: str, active_adapters: Sequence[str]) -> None:
    """Tell layers which of an adapter's tensors other modules share.

    The rule, on which merging on disk relies too: every module keeps a delta of its own. Embeddings that look up in the
    same matrix as a tuned one and have none of this adapter (T5's and BART's encoder and decoder) follow the first
    that has one, in the order of the model. Output matrices follow nothing.

    Args:
        model: the base model, its layers in place.
        adapter_name: the adapter that was just added.
        active_adapters: what followers are to be set to.
    """
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in named_targets(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, module))
    for _, layer, part, _ in list(iter_deltas(model, adapter_name)):
        sharing = holders.get(id(own_parameters(layer.get_base_layer()).get(part)), [])
        if len(sharing) < 2:
            continue
        layer.tied_parameters.add(part)
        if isinstance(layer, Embedding):
            lookups = [name for name, m in sharing if isinstance(m, nn.Embedding)]
            _add_followers(model, adapter_name, layer, lookups, active_adapters)


def _add_followers(
    model: nn.Module, adapter_name: str, leader: Embedding, names: list[str], active_adapters: Sequence[str]
) -> None:
    """Let embeddings that have no delta of this adapter, and follow none yet, follow one that has."""
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, SparseLayer):
            follower = Embedding(module)
            follower.set_adapter(list(active_adapters))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, follower)
            module = follower
        if isinstance(module, Embedding) and adapter_name not in module.deltas_of("weight"):
            module.leaders[adapter_name] = leader
            module.tied_parameters.add("weight")
