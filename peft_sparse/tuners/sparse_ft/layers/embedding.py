"""Sparse deltas on embeddings: only the rows of the tokens in the batch are ever formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core import lookup, ops
from ....core.traced import is_traced
from .base import SparseLayer


class Embedding(SparseLayer):
    """An embedding with a sparse delta on its matrix.

    An output matrix tied to it keeps the base weights: the delta acts on the input embedding alone, as in LT-SFT, whose
    authors untie the two by cloning (Ansell et al. 2022, arXiv:2110.07560, section 4).

    Args:
        base_layer: the embedding to tune.

    Attributes:
        leaders: {adapter: another embedding of the model that looks up in the same matrix} (the encoder's and the
            decoder's of T5 and BART): of an adapter that has no delta here, the leader's acts here too.
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer)
        # A plain dictionary keeps the leaders from being registered as this module's children.
        self.leaders: dict[str, Embedding] = {}

    def deltas_of(self, parameter: str) -> Mapping[str, nn.Module]:
        own = super().deltas_of(parameter)
        if not self.leaders:
            return own
        led = {name: leader._modules[f"sparse_ft_{parameter}"] for name, leader in self.leaders.items()}
        return {**{name: held[name] for name, held in led.items() if name in held}, **own}

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, also one that a leader has."""
        self.leaders.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        is_watched = is_traced() and any(d.observer is not None for d in self.active_deltas("weight", adapters))
        if base.weight.requires_grad or is_watched or (ops.is_recorded() and not torch.compiler.is_compiling()):
            # The dense phase under a frozen adapter: the base matrix needs its own dense gradient, and so does who
            # watches it from a compiled graph. What records or transforms what runs wants shapes that do not depend on
            # the tokens.
            result = F.embedding(x, self.effective("weight", adapters), base.padding_idx)
        else:
            deltas = self.active_deltas("weight", adapters)
            result = lookup.embedding(
                x,
                base.weight,
                [(d.values, d.indices) for d in deltas],
                padding_idx=base.padding_idx,
                observers=[d.observer for d in deltas if d.observer is not None],
            )
        scale = self._get_embed_scale()
        return result if scale is None else result * scale.to(result.dtype)
