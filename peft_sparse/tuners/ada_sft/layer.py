"""Linear layers under soft masks: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..._peft_bridge import _get_in_out_features, check_adapters_to_merge
from ...core.masked import masked_linear, masked_weight
from ...core.sharded import how_sharded, is_sharded
from ...errors import ConfigError
from ..common.base_module import called, foreign_forward, has_foreign_forward, home_of, loaded, own_forward
from ..common.layer import WeightLayer, beyond_range, not_finite, not_whole
from ..common.packed import find_backend, is_packed
from ..common.state_dict_hooks import StateDictHooks
from ..common.target_checks import NotInThisStateError
from .masked_weight import MaskedWeight


class Linear(WeightLayer):
    """A linear layer whose weight acts under the soft masks of its active adapters.

    Of several active adapters each changes the weight W by (W + D) * M - W, and the changes add up, as those of sparse
    adapters do. The class name holds "Linear" because PEFT finds the targets of a second "all-linear" adapter by it.

    Args:
        base_layer: the layer to tune.
    """

    adapter_layer_names = ("ada_sft_weight",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ada_sft_weight = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.in_features, self.out_features = _get_in_out_features(base)
        # While adapters are merged, the parameter that they were merged into: in a list, for it is no part of this
        # module.
        self._originals: list[nn.Parameter] = []
        self._base_state_hooks = StateDictHooks(self)

    # ---- adapters --------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, masked: MaskedWeight, *, inference_mode: bool) -> None:
        """Give this layer a new adapter; `inference_mode` is whether it starts frozen."""
        self.ada_sft_weight[adapter_name] = masked
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def masked(self, adapters: Sequence[str]) -> list[MaskedWeight]:
        """What `adapters` hold on this layer, in order; nothing for those that have nothing on it."""
        return [self.ada_sft_weight[name] for name in adapters if name in self.ada_sft_weight]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters (PEFT's method); what a phase holds fixed stays so."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for masked in self.ada_sft_weight.values():
            masked.freeze_what_is_fixed()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or let them train (PEFT's method); what a phase holds fixed stays so."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        for masked in self.ada_sft_weight.values():
            masked.freeze_what_is_fixed()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the weight's dtype, which would round float32 scores over a bfloat16 weight.
        for masked in self.masked([adapter_name]):
            if not masked.trained.is_meta:
                base = self.get_base_layer()
                masked.to(device if device is not None else home_of(base, base.weight))

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not self.masked(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)
        return called(self.get_base_layer(), partial(self._delta_forward, self.active_adapters), (x, *args), kwargs)

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        parts = [masked.part for masked in self.masked(adapters)]
        return masked_linear(x, base.weight, base.bias, parts, fan_in_fan_out=self.fan_in_fan_out)

    def acts(self, adapter_name: str) -> bool:
        return adapter_name in self.ada_sft_weight

    def leaves(self, parameter: str, adapters: Sequence[str]) -> list[Tensor]:
        masked = self.masked(adapters) if parameter == "weight" else []
        return [leaf for each in masked for leaf in each.parameters()]

    def maker(self, parameter: str, adapters: Sequence[str]) -> Callable[[], Tensor]:
        return partial(masked_weight, self.get_base_layer().weight, [masked.part for masked in self.masked(adapters)])

    def pristine(self, parameter: str) -> Tensor:
        return self.original if parameter == "weight" else self.get_base_layer().bias

    # ---- merging ---------------------------------------------------------------------------------

    @property
    def original(self) -> nn.Parameter:
        """The base layer's own weight, whatever is merged."""
        return self._originals[0] if self._originals else self.get_base_layer().weight

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> Tensor:
        """The base layer's own weight with adapters in it: a new tensor, or the weight itself if they have none."""
        parts = [masked.part for masked in self.masked(adapters)]
        return masked_weight(self.original, parts) if parts else self.original

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a merged weight in the place of the base weight until `unmerge`.

        A new parameter takes the place, so that another module that shares the old one (tied embeddings) keeps it.

        Args:
            safe_merge: check first that the result is finite.
            adapter_names: the adapters to merge; the active ones if None.

        Raises:
            ValueError: `safe_merge` found a NaN or an infinity; the layer is as it was.
            ConfigError: this process holds only a part of the weights.

        Cost: while merged, a second copy of the weight.
        """
        asked = check_adapters_to_merge(self, adapter_names) or []
        names = [name for name in asked if self.acts(name)]
        if adapter_names is not None and not names:
            # Merged all the same: its active adapters, which are others, do not act.
            self.merged_adapters.extend(asked)
        if not names:
            return
        self.refuse_parts(names)
        if safe_merge:
            self.check_finite([*self.merged_adapters, *names])
        self.merged_adapters.extend(names)
        with loaded(self.get_base_layer(), store=True):
            original = self.original
            merged = self.merged_weight(self.merged_adapters)
            self.get_base_layer().weight = nn.Parameter(merged, requires_grad=original.requires_grad)
        self._originals = [original]
        self._base_state_hooks.begin()

    def refuse_parts(self, adapters: Sequence[str], name: str = "this layer") -> None:
        how = how_sharded(self.original)
        if how is not None or is_sharded(self.original):
            raise not_whole(f"weight of {name}", how)

    def check_finite(self, adapters: Sequence[str]) -> None:
        with loaded(self.get_base_layer()):
            is_finite = bool(torch.isfinite(self.merged_weight(adapters)).all())
        if not is_finite:
            raise not_finite(adapters, "(W + D) * M is not finite")

    def check_range(self, adapters: Sequence[str]) -> None:
        with loaded(self.get_base_layer()):
            own = self.original
            tuned = [tensor for masked in self.masked(adapters) for tensor in masked.parameters()]
            # Float16 alone has a smaller range than the differences, which are float32.
            if not tuned or own.dtype != torch.float16 or is_sharded(own) or how_sharded(own) is not None:
                return
            if bool(torch.isfinite(self.merged_weight(adapters)).all()):
                return
            if all(bool(torch.isfinite(given).all()) for given in [own, *tuned]):
                raise beyond_range(adapters, "weight", own.dtype)

    def restore(self) -> None:
        base = self.get_base_layer()
        for original in self._originals:
            # To where the model was moved while it was merged.
            original.data = original.data.to(base.weight)
            base.weight = original
        self._originals = []
        self._base_state_hooks.end()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_base_state_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._base_state_hooks = StateDictHooks(self)
        if self.merged:
            self._base_state_hooks.begin()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the weight, float32; zeros where this layer has none of it."""
        with loaded(self.get_base_layer()):
            for masked in self.masked([adapter_name]):
                return masked.change(self.original)
        return torch.zeros_like(self.original, dtype=torch.float32)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can approximate this layer's adapter by LoRA."""
        return not self.fan_in_fan_out


