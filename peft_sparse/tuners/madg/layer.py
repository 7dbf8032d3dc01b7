"""The tuned layer: a bottleneck layer whose adapters are generated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ...errors import ConfigError
from ..bottleneck.layer import BottleneckLayer
from ..bottleneck.placement import Site
from .config import MadGConfig
from .generator import SharedPart, SiteGenerator
from .languages import MadGState, check_one_per_example

# The attribute that holds a layer's adapters; transformers looks for the prefix of the tuner type in it.
GENERATORS = "mad_g_generators"


class MadGLayer(BottleneckLayer):
    """Stands around the module of a site; the adapter there is generated anew in every forward.

    Attributes:
        mad_g_generators: {adapter name: `SiteGenerator`}.
        state: what all layers of the model share.
    """

    adapter_layer_names = (GENERATORS,)

    def __init__(self, base_layer: nn.Module, state: MadGState) -> None:
        super().__init__(base_layer)
        self.state = state

    def new_adapter(self, adapter_name: str, config: MadGConfig, site: Site) -> nn.Module:
        device = self._device()
        shared = self.state.shared.get(adapter_name)
        is_first = shared is None
        if is_first:
            shared = self.state.shared[adapter_name] = SharedPart(config, width=site.width, device=device)
        return SiteGenerator(
            config, shared=shared, state=self.state, owns_shared=is_first, width=site.width, device=device
        )

    def at(self, placement: str, adapters: Sequence[str] | None = None) -> list[Any]:
        """As a bottleneck layer's; in a mixed batch each example's adapter computes with that example's language."""
        found = super().at(placement, adapters)
        names = self.row_names if adapters is None else None
        current = self.state.current() if names is not None and found else ""
        if names is None or isinstance(current, str):
            return found
        check_one_per_example(current, len(names))
        (mixed,) = found
        for name, site in mixed.adapters.items():
            own = tuple(code for code, row in zip(current, names, strict=True) if row == name)
            mixed.adapters[name] = partial(site, languages=own)
        return found

    def built_in(self, adapter_name: str) -> nn.Module:
        language = self.state.current()
        if not isinstance(language, str):
            raise ConfigError(f"one language must be set to build its adapter in, got {language}.")
        return self.adapters[adapter_name].built_in(language)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.state.shared.pop(adapter_name, None)
