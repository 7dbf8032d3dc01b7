"""Two rates in one support: weights that gradients chose take smaller steps than those drawn beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.sharded import own_part, sharded_like
from ..errors import ConfigError
from ..optim.step_scale import Scale, scaled_steps
from ..tuners.sparse_ft.allocation import stream_of
from ..tuners.sparse_ft.drivers import FIELD_DRIVERS, Driver
from ..tuners.sparse_ft.iteration import iter_deltas
from ..tuners.sparse_ft.layers.delta import AdapterDelta
from ..tuners.sparse_ft.random_part import RandomPart


class PartRates(Driver):
    """Scales the steps on the chosen part of an adapter by `chosen_rate`; the random part takes them whole.

    Args:
        model: the base model, with its sparse layers.
        adapter_name: the adapter.
        config: the model's copy of its config, a `OneShotConfig` with a `random_share`.

    Attributes:
        adapter_name: as given.
        deltas: {parameter name: delta} of the adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str, config: Any) -> None:
        self.adapter_name = adapter_name
        config.drawn_for = config.drawn_for or stream_of(config, adapter_name)
        self.deltas = {name: delta for name, _, _, delta in iter_deltas(model, adapter_name)}
        self._chosen_rate = config.chosen_rate
        self._drawn: RandomPart | ConfigError
        try:
            self._drawn = RandomPart(config, list(self.deltas), model, adapter_name)
        except ConfigError as error:
            if not config.inference_mode:
                raise
            self._drawn = error  # of one that is loaded to be used: it is told if it trains
        # {parameter: (support version, the scale of each weight)}
        self._found: dict[str, tuple[int, Tensor]] = {}
        scaled_steps.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        scaled_steps.add(self)

    def stop(self) -> None:
        """Leave steps alone from now on."""
        scaled_steps.discard(self)

    def scales(self, parameters: Iterable[Tensor]) -> list[tuple[Tensor, Scale]]:
        """(values, how much of a step each of them takes) of the adapter's tensors among some parameters."""
        held = {id(p) for p in parameters}
        own = {name: delta for name, delta in self.deltas.items() if id(delta.held_values) in held and delta.count}
        return [(delta.held_values, self._scale(name, delta)) for name, delta in own.items()]

    def _scale(self, name: str, delta: AdapterDelta) -> Tensor:
        version, scale = self._found.get(name, (None, None))
        if scale is None or version != delta.support_version:
            if isinstance(self._drawn, ConfigError):
                raise self._drawn
            drawn = self._drawn.mask_of(name, delta.indices)
            scale = torch.where(drawn, 1.0, self._chosen_rate).to(delta.held_values.device)
            scale = own_part(sharded_like(scale, delta.held_values))
            self._found[name] = delta.support_version, scale
        return scale


FIELD_DRIVERS["random_share"] = PartRates
