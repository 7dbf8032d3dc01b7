"""BottleneckModel: the tuner that PEFT drives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.names import unwrapped
from ...errors import ConfigError
from ..common.combining import Combined
from ..common.events import ON_INVERTIBLE, announce
from ..common.keys import gather
from ..common.made_for_file import Receipt, cast_anew
from ..common.targets import model_numel
from ..common.token_rows import widen_rows
from ..common.tuner import AdapterTuner
from . import compose
from .applying import attach_inverse
from .bake import bake, bake_inverse, output_embeddings
from .config import BottleneckConfig
from .iteration import iter_layers
from .layer import CANNOT_MERGE, BottleneckLayer
from .placement import INVERTIBLE, Site, find_sites, resolve
from .size import check_size, num_parameters
from .state import as_sharded, check_loaded, refuse_baking, refuse_new_adapter


class BottleneckModel(AdapterTuner):
    """Bottleneck adapters in a model. Several active ones stack: each works on what the ones before it made.

    Args:
        model: the base model.
        peft_config: a `BottleneckConfig`, or PEFT's dictionary of them.
        adapter_name: name of the first adapter.

    Every adapter's config is a copy of the user's, in which `target_modules`, `placement` and `invertible_module` say
    where its modules lie.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    names_in_forward = False

    # ---- injection -------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model (called by PEFT).

        All that can be refused is refused before the first module is touched; what fails later is undone.

        Raises:
            ConfigError: it is not known where the adapter goes in this model, or it cannot go there, or FSDP2 has
                sharded the model.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._attach_inverse(model)
        config = self.peft_config[adapter_name]
        if config.invertible is not None and not config.inference_mode:
            announce(ON_INVERTIBLE)

    def _plan(
        self, config: BottleneckConfig, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> Collection[str]:
        refuse_new_adapter(model, adapter_name)
        self._refuse_relatives(model)
        self._sites: dict[str, Site] = self._find_sites(config, model)
        self._detach_inverse()
        return self._sites

    def _refuse_relatives(self, model: nn.Module) -> None:
        """Refuse a model whose bottlenecks are of the other kind, a hypernetwork's or plain ones: layers hold one kind.

        Raises:
            ConfigError: they are.
        """
        for path, layer in iter_layers(model):
            if type(layer) is not self.tuner_layer_cls:
                raise ConfigError(
                    f"{path} carries the adapters {layer._all_available_adapter_names()}: plain bottleneck adapters "
                    "and MAD-G's hypernetwork have no place in one model. What the hypernetwork generates has: "
                    'model.generate_adapter("ace") of a model with the hypernetwork alone gives one more plain '
                    "adapter, and its save_pretrained(folder) makes it one to load beside the others."
                )

    def _find_sites(self, config: BottleneckConfig, model: nn.Module) -> dict[str, Site]:
        """Resolve a config, in place, and say where its adapter goes; refuses what cannot be had."""
        sites = find_sites(resolve(config, model), model)
        size, fields = self._size(config, sites)
        check_size(config, size, model_numel=model_numel(model), fields=fields)
        return sites

    def _size(self, config: BottleneckConfig, sites: dict[str, Site]) -> tuple[int, str]:
        """How many parameters the adapter is going to have, and the fields that say so."""
        return num_parameters(config, sites), "bottleneck_size, reduction_factor, invertible_reduction_factor"

    def _new_layer(self, target: nn.Module) -> BottleneckLayer:
        return BottleneckLayer(target).train(target.training)

    def release(self, layer: BottleneckLayer) -> None:
        """Take a layer's hooks out of the modules around it."""
        layer.detach_hooks()

    def _detach_inverse(self) -> None:
        # A head that is about to be copied for training must not take the hook with it.
        for _, layer in iter_layers(self.model):
            for handle in layer.hooks.pop("inverse", ()):
                handle.remove()

    def _attach_inverse(self, model: nn.Module) -> None:
        output = output_embeddings(model)
        for _, layer in iter_layers(model):
            if INVERTIBLE in layer.placements.values() and output is not None and "inverse" not in layer.hooks:
                layer.hooks["inverse"] = attach_inverse(layer, output)

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: BottleneckConfig, key: str) -> bool:
        return unwrapped(key) in self._sites

    def _tuned(
        self, config: BottleneckConfig, adapter_name: str, target: nn.Module, path: str, parent: nn.Module
    ) -> BottleneckLayer:
        layer = target if isinstance(target, BottleneckLayer) else self._new_layer(target)
        layer.update_layer(adapter_name, config, site=self._sites[path], parent=parent)
        return layer

    # ---- PEFT's hooks ----------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with cast_anew(self, self.peft_config[adapter_name], adapter_name):
            if autocast_adapter_dtype:
                widen_rows(self.model, adapter_name)
                return
            for _, layer in iter_layers(self.model):
                layer.cast(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused: a bottleneck adapter is no change of a weight. See `merge_and_unload`.

        Raises:
            ValueError: always.
        """
        raise ValueError(CANNOT_MERGE)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Build the adapters into the model for good, and give it back without PEFT.

        A bottleneck adapter has a nonlinearity and cannot be folded into a weight. So the returned model has plain
        modules (`bake.Baked`) where the adapters stood; it computes exactly what the adapted model computes.
        `torch.save` and `state_dict` carry them, `save_pretrained` writes them too, but `from_pretrained` makes the
        plain architecture, which has no place for them: share the adapter for that, or save the whole model with
        `torch.save`.

        Args:
            progressbar: PEFT's; there is nothing to wait for.
            safe_merge: refuse adapters with values that are not finite; the model is left as it was.
            adapter_names: the adapters to build in, in this order; the active ones if None. The others are dropped.

        Raises:
            ConfigError: FSDP2 has sharded the model.
        """
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _begin_unloading(
        self,
        layers: Mapping[str, BottleneckLayer],
        *,
        merge: bool,
        safe_merge: bool,
        adapter_names: list[str] | None,
    ) -> None:
        if merge:
            refuse_baking(self.model)
            if safe_merge:
                self._check_finite(layers, adapter_names)
            bake(self.model, adapter_names)
        for layer in layers.values():
            self.release(layer)

    def _end_unloading(self, model: nn.Module, layers: Mapping[str, BottleneckLayer], *, merge: bool) -> None:
        bake_inverse(model)

    @staticmethod
    def _check_finite(layers: Mapping[str, BottleneckLayer], adapter_names: list[str] | None) -> None:
        for path, layer in layers.items():
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if name in layer.adapters and not all(
                    bool(torch.isfinite(p).all()) for p in layer.adapters[name].parameters()
                ):
                    # The first words are PEFT's: its tests match them for every tuner.
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it holds NaN or "
                        f"infinite values at {path}. The model is unchanged."
                    )

    @classmethod
    def _for_file(
        cls, model: nn.Module, config: Any, adapter_name: str, own: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        gather(model, own, whole)
        return own

    @classmethod
    def _receive(
        cls, model: nn.Module, config: BottleneckConfig, adapter_name: str, state_dict: dict[str, Tensor], undo: Receipt
    ) -> dict[str, Tensor]:
        remapped = super()._receive(model, config, adapter_name, state_dict, undo)
        check_loaded(model, adapter_name, remapped, adapters=cls.tuner_layer_cls.adapter_layer_names[0])
        for _, layer in iter_layers(model):
            # A trainer that resumes may have cast the adapter; the file's values would be rounded.
            layer.keep_dtypes([adapter_name])
        return as_sharded(model, remapped)

    # ---- composition -----------------------------------------------------------------------------

    def _combine(self, adapters: list[str], weights: list[float], fields: dict[str, Any], **how: Any) -> Combined:
        return compose.combined(self, adapters, weights, fields, **how)
