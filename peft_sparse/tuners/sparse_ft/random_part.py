"""The part of a chosen support that is drawn at random: `random_share` of `OneShotConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf, prod

import torch
from torch import Tensor, nn

from ...checks import as_decimal
from ...errors import ConfigError
from ...selection.budget import Group, draw_counts
from ...selection.random import random_indices
from ..common.targets import named_targets, targets_of
from .allocation import plan_groups, shapes_of, stream_of
from .configs.base import SparseConfig
from .configs.one_shot import OneShotConfig


class RandomPart:
    """Which weights of an adapter are drawn before its criterion chooses the rest.

    A function of the config, the shapes of the targets and the name that the adapter was made under, so that it is
    known again wherever the adapter trains on, and no file has to hold it.

    Args:
        config: of the adapter; most have no such part.
        parameters: the names of all that the adapter tunes, in the order of the model.
        model: the base model.
        adapter_name: the adapter.

    Attributes:
        counts: {parameter: how many of its weights are drawn}; empty if the adapter has no such part.

    Raises:
        ConfigError: the model has no room for what the config asks for.
    """

    def __init__(self, config: SparseConfig, parameters: Sequence[str], model: nn.Module, adapter_name: str) -> None:
        self.counts: dict[str, int] = {}
        self._adapter_name = adapter_name
        if not isinstance(config, OneShotConfig) or not config.random_share:
            return
        share, targets = as_decimal(config.random_share), targets_of(parameters)
        self._seed, self._stream = config.seed, config.drawn_for or stream_of(config, adapter_name)
        self._shapes = shapes_of(targets, dict(named_targets(model)))
        groups = [Group(g.name, g.members, floor(share * g.count)) for g in plan_groups(config, targets, model)]
        self.counts = draw_counts(groups, {name: prod(s) for name, s in self._shapes.items()}, seed=self._seed)

    def positions(self, name: str) -> Tensor:
        """[k] flat positions in a tensor, ascending, on the CPU."""
        numel = prod(self._shapes[name])
        return random_indices(numel, self.counts[name], seed=self._seed, name=f"{name} for {self._stream}")

    def left_out(self, name: str, scores: Tensor) -> Tensor:
        """A tensor's scores with those of the drawn weights at -inf, and its own left as they are."""
        if not self.counts.get(name) or not scores.is_floating_point():
            return scores
        drawn = self.positions(name).to(scores.device).long()
        return scores.reshape(-1).index_fill(0, drawn, -inf).view(scores.shape)

    def joined(self, name: str, chosen: Tensor) -> Tensor:
        """[k] ascending: what was chosen in a tensor, and what is drawn in it."""
        if not self.counts.get(name):
            return chosen
        return torch.cat([chosen, self.positions(name).to(chosen)]).sort().values

    def mask_of(self, name: str, indices: Tensor) -> Tensor:
        """[k] bool: which of a tensor's tuned weights were drawn.

        Raises:
            ConfigError: not all that were drawn are among them.
        """
        mask = torch.isin(indices, self.positions(name).to(indices), assume_unique=True)
        if int(mask.sum()) != self.counts[name]:
            raise ConfigError(
                f"adapter {self._adapter_name!r} does not tune all weights of {name} that its config draws at random, "
                "so which of them are chosen, and at what rate they train, is not known. Its values come from an "
                "adapter of another config: load that one under a name of its own, with is_trainable=True."
            )
        return mask
