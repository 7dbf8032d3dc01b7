"""Which typological features a hypernetwork makes use of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.sharded import whole
from .generator import SiteGenerator

# Rows of W that are converted to float64 at a time.
_CHUNK = 65536


@dataclass(frozen=True)
class FeatureImportance:
    """Norms of the columns of W V: by how much the generated weights move when a feature is switched on.

    Attributes:
        features: the names of the F features.
        sites: paths of the n_b sites in the base model.
        by_site: norms over the weights generated for each site: float64 [n_b, F]. With layer embeddings all sites
            are alike, for one W serves them all.
        total: norms over all generated weights: float64 [F].
    """

    features: list[str]
    sites: list[str]
    by_site: Tensor
    total: Tensor

    def top(self, count: int | None = None) -> list[tuple[str, float]]:
        """(feature, norm over all generated weights), the largest first; all if `count` is None."""
        order = torch.argsort(self.total, descending=True, stable=True)[:count]
        return [(self.features[i], float(self.total[i])) for i in order.tolist()]


@torch.no_grad()
def feature_importance(sites: Mapping[str, SiteGenerator]) -> FeatureImportance:
    """The importance of every feature for an adapter.

    Args:
        sites: {path: generator} of the adapter.

    Cost: two passes' worth of reading W; W V itself, [2hm n_b, F], is never formed: the squared norm of its column j is
    v_j' (W' W) v_j.
    Source: thesis 3.5.4.
    """
    shared = next(site.shared for site in sites.values() if site.shared is not None)
    projection = whole(shared.language_projection).double().cpu()
    if shared.generator is not None:
        squares = _squared_norms(whole(shared.generator)[:, : len(projection)], projection)
        by_site = squares.expand(len(sites), -1)
    else:
        by_site = torch.stack([_squared_norms(whole(site.generator), projection) for site in sites.values()])
    names = list(shared.config.saved_typology["feature_names"])
    return FeatureImportance(names, list(sites), by_site.sqrt(), by_site.sum(0).sqrt())


def _squared_norms(generator: Tensor, projection: Tensor) -> Tensor:
    """Squared norms of the columns of generator @ projection: float64 [F]."""
    gram = torch.zeros(generator.shape[1], generator.shape[1], dtype=torch.float64)
    for rows in generator.split(_CHUNK):
        part = rows.double()
        gram += (part.T @ part).cpu()
    return (projection * (gram @ projection)).sum(0).clamp_min(0)
