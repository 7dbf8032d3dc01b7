"""A learning rate that fits the support: `fitted_rate=True` of any sparse config, in any training loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..optim.step_scale import scaled_steps
from ..selection.output_energy import step_scale
from ..tuners.sparse_ft.configs.base import SparseConfig
from ..tuners.sparse_ft.drivers import FIELD_DRIVERS, Driver, iter_drivers
from ..tuners.sparse_ft.iteration import iter_deltas
from ..tuners.sparse_ft.layers.delta import AdapterDelta
from ..tuners.sparse_ft.layers.linear import Linear
from .distributed import means_over_ranks

logger = logging.getLogger(__name__)

# Inputs are measured over so many updates; the first already scales by what it has seen.
MEASURED_UPDATES = 4
# Held while a meter takes inputs: the replicas of `nn.DataParallel` compute side by side.
_seeing = threading.Lock()


class InputMeter:
    """Sums up the squared inputs of one layer, column by column.

    Attributes:
        total: [I] float32; None before the first input.
        tokens: how many inputs are in it.
        updates: optimizer updates that were made since the first.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0
        self.updates = 0

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take the inputs [..., I] of one forward."""
        rows = x.detach().reshape(-1, x.shape[-1])
        squares = rows.float().square().sum(0)
        with _seeing:
            self.total = squares if self.total is None else self.total.to(squares.device).add_(squares)
            self.tokens += rows.shape[0]


class RateFit(Driver):
    """Scales the steps on the linear weights of one adapter by the output energy of their supports.

    The inputs of the layers are measured in the training forwards of the first `MEASURED_UPDATES` updates, padding and
    all, and kept, for a support that is replaced later. Whatever is no linear layer's weight is left alone.

    Args:
        model: the base model, with its sparse layers.
        adapter_name: the adapter.
        config: the model's copy of its config.

    Attributes:
        adapter_name: as given.
        deltas: {parameter name: delta} of its linear weights.
        energies: {parameter name: [I] mean squared input} of the tensors that were measured.
        is_restored: whether it is where `load_state_dict` put it.
    """

    def __init__(self, model: nn.Module, adapter_name: str, config: SparseConfig) -> None:
        self.adapter_name = adapter_name
        self.deltas: dict[str, AdapterDelta] = {}
        self._transposed: dict[str, bool] = {}
        for name, layer, parameter, delta in iter_deltas(model, adapter_name):
            if isinstance(layer, Linear) and parameter == "weight":
                self.deltas[name], self._transposed[name] = delta, layer.fan_in_fan_out
        self._warned = False
        self.begin()
        scaled_steps.add(self)

    def begin(self) -> None:
        """Begin to measure, and forget what was seen before: by the passes that chose the support, for example."""
        for delta in self.deltas.values():
            delta.meter = InputMeter()
        self.energies: dict[str, Tensor] = {}
        self.is_restored = False
        # {parameter name: (support version, updates measured, scale)}
        self._found: dict[str, tuple[int, int, float]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        scaled_steps.add(self)

    def stop(self) -> None:
        """Leave steps alone from now on."""
        scaled_steps.discard(self)
        for delta in self.deltas.values():
            delta.meter = None

    def scales(self, parameters: Iterable[Tensor]) -> list[tuple[Tensor, float]]:
        """(values, how much of a step to take) of the adapter's tensors among some parameters."""
        held = {id(p) for p in parameters}
        own = {name: d for name, d in self.deltas.items() if id(d.held_values) in held}
        self.is_restored &= not own
        self._measure(own)
        return [(delta.held_values, self._scale(name, delta)) for name, delta in own.items()]

    def scale_of(self, name: str) -> float:
        """How much of a step is taken on a tensor, as far as is known by now."""
        return self._scale(name, self.deltas[name])

    @property
    def has_state(self) -> bool:
        """Whether a checkpoint has anything to keep of it: it tunes the weight of some linear layer."""
        return bool(self.deltas)

    def state_dict(self) -> dict[str, Tensor]:
        """What was measured so far, by parameter name, for checkpoints, and of how many tensors."""
        state = {f"energies.{name}": energy.clone() for name, energy in self.energies.items()}
        if self.has_state:
            # A checkpoint in which nothing was measured yet is known from one that has lost its file.
            state["measured"] = torch.tensor(len(state))
        for name in self.energies:
            meter = self.deltas[name].meter
            if meter is not None and meter.total is not None:
                state[f"total.{name}"] = meter.total.clone()
                state[f"counts.{name}"] = torch.tensor([meter.tokens, meter.updates])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what was measured before; tensors that it does not know are measured anew.

        Raises:
            FormatError: an energy is not one number >= 0 for each column.
        """
        for name, delta in self.deltas.items():
            energy = state.get(f"energies.{name}")
            if energy is None:
                continue
            total, counts = state.get(f"total.{name}"), state.get(f"counts.{name}", torch.zeros(2))
            width = delta.shape[0] if self._transposed[name] else delta.shape[1]
            for key, tensor in (("energies", energy), ("total", total)):
                if tensor is not None and (tuple(tensor.shape) != (width,) or not bool((tensor >= 0).all())):
                    raise FormatError(
                        f"tensor '{key}.{name}' must hold {width} numbers >= 0, got shape {tuple(tensor.shape)}: the "
                        "checkpoint is of another adapter, or damaged."
                    )
            self.energies[name] = energy.to(delta.indices.device, copy=True)
            delta.meter = None
            if total is not None and tuple(counts.shape) == (2,):
                delta.meter = meter = InputMeter()
                meter.total, (meter.tokens, meter.updates) = total.clone(), map(int, counts)
        self._found.clear()
        self.is_restored = True

    def _measure(self, deltas: dict[str, AdapterDelta]) -> None:
        seen = {name: d.meter for name, d in deltas.items() if d.meter is not None and d.meter.total is not None}
        if not seen:
            if deltas and not self.energies and not self._warned:
                self._warned = True
                logger.warning(
                    "fitted_rate of adapter %r: no input of a tuned layer was seen before the first update, so its "
                    "steps are not scaled.",
                    self.adapter_name,
                )
            return
        means = means_over_ranks(
            [meter.total / max(1, meter.tokens) for meter in seen.values()], what=f"inputs of {self.adapter_name!r}"
        )
        for (name, meter), mean in zip(seen.items(), means, strict=True):
            self.energies[name] = mean
            meter.updates += 1
            if meter.updates >= MEASURED_UPDATES:
                deltas[name].meter = None

    def _scale(self, name: str, delta: AdapterDelta) -> float:
        if name not in self.energies:
            return 1.0
        meter = delta.meter
        key = delta.support_version, MEASURED_UPDATES if meter is None else meter.updates
        found = self._found.get(name)
        if found is None or found[:2] != key:
            scale = step_scale(self.energies[name], delta.indices, delta.shape, transposed=self._transposed[name])
            self._found[name] = found = (*key, scale)
        return found[2]


def rate_scales(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """{parameter name: how much of each step is taken} of an adapter with `fitted_rate=True`, as far as is known.

    Empty for any other adapter.
    """
    return {
        name: fit.scale_of(name)
        for fit in iter_rate_fits(model)
        if fit.adapter_name == adapter_name
        for name in fit.deltas
    }


def iter_rate_fits(model: nn.Module) -> Iterator[RateFit]:
    """What fits the rates of a model's adapters."""
    return (fit for fit in iter_drivers(model) if isinstance(fit, RateFit))


FIELD_DRIVERS["fitted_rate"] = RateFit
