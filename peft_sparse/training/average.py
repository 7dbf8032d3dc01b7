"""The average of an adapter over a training run, position by position, though its support changes."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from ..composition.combine import combine
from ..core.delta import SparseDelta
from ..core.sharded import whole
from ..errors import ConfigError
from ..tuners.common.adapter_config import carrier_of, config_of, refuse_transformers_verbs
from ..tuners.sparse_ft.configs.base import SPARSE_FT
from ..tuners.sparse_ft.configs.one_shot import GivenConfig
from ..tuners.sparse_ft.iteration import iter_deltas


class AdapterAverage:
    """Averages an adapter's delta (SWA, or EMA with `decay`) by the weights that its values belong to.

    What averages parameters entry by entry (`torch.optim.swa_utils.AveragedModel`, EMA callbacks) mixes values of
    different weights once SpIEL has moved some to another place. This goes by position: a weight that is not tuned at
    the time of an update counts as zero, and the average has a weight wherever the adapter ever had one.

        average = AdapterAverage(model, decay=0.999)
        for batch in loader:
            ...
            optimizer.step()
            average.update()
        average.add_to(model, "averaged")
        model.set_adapter("averaged")

    Args:
        model: a PeftModel with the adapter.
        adapter_name: the adapter.
        decay: in [0, 1), what is left of the average at each update (EMA; the first update is taken whole); None for
            equal weights (SWA).

    Attributes:
        updates: how many adapters are in the average.

    Raises:
        ConfigError: `decay` is out of range, or the model has no such adapter.

    Cost: 8 bytes (4 for the index, 4 for the value) for each weight that was ever tuned.
    Source: Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407, for SWA.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default", *, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ConfigError(f"decay must be in [0, 1), or None for equal weights, got {decay!r}.")
        config_of(model, adapter_name, SPARSE_FT, called="a sparse adapter")
        self._deltas = {name: delta for name, _, _, delta in iter_deltas(model, adapter_name)}
        self._adapter_name = adapter_name
        self._decay = decay
        self._means: dict[str, SparseDelta] = {}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the adapter as it is into the average; after an optimizer's step."""
        self.updates += 1
        share = 1 / self.updates if self._decay is None or self.updates == 1 else 1 - self._decay
        for name, delta in self._deltas.items():
            values = whole(delta.held_values).detach().float().to(delta.indices.device, copy=True)
            now = SparseDelta(delta.indices.clone(), values, delta.shape)
            mean = self._means.get(name)
            self._means[name] = now if mean is None else combine([mean, now], [1 - share, share], "linear")

    def deltas(self) -> dict[str, SparseDelta]:
        """{parameter name: the average} with float32 values."""
        return dict(self._means)

    def add_to(self, model: PeftModel, adapter_name: str) -> None:
        """Add the average to a model as a frozen adapter of its own, which is not activated.

        Args:
            model: the model, or another with the same base.
            adapter_name: name of the new adapter.

        Raises:
            ConfigError: nothing was averaged yet, or the name is taken, or transformers' own verbs gave the model its
                adapters.
        """
        refuse_transformers_verbs(model)
        model = carrier_of(model) or model
        means = {name: mean for name, mean in self._means.items() if mean.count}
        if not means:
            raise ConfigError("there is nothing to average yet: call update() after optimizer steps.")
        if adapter_name in model.peft_config:
            raise ConfigError(f"adapter_name must be a new one, got {adapter_name!r}, which the model has already.")
        support: dict[str, Tensor] = {name: mean.indices for name, mean in means.items()}
        task = model.peft_config[self._adapter_name].task_type if self._adapter_name in model.peft_config else None
        model.add_adapter(adapter_name, GivenConfig(support=support, task_type=task))
        for name, _, _, delta in iter_deltas(model, adapter_name):
            delta.set_support(means[name].indices, means[name].values)
        model.base_model.set_requires_grad(adapter_name, requires_grad=False)
