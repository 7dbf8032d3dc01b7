"""AdaSftModel: the tuner that PEFT drives."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ..._peft_bridge import _ExcludedModule
from ...core.names import unwrapped
from ..common.base_module import home_of
from ..common.combining import Combined
from ..common.events import ON_UNFINISHED, announce
from ..common.made_for_file import Receipt
from ..common.target_checks import check_each, refuse_other_tuners
from ..common.targets import find_targets, is_excluded, named_targets, stored_target_modules
from ..common.weight_tuner import WeightTuner
from . import compose, state
from .config import MASK, AdaSftConfig
from .iteration import iter_masked
from .layer import Linear, check_linear
from .masked_weight import MaskedWeight


class AdaSftModel(WeightTuner):
    """Soft masks on the targeted linear weights of a model.

    Args:
        model: the base model.
        peft_config: an `AdaSftConfig`, or PEFT's dictionary of them.
        adapter_name: name of the first adapter.

    Every adapter's config is a copy of the user's, in which `phase` says how far it is.

    Cost: while adapters are merged (`merge_adapter`), a second copy of the targeted weights.
    """

    prefix = "ada_sft_"
    tuner_layer_cls = Linear

    # ---- injection -------------------------------------------------------------------------------

    def _plan(
        self, config: AdaSftConfig, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> Collection[str]:
        if state_dict is not None:
            config.phase = state.phase_of(state_dict)
        self._request = copy.copy(config)
        self._targets = find_targets(self._request, model)
        held = config.held_in_file if state_dict is None else state_dict
        if held:
            self._targets = state.fit_head(config, model, adapter_name, self._targets, state.modules_of(held))
        refuse_other_tuners(model, self._targets, Linear)
        modules = dict(named_targets(model))
        check_each(self._targets, lambda name: check_linear(modules[name], name))
        return self._targets

    def _complete(self, config: AdaSftConfig, model: nn.Module, adapter_name: str, requested: AdaSftConfig) -> None:
        config.target_modules = stored_target_modules(self._request, self._targets)
        if config.phase == MASK:
            announce(ON_UNFINISHED)
        if not config.init_weights and not config.inference_mode:
            for _, _, masked in iter_masked(model, adapter_name):
                if not masked.trained.is_meta:
                    masked.start_at_random()

    def _check_target_module_exists(self, peft_config: AdaSftConfig, key: str) -> Any:
        if unwrapped(key) in self._targets:
            return True
        return _ExcludedModule() if is_excluded(self._request, key) else False

    def _tuned(
        self, config: AdaSftConfig, adapter_name: str, target: nn.Module, path: str, parent: nn.Module
    ) -> Linear:
        base = target.get_base_layer() if isinstance(target, Linear) else target
        check_linear(base, path)
        masked = MaskedWeight(
            tuple(base.weight.shape),
            phase=config.phase,
            initial_mask=config.initial_mask,
            from_identity=config.from_identity,
            device=home_of(base, base.weight),
        )
        layer = target if isinstance(target, Linear) else Linear(target)
        layer.update_layer(adapter_name, masked, inference_mode=config.inference_mode)
        return layer

    # ---- PEFT's hooks ----------------------------------------------------------------------------

    @classmethod
    def _for_file(
        cls, model: nn.Module, config: AdaSftConfig, adapter_name: str, own: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return state.for_saving(model, config, adapter_name, own)

    @classmethod
    def _receive(
        cls, model: nn.Module, config: AdaSftConfig, adapter_name: str, state_dict: dict[str, Tensor], undo: Receipt
    ) -> dict[str, Tensor]:
        own = state.for_loading(model, config, adapter_name, state_dict, undo)
        return super()._receive(model, config, adapter_name, own, undo)

    # ---- composition -----------------------------------------------------------------------------

    def _combine(self, adapters: list[str], weights: list[float], fields: dict[str, Any], **how: Any) -> Combined:
        return compose.combined(self, adapters, weights, fields, **how)
