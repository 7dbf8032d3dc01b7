"""Tensors that several modules share: found before they are tuned, and let go where merging broke the tie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .embedding import Embedding
from .iteration import iter_deltas
from .layer import SparseLayer
from .packed import own_parameters
from .targets import named_targets


def mark_tied(model: nn.Module, adapter_name: str, active_adapters: Sequence[str]) -> None:
    """Tell layers which of an adapter's tensors other modules share.

    Embeddings that look up in the same matrix as a tuned one (T5's and BART's encoder and decoder) follow it.

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
            _add_followers(model, layer, [name for name, m in sharing if isinstance(m, nn.Embedding)], active_adapters)


def _add_followers(model: nn.Module, leader: Embedding, names: list[str], active_adapters: Sequence[str]) -> None:
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, SparseLayer):
            continue
        follower = Embedding(module, leader=leader)
        follower.set_adapter(list(active_adapters))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, follower)


def forget_broken_ties(model: nn.Module) -> None:
    """Make a merged model save and reload as it is, where merging gave tied tensors different contents."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if not ties:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    broken = [k for k, v in ties.items() if k in parameters and v in parameters and parameters[k] is not parameters[v]]
    for key in broken:
        del ties[key]
