"""BottleneckModel: the tuner that PEFT drives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..common.base_model import path_in_base
from ..common.files import gather
from ..common.mixed_batches import give_names, names_by_module
from ..common.stacked_heads import delete_heads, has_several_heads, set_adapters
from ..common.targets import model_numel
from ..common.tuner import AdapterTuner as AdapterTuner
from ..common.tuner import adding
from . import compose
from .bake import bake, bake_inverse, output_embeddings
from .config import BottleneckConfig
from .layer import CANNOT_MERGE, BottleneckLayer
from .placement import INVERTIBLE, Site, find_sites, resolve
from .sites import attach_inverse
from .size import check_size, num_parameters
from .state import as_sharded, check_loaded, refuse_baking, refuse_new_adapter
from .weights import iter_layers


class BottleneckModel(AdapterTuner):
    """Bottleneck adapters in a model. Several active ones stack: each works on what the ones before it made.

    Args:
        model: the base model.
        peft_config: a `BottleneckConfig`, or PEFT's dictionary of them.
        adapter_name: name of the first adapter.

    Every adapter's config is a copy of the user's, in which `target_modules`, `placement` and `invertible_module` say
    where its modules stand.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # ---- injection -------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model (called by PEFT).

        All that can be refused is refused before the first module is touched.

        Raises:
            ConfigError: it is not known where the adapter goes in this model, or it cannot go there, or FSDP2 has
                sharded the model.
        """
        try:
            with adding(self, model, adapter_name) as config:
                refuse_new_adapter(model, adapter_name)
                self._sites: dict[str, Site] = self._find_sites(config, model)
                self._detach_inverse()
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
        finally:
            self._attach_inverse(model)

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
        return path_in_base(key) in self._sites

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_new = not isinstance(target, BottleneckLayer)
        layer = self._new_layer(target) if is_new else target
        layer.update_layer(adapter_name, peft_config, site=self._sites[path_in_base(current_key)], parent=parent)
        if is_new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight`, which a dropout or a feed-forward does not have.
        setattr(parent, child_name, new_module)

    # ---- PEFT's hooks ----------------------------------------------------------------------------

    def _check_tied_modules(self, model: nn.Module, peft_config: BottleneckConfig) -> None:
        # PEFT warns that nothing ties the adapters; an invertible adapter is undone before the tied matrix.
        return

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if not autocast_adapter_dtype:
            for _, layer in iter_layers(self.model):
                layer.cast(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; of several with heads for the same module the last one's head acts."""
        if has_several_heads(self, adapter_name):
            set_adapters(self, adapter_name, inference_mode=inference_mode)
        else:
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it alone was active, the first that is left takes over."""
        left = [name for name in self.active_adapters if name != adapter_name]
        delete_heads(self, adapter_name, left)
        super().delete_adapter(adapter_name)
        left = left or list(self.peft_config)[:1]
        # PEFT lets every layer fall back to the first adapter that it has itself: layers would end on different ones.
        if any(layer.active_adapters != left for _, layer in iter_layers(self.model)):
            self.set_adapter(left)

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

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = list(iter_layers(self.model))
        if merge:
            refuse_baking(self.model)
        if merge and safe_merge:
            self._check_finite(adapter_names)
        if merge:
            bake(self.model, adapter_names)
        for _, layer in layers:
            layer.detach_hooks()
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        bake_inverse(model)
        return model

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for path, layer in iter_layers(self.model):
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if name in layer.adapters and not all(
                    bool(torch.isfinite(p).all()) for p in layer.adapters[name].parameters()
                ):
                    # The first words are PEFT's: its tests match them for every tuner.
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it holds NaN or "
                        f"infinite values at {path}. The model is unchanged."
                    )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let every layer know `adapter_names`, one per example, for the length of one forward or generate call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        layers, handles = [], []
        for module, names in names_by_module(self, list(adapter_names), kwargs, BottleneckLayer):
            if not isinstance(module, BottleneckLayer):
                handles.append(give_names(module, names))
            elif module.disable_adapters:
                raise ValueError(
                    "adapter_names cannot be given while adapters are disabled: call enable_adapter_layers() first."
                )
            else:
                layers.append((module, names))
        try:
            for layer, names in layers:
                layer.row_names = names
            yield
        finally:
            for layer, _ in layers:
                layer.row_names = None
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: BottleneckConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        gather(model, own, state_dict)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BottleneckConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_loaded(model, adapter_name, remapped, adapters=cls.tuner_layer_cls.adapter_layer_names[0])
        for _, layer in iter_layers(model):
            # A trainer that resumes may have cast the adapter; the file's values would be rounded.
            layer.keep_dtypes([adapter_name])
        return as_sharded(model, remapped)

    # ---- composition -----------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        head_from: str | None = None,
    ) -> None:
        """Make a new adapter whose parameters are the mean of others'. See `compose.add_weighted_adapter`.

        Raises:
            ConfigError: the adapters cannot be averaged, or `combination_type` is not "linear".
        """
        if combination_type != "linear":
            raise ConfigError(
                f'combination_type must be "linear" for bottleneck adapters, got {combination_type!r}: '
                "their parameters are averaged."
            )
        compose.add_weighted_adapter(self, list(adapters), list(weights), adapter_name, head_from=head_from)
