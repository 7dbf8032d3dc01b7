"""Sparse deltas on embeddings: only the rows of the tokens in the batch are ever formed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...core import ops
from .layer import SparseLayer


class Embedding(nn.Module, SparseLayer):
    """An embedding with a sparse delta on its matrix.

    An output matrix tied to it keeps the base weights: the delta acts on the input embedding alone, as in LT-SFT, whose authors untie the
    two by cloning (Ansell et al. 2022, arXiv:2110.07560, section 4).
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        SparseLayer.__init__(self, base_layer)

    def _delta_forward(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        deltas = [(d.values, d.indices) for d in self.active_deltas("weight", adapters)]
        result = ops.embedding(x, base.weight, deltas, padding_idx=base.padding_idx)
        scale = self._get_embed_scale()
        return result if scale is None else result * scale.to(result.dtype)
