"""What the tuner layers of this library share: one adapter per example of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class WeightLayer(nn.Module, BaseTunerLayer):
    """Base class of tuner layers that change the parameters of the module they stand around."""

    def acts(self, adapter_name: str) -> bool:
        """Whether an adapter changes what this layer computes."""
        raise TypeError(f"{type(self).__name__} does not say which adapters act")

    def restore(self) -> None:
        """Take whatever stands in the base parameters out of them, but for merged adapters."""

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the adapters' deltas in it; `args` and `kwargs` are the base layer's own."""
        raise TypeError(f"{type(self).__name__} does not say how it computes with a delta")

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """One adapter per example of the batch; "__base__" stands for none."""
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names must name one adapter per example ({len(x)}), "
                f"got {len(adapter_names)} names: {adapter_names}"
            )
        if self.merged:
            raise ValueError("adapter_names cannot be given while adapters are merged: call unmerge_adapter() first.")
        if self.disable_adapters:
            raise ValueError(
                "adapter_names cannot be given while adapters are disabled: call enable_adapter_layers() first."
            )
        self.restore()
        result = self.base_layer(x, *args, **kwargs)
        if len(result) != len(x):
            raise ValueError(
                f"adapter_names cannot be given: {type(self.get_base_layer()).__name__} mixes the examples."
            )
        for name in dict.fromkeys(adapter_names):
            if not self.acts(name):
                continue
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)

            def part(value: Any, rows: Tensor = rows) -> Any:
                """What belongs to the rows, of a tensor with one entry per example; anything else as it is."""
                is_per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(x)
                return value[rows.to(value.device)] if is_per_example else value

            others, named = [part(value) for value in args], {key: part(value) for key, value in kwargs.items()}
            tuned = self._delta_forward([name], x[rows], *others, **named)
            result = result.index_copy(0, rows, tuned.to(result.dtype))
        return result
