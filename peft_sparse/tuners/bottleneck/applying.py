"""How adapters act at their placements: the same code for the tuned layer and for the plain module baked from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..common.mixed_batches import check_one_per_example
from .placement import BLOCK, INVERTIBLE, NORM, OUTPUT, PARALLEL, RESIDUAL


class Holder(Protocol):
    """What holds the adapters of a site."""

    def at(self, placement: str) -> list[Any]:
        """What acts at a placement now, in order."""


def apply(base: nn.Module, holder: Holder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a site's module with its adapters in effect; the module's own where there are none.

    Args:
        base: the module of the base model.
        holder: its adapters.
        args, kwargs: what the module was called with.

    Cost: at a "norm" site the norm is computed once more for each adapter.
    """
    at_norm = holder.at(NORM)
    if at_norm:
        residual = args[0]
        for adapter in at_norm:
            residual = residual + adapter(base(residual))
        args = (residual, *args[1:])
    output = base(*args, **kwargs)
    beside, behind, couplings = holder.at(PARALLEL), holder.at(OUTPUT), holder.at(INVERTIBLE)
    if not (beside or behind or couplings):
        return output
    hidden = output[0] if isinstance(output, tuple) else output
    for adapter in beside:
        hidden = hidden + adapter(args[0])
    hidden = add_up(hidden, behind)
    for coupling in couplings:
        hidden = coupling(hidden)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def add_up(hidden: Tensor, adapters: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """hidden + A(hidden) for one adapter after the other."""
    for adapter in adapters:
        hidden = hidden + adapter(hidden)
    return hidden


class _Hook:
    """A forward hook that reads adapters off a holder; an object, so that models with it can be copied and pickled."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder


class AdaptOutput(_Hook):
    """On the parent of a "block" site: the layer's output r becomes r + A(r)."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        adapters = self.holder.at(BLOCK)
        if not adapters:
            return None
        if isinstance(output, tuple):
            return (add_up(output[0], adapters), *output[1:])
        return add_up(output, adapters)


class AdaptResidual(_Hook):
    """On the parent of a "residual" site: its second argument x becomes x + A(x)."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        adapters = self.holder.at(RESIDUAL)
        if not adapters:
            return None
        return (args[0], args[1] + sum(adapter(args[1]) for adapter in adapters), *args[2:])


class Invert(_Hook):
    """On the output embeddings: undo the invertible adapters, the last one first."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        couplings = self.holder.at(INVERTIBLE)
        if not couplings:
            return None
        hidden = args[0]
        for coupling in reversed(couplings):
            hidden = coupling.inverse(hidden)
        return (hidden, *args[1:])


def attach(holder: Holder, placement: str, parent: nn.Module) -> list[RemovableHandle]:
    """Hook a holder into the parent of its module, where its placement acts there.

    First among the parent's hooks, so that those that record hidden states see what the adapters made of them.
    """
    if placement == BLOCK:
        return [parent.register_forward_hook(AdaptOutput(holder), prepend=True)]
    if placement == RESIDUAL:
        return [parent.register_forward_pre_hook(AdaptResidual(holder))]
    return []


def attach_inverse(holder: Holder, output_embeddings: nn.Module) -> list[RemovableHandle]:
    """Hook a holder's invertible adapters into the output embeddings."""
    return [output_embeddings.register_forward_pre_hook(Invert(holder))]


class PerExample:
    """For a mixed batch: what each example's own adapter does to it, as one adapter.

    Args:
        names: the adapter of each example; one without an adapter here stays as it is.
        adapters: {name: its adapter}.
        replaces: whether the adapters give the new values (invertible ones) or what is to be added.
    """

    def __init__(self, names: Sequence[str], adapters: dict[str, Any], *, replaces: bool) -> None:
        self.names, self.adapters, self.replaces = list(names), adapters, replaces

    def __call__(self, x: Tensor) -> Tensor:
        return self._per_example(x, x if self.replaces else torch.zeros_like(x), lambda adapter, part: adapter(part))

    def inverse(self, x: Tensor) -> Tensor:
        return self._per_example(x, x, lambda adapter, part: adapter.inverse(part))

    def _per_example(self, x: Tensor, start: Tensor, act: Callable[[Any, Tensor], Tensor]) -> Tensor:
        check_one_per_example(self.names, x)
        rows = [[i for i, other in enumerate(self.names) if other == name] for name in self.adapters]
        order = torch.tensor([i for group in rows for i in group], device=x.device)
        parts = x.index_select(0, order).split([len(group) for group in rows])
        results = [act(adapter, part) for adapter, part in zip(self.adapters.values(), parts, strict=True)]
        return start.index_copy(0, order, torch.cat(results))
