"""SparseModel: the tuner that PEFT drives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._peft_bridge import _ExcludedModule, get_quantization_kwargs
from ...core.names import unwrapped
from ...errors import ConfigError
from ..common.adapter_names import known_list
from ..common.combining import Combined
from ..common.made_for_file import Receipt, cast_anew
from ..common.packed import hold_layouts, release_layouts
from ..common.target_checks import refuse_other_tuners
from ..common.targets import is_excluded, model_numel, stored_target_modules
from ..common.token_rows import widen_rows
from ..common.weight_tuner import WeightTuner
from . import compose, drivers, fused_merge, state
from .allocation import allocate, set_supports
from .configs.base import CHANCE, GIVEN, SparseConfig
from .dequantization import Dequantization
from .expected_files import is_file_expected
from .iteration import iter_deltas, iter_layers
from .layers.base import SparseLayer
from .layers.dispatch import wrapper_for
from .layers.quantized import QuantizedLinear, warn_of_loss
from .tied_tensors import mark_tied
from .unselected import Selection, is_unselected, open_phase


class SparseModel(WeightTuner):
    """Sparse deltas on the targeted parameters of a model.

    Args:
        model: the base model.
        peft_config: a `SparseConfig`, or PEFT's dictionary of them.
        adapter_name: name of the first adapter.

    Every adapter's config is a copy of the user's, in which `counts` holds the answer to the request.
    """

    prefix = "sparse_ft_"
    tuner_layer_cls = SparseLayer

    # ---- injection -------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model (called by PEFT)."""
        # TRL's DPO makes its reference adapter from the very config object of an existing adapter and copies the values
        # alone.
        requested = self.peft_config[adapter_name]
        self._source = next((n for n, c in self.peft_config.items() if c is requested and n != adapter_name), None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _plan(
        self, config: SparseConfig, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> Collection[str]:
        config.is_chosen_anew = False
        if state_dict is not None:
            config.counts = state.counts_of(state_dict)
        elif self._source is None and not is_file_expected():
            config.choose_anew()
        if config.counts is not None:
            state.leave_out_other_heads(config, model, adapter_name)
        self._planned = allocate(config, model)
        self._targets, self._counts = self._planned.targets, self._planned.counts or {}
        refuse_other_tuners(model, self._targets, SparseLayer)
        return self._targets

    def _complete(self, config: SparseConfig, model: nn.Module, adapter_name: str, requested: SparseConfig) -> None:
        planned, source = self._planned, self._source
        if requested.selected_by == GIVEN:
            config.target_modules = set(self._targets)
        else:
            config.target_modules = stored_target_modules(requested, self._targets)
        mark_tied(model, adapter_name, self.active_adapters)
        hold_layouts(model)
        deltas = {name: delta for name, _, _, delta in iter_deltas(model, adapter_name)}
        if source is not None:
            supports = {name: delta.indices for name, _, _, delta in iter_deltas(model, source)}
            for name, delta in deltas.items():
                if not delta.values.is_meta:
                    delta.set_support(supports[name])
        elif planned.counts is not None:
            config.counts = planned.counts
            is_known = planned.chosen is not None or config.selected_by == CHANCE or not config.init_weights
            if is_known and not (config.inference_mode and is_file_expected()):
                set_supports(config, deltas, planned.chosen, adapter_name=adapter_name)
        if config.l1:
            coefficient = config.l1 / model_numel(model)
            for delta in deltas.values():
                delta.penalise(coefficient)
        is_unset = not is_file_expected() and any(delta.is_unset for delta in deltas.values())
        if is_unset or is_unselected(config):
            selection = Selection(adapter_name, config, awaits_file=is_unset)
            for name, delta in deltas.items():
                delta.await_selection(selection, name)
        drivers.start(model, adapter_name, config)

    def _check_target_module_exists(self, peft_config: SparseConfig, key: str) -> Any:
        if unwrapped(key) in self._targets:
            return True
        return _ExcludedModule() if peft_config.counts is None and is_excluded(peft_config, key) else False

    def _inject_parameters(
        self, peft_config: SparseConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # `target_parameters` took part in `find_targets`; their modules are wrapped like any other.
        return [f"{name}.{parameter}" for name, parameters in self._targets.items() for parameter in parameters]

    def _tuned(
        self, config: SparseConfig, adapter_name: str, target: nn.Module, path: str, parent: nn.Module
    ) -> SparseLayer:
        counts = {p: self._counts.get(f"{path}.{p}", 0) for p in self._targets[path]}
        if isinstance(target, SparseLayer):
            layer = target
        else:
            layer = wrapper_for(target, path, quantization=get_quantization_kwargs(self.model))(target)
        dtype = getattr(torch, config.values_dtype)
        layer.update_layer(adapter_name, counts, dtype=dtype, inference_mode=config.inference_mode)
        return layer

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP would broadcast every support in every forward. All processes choose alike, so that is for nothing. It
        # looks names up from whatever it wraps: the PeftModel, or the tuner.
        names = [name for name, _ in self.model.named_buffers() if "sparse_ft_" in name]
        return [prefix + name for name in names for prefix in ("base_model.model.", "model.")]

    # ---- PEFT's hooks ----------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        dtype = getattr(torch, self.peft_config[adapter_name].values_dtype)
        with cast_anew(self, self.peft_config[adapter_name], adapter_name):
            for _, _, _, delta in iter_deltas(self.model, adapter_name):
                delta.values.data = delta.values.data.to(dtype)
            if autocast_adapter_dtype:
                widen_rows(self.model, adapter_name)

    def train(self, mode: bool = True) -> SparseModel:
        """torch's method; in training no quantised weight stays in a layout that only evaluates."""
        hold_layouts(self.model, undo=mode)
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and whatever drives it; if it alone was active, the first that is left takes over."""
        self._refuse_moved(f"delete adapter {adapter_name!r}", of=adapter_name)
        drivers.stop(self.model, adapter_name)
        super().delete_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base weights until `unmerge_adapter`, which restores them bit for bit.

        Quantised weights are quantised again, which loses much of a small delta: a warning says how much.

        Args:
            adapter_names: the adapters to merge; the active ones if None.
            safe_merge: refuse values that are not finite, before any layer is touched.

        Raises:
            ConfigError: a dense phase is open, in which the base weights train.
        """
        self._refuse_moved("merge adapters")
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        if self.around.of_kind(QuantizedLinear):
            warn_of_loss(iter_layers(self.model), way_back="unmerge_adapter() gives the old ones back bit for bit; ")

    def _refuse_moved(self, what: str, *, of: str | None = None) -> None:
        """Raise a ConfigError while a dense phase (of an adapter, if `of` names one) moves the base weights."""
        for _, layer in iter_layers(self.model) if open_phase(self.model) is not None else ():
            if layer.moved is not None and of in (None, layer.moved.adapter_name):
                raise ConfigError(
                    f"cannot {what}: a dense phase of adapter {layer.moved.adapter_name!r} is open, and trains the "
                    "base weights themselves. End it first: start_sparse_phase(model) selects and rewinds, and "
                    "abort() of what start_dense_phase(model) gave takes everything back."
                )

    def _ready_to_merge(
        self, layers: list[Any], adapter_names: list[str] | None
    ) -> tuple[Callable[[], bool] | None, list[Any]]:
        return fused_merge.ready_to_merge(layers, adapter_names)

    def unmerge_layers(self, layers: list[Any]) -> None:
        """Restore the base weights of some layers, of any tuner, bit for bit."""
        super().unmerge_layers(fused_merge.unmerge(layers))

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge adapters into the base weights for good (PEFT's method, with one more argument).

        Args:
            progressbar, safe_merge, adapter_names: as PEFT's.
            dequantize: give an unquantised model, which takes the delta without loss, see `Dequantization`; otherwise a
                quantised one takes it with a loss that a warning puts in numbers.

        Returns:
            the base model without tuner layers.
        """
        self._refuse_moved("merge adapters")
        if not dequantize:
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        adapter_names = known_list(adapter_names, self.peft_config)
        self._check_merged(adapter_names, safe_merge=safe_merge)
        dequantization = Dequantization(self.model)
        drivers.stop(self.model)
        dequantization.merge(adapter_names)
        return dequantization.finish(super().merge_and_unload(progressbar, safe_merge, adapter_names))

    def _begin_unloading(
        self, layers: Mapping[str, SparseLayer], *, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        self._refuse_moved("take the adapters off the model")
        super()._begin_unloading(layers, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)

    def _end_unloading(self, model: nn.Module, layers: Mapping[str, SparseLayer], *, merge: bool) -> None:
        super()._end_unloading(model, layers, merge=merge)
        drivers.stop(model)
        if merge:
            warn_of_loss(layers.items(), way_back="")
        release_layouts(model)

    @classmethod
    def _for_file(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, own: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return state.for_saving(model, config, adapter_name, own, whole)

    @classmethod
    def _receive(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor], undo: Receipt
    ) -> dict[str, Tensor]:
        is_own_file = undo.is_own_file and not config.is_chosen_anew
        state_dict = state.for_loading(model, config, adapter_name, state_dict, is_own_file=is_own_file)
        return super()._receive(model, config, adapter_name, state_dict, undo)

    # ---- composition -----------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        head_from: str | None = None,
    ) -> None:
        """Add up adapters into a new one, which is not activated.

        Args:
            adapters: names of the adapters to combine.
            weights: one finite factor per adapter, of any sign.
            adapter_name: name of the new adapter.
            combination_type: "linear" (exact on the union of the supports), "ties", "dare_linear", "dare_ties" or
                "magnitude_prune".
            density: share of each adapter's weights to keep, in (0, 1]; for all types but "linear".
            majority_sign_method: "total" or "frequency", for the "ties" types.
            head_from: the adapter whose heads (`modules_to_save`) the new one gets; the only one that has any if None.

        Raises:
            ConfigError: an unknown or missing name, a name that is taken, an argument that `combine` refuses, or heads
                in several adapters without `head_from`. The model is left as it was.
        """
        self._add_combined(
            adapters,
            weights,
            adapter_name,
            head_from=head_from,
            combination_type=combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
        )

    def _combine(self, adapters: list[str], weights: list[float], fields: dict[str, Any], **how: Any) -> Combined:
        return compose.combined(self, adapters, weights, fields, **how)
