"""Merging into all plain linear layers of a model in one pass over their memory, and restoring them in one.

A merge by layers (`SparseLayer.merge`) goes twice through memory that no cache holds: what is there is read for the
checks, then it is written. Here the kernels keep and write it at once, for all layers, and it is put back if a sum is
not finite: then the slow way decides. Layers of any other kind, and models without kernels, take the slow way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.backends.native import Kernels, kernels
from .layers.active_weights import ActiveWeights
from .layers.in_place import Written, can_be_put_back
from .layers.linear import Linear, is_writable


class _Ready(NamedTuple):
    """A layer with nothing in its weight, and what is to be written there."""

    layer: Linear
    active: ActiveWeights
    names: list[str]
    values: Tensor


def ready_to_merge(layers: list[Any], adapter_names: list[str] | None) -> tuple[Callable[[], bool] | None, list[Any]]:
    """What merges adapters into the layers that allow it, and the layers that do not.

    Args:
        layers: tuner layers of any kind.
        adapter_names: the adapters; each layer's active ones if None.

    Returns:
        a function, or None if there is nothing for it to do: it returns False, and has changed nothing, if a sum is not
        finite or a layer is no longer as it was;
        the other layers.
    """
    native = kernels()
    if native is None or isinstance(adapter_names, str):
        return None, layers
    ready, others = [], []
    for layer in layers:
        found = _ready(layer, adapter_names)
        if found is None:
            others.append(layer)
        else:
            ready.append(found)
    if not ready or _overlap(found.active.weight for found in ready):
        return None, layers
    return partial(_merge, native, ready), others


def unmerge(layers: list[Any]) -> list[Any]:
    """Restore the weights of the layers that `ready_to_merge` could have merged into; returns the others."""
    native = kernels()
    mine = [] if native is None else [layer for layer in layers if _is_restorable(layer)]
    if native is None or not mine:
        return layers
    with _writing(mine):
        # Nobody else writes into a merged layer, or ends that.
        written = [layer._written.pop("weight") for layer in mine]
        native.write_back_([(w.target, w.overlay.support, w.originals, None) for w in written])
        for layer in mine:
            layer.merged_adapters.clear()
            # Its hooks stay: they do nothing now, and adapters take turns.
    done = {id(layer) for layer in mine}
    return [layer for layer in layers if id(layer) not in done]


def _merge(native: Kernels, ready: Sequence[_Ready]) -> bool:
    with _writing([found.layer for found in ready]):
        if any(found.layer._written or found.layer.merged_adapters for found in ready):
            return False
        written, pieces = [], []
        for _, active, _, values in ready:
            weight = active.weight
            kept = torch.empty(values.numel(), dtype=weight.dtype)
            written.append(Written(active.key, active.overlay, originals=kept, shape=active.shape, target=weight))
            pieces.append((weight, active.overlay.support, kept, values))
        if not native.keep_and_write_(pieces):
            native.write_back_(pieces)
            return False
        for found, made in zip(ready, written, strict=True):
            found.layer.merged_adapters.extend(found.names)
            found.layer._written["weight"] = made
            found.layer._base_state_hooks.begin()
    return True


def _ready(layer: Any, adapter_names: list[str] | None) -> _Ready | None:
    # `type`, for a subclass merges in another way.
    if type(layer) is not Linear or layer.merged_adapters or layer._written or layer.tied_parameters:
        return None
    asked = layer.active_adapters if adapter_names is None else adapter_names
    layer._base_state_hooks.keep("weight")
    active = layer.acting(layer._modules["base_layer"], asked)
    if active is None or not is_writable(active):
        return None
    values = active.total()
    if values is None:
        return None
    held = layer._modules["sparse_ft_weight"]._modules, layer._modules["sparse_ft_bias"]._modules
    return _Ready(layer, active, [name for name in asked if any(name in part for part in held)], values)


def _is_restorable(layer: Any) -> bool:
    if type(layer) is not Linear or not layer.merged_adapters or list(layer._written) != ["weight"]:
        return False
    return can_be_put_back(layer._written["weight"], layer._modules["base_layer"]._parameters.get("weight"))


def _overlap(weights: Iterable[Tensor]) -> bool:
    """Whether some memory belongs to two weights: what one layer writes, the other would keep."""
    places = sorted((weight.data_ptr(), weight.nbytes) for weight in weights)
    return any(start + size > following for (start, size), (following, _) in pairwise(places))


@contextmanager
def _writing(layers: Sequence[Linear]) -> Iterator[None]:
    """Keep other threads off the weights of all these layers."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer._writing)
        yield
