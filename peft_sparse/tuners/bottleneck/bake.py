"""From a tuned model to one of plain modules, without PEFT, that computes the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .applying import apply, attach, attach_inverse
from .layer import BottleneckLayer
from .placement import INVERTIBLE


class Baked(nn.Module):
    """A module of the base model with adapters built in.

    Attributes:
        base: the module.
        adapters: its adapters, in order.
        placements: what each of them does.
    """

    def __init__(self, base: nn.Module, adapters: list[nn.Module], placements: list[str]) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList(adapters)
        self.placements = placements

    def at(self, placement: str) -> list[Any]:
        """The adapters at a placement, in order."""
        return [adapter for adapter, own in zip(self.adapters, self.placements, strict=True) if own == placement]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with what the adapters make of it."""
        return apply(self.base, self, args, kwargs)

    @property
    def weight(self) -> Tensor:
        """The base module's, for code that reads it off an embedding or a linear layer."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base module's."""
        return self.base.bias


def bake(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Put a `Baked` module in the place of every tuned layer that has one of the adapters, in place.

    What an invertible adapter undoes before the output embeddings is left to `bake_inverse`.

    Args:
        model: the base model with its tuned layers.
        adapter_names: the adapters; the active ones if None. The others are dropped.
    """
    for path, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BottleneckLayer)]:
        names = layer.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in layer.adapters]
        layer.detach_hooks()
        parent_path, _, child = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if not names:
            setattr(parent, child, layer.base_layer)
            continue
        placements = [layer.placements[name] for name in names]
        baked = Baked(layer.base_layer, [layer.built_in(name) for name in names], placements)
        baked.train(layer.training).requires_grad_(False)
        setattr(parent, child, baked)
        for placement in dict.fromkeys(placements):
            attach(baked, placement, parent)


def bake_inverse(model: nn.Module) -> None:
    """Hook the invertible adapters of a baked model into its output embeddings, once nothing else replaces these."""
    output = output_embeddings(model)
    for module in model.modules():
        if isinstance(module, Baked) and INVERTIBLE in module.placements and output is not None:
            attach_inverse(module, output)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into scores of tokens, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
