"""Base class of the tuners whose adapters change weights: merging, unmerging and unloading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from torch import nn

from ..._peft_bridge import BaseTunerLayer
from .adapter_names import known_list
from .base_model import iter_tuned
from .broken_ties import forget_broken_ties
from .events import ON_MERGE, announce
from .removal import train_as_before
from .stacked_heads import check_heads_of_merged
from .target_checks import refuse_stacked_types
from .tuner import AdapterTuner


class WeightTuner(AdapterTuner):
    """Base class of tuners whose layers are `WeightLayer`s, and whose configs are copies of the user's."""

    # Paths of the modules that the adapter being added targets.
    _targets: Collection[str]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # The targets are known; PEFT needs some value to iterate over and to name in its errors.
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self._targets)
        return peft_config

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights until `unmerge_adapter`, which restores them bit for bit.

        Args:
            adapter_names: the adapters to merge; the active ones if None.
            safe_merge: refuse values that are not finite, before any layer is touched. Finite ones that would become
                infinite in the base weights' dtype are always refused.

        Raises:
            ConfigError: a layer of another adapter type is around one of these.
        """
        adapter_names = known_list(adapter_names, self.peft_config)
        if adapter_names is not None:
            check_heads_of_merged(self, adapter_names)
        refuse_stacked_types(self.model, self.around.of_kind(BaseTunerLayer))
        # Not of those that were loaded to be used: trainers are slow to import.
        chosen = self.active_adapters if adapter_names is None else adapter_names
        if not all(self.peft_config[name].inference_mode for name in chosen):
            announce(ON_MERGE)
        layers = self._layers_without_offloading()
        if layers is None:
            with self._checked(self.tuned_layers(), adapter_names, safe_merge=safe_merge):
                super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
            return
        merge, others = self._ready_to_merge(layers, adapter_names)
        with self._checked(others, adapter_names, safe_merge=safe_merge):
            if merge is None or merge():
                self._merge_layers(others, adapter_names, safe_merge=safe_merge)
                return
        with self._checked(layers, adapter_names, safe_merge=safe_merge):
            self._merge_layers(layers, adapter_names, safe_merge=safe_merge)

    def _merge_layers(self, layers: list[Any], adapter_names: list[str] | None, *, safe_merge: bool) -> None:
        for layer in layers:
            names = adapter_names
            if names is not None and not isinstance(layer, self.tuner_layer_cls):
                # PEFT's layers of trained tokens know no adapter that has none.
                names = [name for name in names if name in layer._all_available_adapter_names()]
            layer.merge(adapter_names=names, safe_merge=safe_merge)

    @contextmanager
    def _checked(self, layers: Sequence[Any], adapter_names: list[str] | None, *, safe_merge: bool) -> Iterator[None]:
        """Refuse what cannot be merged into these layers, of any tuner; the merge finds what ours read for that."""
        ours = [layer for layer in layers if isinstance(layer, self.tuner_layer_cls)]
        try:
            for layer in ours:
                layer.keep_entries(True)
            self._check_merged(adapter_names, safe_merge=safe_merge, layers=ours)
            if ours:
                self._check_merge_allowed()
            yield
        finally:
            for layer in ours:
                layer.keep_entries(False)

    def _ready_to_merge(
        self, layers: list[Any], adapter_names: list[str] | None
    ) -> tuple[Callable[[], bool] | None, list[Any]]:
        """(a function that merges into some of the layers in one pass, None if there is none; the other layers).

        The function changes nothing and returns False where it would have to refuse, or to look closer.
        """
        return None, layers

    def unmerge_adapter(self) -> None:
        """Restore the base weights bit for bit."""
        layers = self._layers_without_offloading()
        if layers is None:
            super().unmerge_adapter()
            return
        self.unmerge_layers(layers)

    def _layers_without_offloading(self) -> list[Any] | None:
        """The layers of all tuners; None if accelerate keeps weights elsewhere, for which PEFT walks every layer."""
        around = self.around
        if any("_hf_hook" in vars(module) for module in around.modules):
            return None
        return list(around.of_kind(BaseTunerLayer))

    def _check_merged(
        self, adapter_names: list[str] | None, *, safe_merge: bool, layers: Sequence[Any] | None = None
    ) -> None:
        for layer in self.tuned_layers() if layers is None else layers:
            check = layer.check_finite if safe_merge else layer.check_range
            check(adapter_names if adapter_names is not None else layer.active_adapters)

    def _check_merge_allowed(self) -> None:
        # Called by PEFT before the first layer is merged. Its own version warns about tied embeddings; here merging
        # unties them.
        for name, layer in iter_tuned(self.model, self.tuner_layer_cls):
            layer.refuse_parts(layer.active_adapters, name)

    def _begin_unloading(
        self, layers: Mapping[str, Any], *, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        if merge:
            self._check_merge_allowed()
            self._check_merged(adapter_names, safe_merge=safe_merge)
            return
        # Whatever is merged or written comes out of the base weights.
        for layer in layers.values():
            layer.merged_adapters.clear()
            layer.restore()
        for layer in self.around.of_kind(BaseTunerLayer):
            if layer.merged:  # PEFT's, of trained tokens
                layer.unmerge()

    def _end_unloading(self, model: nn.Module, layers: Mapping[str, Any], *, merge: bool) -> None:
        for layer in layers.values():
            layer._base_state_hooks.end()
        if merge:
            forget_broken_ties(model)
        train_as_before(model)
