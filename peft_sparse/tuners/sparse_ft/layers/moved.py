"""Layers whose base parameters a dense phase moves: the change is the adapter's own, and acts where that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....errors import ConfigError
from ...common.base_module import seen_through
from ...common.layer import PARAMETERS, WeightLayer


@dataclass(frozen=True, eq=False)
class Moved:
    """Base parameters of one layer that a dense phase trains.

    Attributes:
        adapter_name: the adapter whose phase it is.
        originals: {"weight" or "bias": where it started}, on any device.
    """

    adapter_name: str
    originals: Mapping[str, Tensor]


class MovableLayer(WeightLayer):
    """A layer that computes from where its base parameters started wherever the adapter that moved them does not act.

    So a disabled model is the base model, and another adapter acts on the base weights alone, as before the phase and
    after it.

    Attributes:
        moved: what a dense phase trains of the base layer; None outside of one.
    """

    moved: Moved | None = None

    def is_as_before(self, adapters: Sequence[str]) -> bool:
        """Whether base parameters have moved that do not count where these adapters act."""
        return self.moved is not None and (self.disable_adapters or self.moved.adapter_name not in adapters)

    def base_under(self, parameter: str, adapters: Sequence[str]) -> Tensor | None:
        """The base layer's own tensor that adapters are added to: as it is, or where it started."""
        start = self._start(parameter, adapters)
        return self.base_tensor(parameter) if start is None else start

    def holds_base(self) -> bool:
        return self.moved is None and super().holds_base()

    def untuned(self, parameter: str, adapters: Sequence[str]) -> Tensor:
        start = self._start(parameter, adapters)
        return super().untuned(parameter, adapters) if start is None else start

    def _start(self, parameter: str, adapters: Sequence[str]) -> Tensor | None:
        """Where a base parameter started, if it has moved and that does not count; else None."""
        if self.moved is None or not self.is_as_before(adapters) or parameter not in self.moved.originals:
            return None
        own = getattr(self.get_base_layer(), parameter)
        return self.moved.originals[parameter].to(device=own.device, dtype=own.dtype)

    def base_tensor(self, parameter: str) -> Tensor | None:
        """The base layer's own tensor as it is, without any delta."""
        raise NotImplementedError(f"{type(self).__name__} does not say what is in its base parameters")

    def effective(self, parameter: str, adapters: Sequence[str]) -> Tensor | None:
        """The tensor with its deltas in it, differentiable in both; the tensor itself where there is no delta (None if
        it has none).
        """
        return self.maker(parameter, adapters)()

    def _forward_as_before(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computes with other adapters than the one that moved its parameters, or with none."""
        base, adapters = self.get_base_layer(), [] if self.disable_adapters else self.active_adapters
        tensors = {p: self.effective(p, adapters) for p in PARAMETERS if p in base._parameters and self.has_own(p)}
        return seen_through(base, tensors).forward(x, *args, **kwargs)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if self.moved is not None:
            raise ConfigError(
                f"adapter_names cannot be given while a dense phase of adapter {self.moved.adapter_name!r} is open: "
                "its weights are in the base model, which all examples share. Compute the examples one adapter at a "
                "time (model.set_adapter, model.disable_adapter), or end the phase."
            )
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
