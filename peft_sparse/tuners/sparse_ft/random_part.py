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


class RandomPart:
    """Which weights of an adapter are drawn before its criterion chooses the rest.

    A function of the config, the shapes of the targets and the adapter's name alone, so that it is known again wherever
    the adapter trains on, and no file has to hold it.

    Args:
        config: of the adapter; most have no such part.
        parameters: the names of all that the adapter tunes, in the order of the model.
        model: the base model.
        adapter_name: the adapter.

    Attributes:
        share: of all weights that the adapter tunes.
        counts: {parameter: how many of its weights are drawn}; empty if the adapter has no such part.
    """

    def __init__(self, config: SparseConfig, parameters: Sequence[str], model: nn.Module, adapter_name: str) -> None:
        self.counts: dict[str, int] = {}
        self.share = as_decimal(getattr(config, "random_share", 0.0))
        if not self.share:
            return
        targets = targets_of(parameters)
        self._seed, self._stream = getattr(config, "seed", 0), stream_of(config, adapter_name)
        self._shapes = shapes_of(targets, dict(named_targets(model)))
        try:
            groups = plan_groups(config, targets, model)
        except ConfigError:
            if config.counts is None:
                raise
            return  # the adapter comes from a file, and was made for another model
        groups = [Group(group.name, group.members, floor(self.share * group.count)) for group in groups]
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

    def mask_of(self, name: str, indices: Tensor) -> Tensor | None:
        """[k] bool: which of a tensor's tuned weights were drawn. None where none were, or where not all that should
        have been are among them: the support is not of this config under this name.
        """
        if not self.counts.get(name):
            return None
        mask = torch.isin(indices, self.positions(name).to(indices), assume_unique=True)
        return mask if int(mask.sum()) == self.counts[name] else None