def check_linear(module: nn.Module, name: str) -> None:
    """Refuse a module that cannot be masked.

    Args:
        module: a module of the base model.
        name: its path, for the error.

    Raises:
        ConfigError: it is no linear layer, its weight is quantised, or it is sharded.
    """
    if has_foreign_forward(module):
        raise foreign_forward(module, name)
    leave_out = f"Leave it out with exclude_modules=[{name!r}]"
    weight = getattr(module, "weight", None)
    if find_backend(module) is not None or (isinstance(weight, Tensor) and is_packed(weight)):
        raise NotInThisStateError(
            f"{name} is quantised ({type(module).__name__}), and Ada-SFT multiplies every weight by a mask of its own: "
            "the result would have to be kept unquantised, whole. Load the base model unquantised, or use a method "
            "that tunes few weights: SpIEL (SpielAGConfig), or Rand-SFT (RandConfig)."
        )
    is_plain = (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and own_forward(module) is None
    )
    if not (is_plain or isinstance(module, Conv1D)) or isinstance(module, NonDynamicallyQuantizableLinear):
        raise ConfigError(
            f"target module {name} of type {type(module).__name__} is not supported: Ada-SFT masks nn.Linear and "
            f"transformers' Conv1D. {leave_out}, or train it whole with modules_to_save=[{name!r}]."
        )
    if is_sharded(module.weight):
        raise NotInThisStateError(
            f"{name} is sharded already, and an adapter added now would be left out of that. Add the adapter to the "
            "whole model, then shard it."
        )
