"""Quantised modules as they lie in memory: which of them can be tuned, what shape their weights really have, what the
weights are, and how a packed weight is put away and back unharmed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any, NoReturn

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..._peft_bridge import QuantizationBackend, resolve_quantization_backend
from ...errors import ConfigError
from .base_module import home_of
from .target_checks import NotInThisStateError

# pyproject.toml asks for it, but only where the extra "quantization" is installed.
OLDEST_BITSANDBYTES = "0.50"
# What bitsandbytes keeps beside a packed weight, outside its parameters.
_STATE = "state"
_QUANT_STATE = "quant_state"
_CPU_LAYOUT = "support_avx512bf16_for_cpu"


def find_backend(module: nn.Module, settings: Mapping[str, Any] | None = None) -> QuantizationBackend | None:
    """PEFT's access to a quantised module's weight; None if the module is not quantised.

    Args:
        module: a module of the base model.
        settings: what PEFT's `get_quantization_kwargs` finds in the model; torchao needs it to quantise again.
    """
    return resolve_quantization_backend(module, **{"get_apply_tensor_subclass": _no_recipe, **(settings or {})})


def _no_recipe() -> NoReturn:
    raise ConfigError(
        "the model does not say how its torchao weights were quantised (model.hf_quantizer.quantization_config), so "
        "nothing can be merged into them. Use merge_and_unload(dequantize=True)."
    )


def check_tunable(module: nn.Module, backend: QuantizationBackend, name: str) -> None:
    """Refuse a quantised module whose weight cannot be had.

    Raises:
        ConfigError: the backend only runs forwards, the module is no linear layer, or its weight is not quantised.
    """
    leave_out = f"leave the module out with exclude_modules=[{name!r}]"
    if not backend.supports_merge:
        raise NotInThisStateError(
            f"{name} is quantised by {backend.backend_name} ({type(module).__name__}), which gives no way to "
            "dequantise its weight, and a sparse delta is added to the weight itself. Load the base model unquantised, "
            f"or quantised by bitsandbytes (BitsAndBytesConfig(load_in_4bit=True)), or {leave_out}."
        )
    if not isinstance(getattr(module, "in_features", None), int):
        raise ConfigError(
            f"{name} is a quantised {type(module).__name__}; of quantised modules only linear layers can be tuned: "
            f"{leave_out}."
        )
    if getattr(getattr(module, "weight", None), "has_fp16_weights", False):
        raise NotInThisStateError(
            f"{name} has 8-bit products over 16-bit weights, which bitsandbytes quantises anew in every forward. Load "
            f"the base model with llm_int8_has_fp16_weight=False, or {leave_out}."
        )
    if backend.backend_name.startswith("bnb"):
        warn_of_old_bitsandbytes()


@cache
def warn_of_old_bitsandbytes(installed: str | None = None) -> None:
    """Warn once of a bitsandbytes that is older than those that the tests pass with."""
    if installed is None:
        from bitsandbytes import __version__ as installed
    if Version(installed) < Version(OLDEST_BITSANDBYTES):
        warnings.warn(
            f"bitsandbytes {installed} is older than {OLDEST_BITSANDBYTES}, the oldest that peft_sparse is tested "
            "with. On a CPU older ones fail: 4-bit models of type FP4 (0.46), 8-bit models that were saved and loaded "
            f'(to 0.48), 8-bit optimizers (to 0.49). pip install "bitsandbytes>={OLDEST_BITSANDBYTES}".',
            stacklevel=2,
        )


def is_packed(weight: Tensor) -> bool:
    """Whether a tensor is not itself the weight that it stands for."""
    return not weight.is_floating_point() or hasattr(weight, _QUANT_STATE)


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of a module's own parameters; a packed weight is "weight" whatever its name."""
    own: dict[str, Tensor] = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    if not own or "weight" in own or find_backend(module) is None:
        return own
    packed = next(tensor for name, tensor in own.items() if name != "bias")
    return {"weight": packed, **{name: tensor for name, tensor in own.items() if name == "bias"}}


def parameter_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Shape of a module's own parameter, that of the unpacked weight if the module is quantised."""
    if name == "weight" and find_backend(module) is not None and hasattr(module, "out_features"):
        rows, columns = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        return (columns, rows) if is_transposed(module) else (rows, columns)
    return tuple(getattr(module, name).shape)


def parameter_device(module: nn.Module, name: str) -> torch.device:
    """Where a module computes with its own parameter: where that lies, unless accelerate offloaded it."""
    tensor = getattr(module, name, None)
    return home_of(module, own_parameters(module)[name] if tensor is None else tensor)


def parameter_numel(module: nn.Module, name: str) -> int:
    """Number of elements of a module's own parameter, see `parameter_shape`."""
    return prod(parameter_shape(module, name))


def is_transposed(module: nn.Module) -> bool:
    """Whether a quantised module stands for a `Conv1D`, whose weight is [I, O]: its transpose was quantised."""
    return issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)


def dequantize(module: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The weight of a quantised linear layer as the unquantised model has it, in memory of its own.

    Returns:
        [O, I], or [I, O] in the place of a `Conv1D`, so that an adapter fits the model quantised or not; in the dtype
        that it was quantised from.

    Raises:
        ConfigError: the weight was never quantised, or the backend cannot give it.
    """
    weight = _dequantize_4bit(module) if hasattr(module, _QUANT_STATE) else _base_weight(module, backend)
    return (weight.t() if is_transposed(module) else weight).contiguous()


def _dequantize_4bit(module: Any) -> Tensor:
    # What PEFT's backend does, in a way that torch.compile can follow.
    from bitsandbytes.functional import dequantize_4bit

    if is_packed_for_cpu(module):
        return dequantize_4bit(*unpack_from_cpu(module))
    # FSDP makes plain tensors of parameters; the module keeps the state, too.
    state = getattr(module.weight, _QUANT_STATE, None) or module.quant_state
    if state is None:
        raise _not_quantized(module)
    return dequantize_4bit(module.weight.data, state)


def _base_weight(module: nn.Module, backend: QuantizationBackend) -> Tensor:
    if hasattr(module, _STATE) and module.weight.dtype != torch.int8:
        raise _not_quantized(module)
    try:
        return backend.get_base_weight(module).detach()
    except (NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"the weight of a {type(module).__name__} cannot be dequantised by {backend.backend_name}: {error}"
        ) from error


def _not_quantized(module: nn.Module) -> ConfigError:
    return ConfigError(
        f"the weight of a {type(module).__name__} is not quantised yet: bitsandbytes does that when the model is moved "
        'to its device. Call model.to("cuda"), or model.to("cpu"), first.'
    )


class Packed:
    """The packed weight of a base layer, put away while another one takes its place.

    What the backends replace or change when they store a weight is remembered by reference, the tensors themselves are
    never copied nor written: what `put_back` restores is bit for bit what there was.

    Args:
        owner: the innermost tuner layer, which holds the quantised module.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._module = owner.base_layer
        self._parameters = {n: p for n, p in self._module._parameters.items() if n != "bias" and p is not None}
        # PEFT marks the old 4-bit parameter as unquantised on the way to the new one.
        self._marks = [(parameter, dict(vars(parameter))) for parameter in self._parameters.values()]
        self._quant_state = vars(self._module).get(_QUANT_STATE)
        self._state = dict(vars(self._module.state)) if hasattr(self._module, _STATE) else None

    def stand_in(self) -> nn.Module:
        """A module that has the packed weight, to be dequantised while the real one has another."""
        module = copy.copy(self._module)
        vars(module)["_parameters"] = {**self._module._parameters, **self._parameters}
        if _QUANT_STATE in vars(module):
            vars(module)[_QUANT_STATE] = self._quant_state
        if self._state is not None:
            module.state = copy.copy(self._module.state)
            vars(module.state).update(self._state)
        return module

    def put_back(self) -> None:
        """Restore the packed weight, on the device that the module lies on by now."""
        module = self._module
        device = parameter_device(self._owner.base_layer, "weight")
        self._owner.base_layer = module
        for name, parameter in self._parameters.items():
            # A backend that gave up half-way may have left a plain tensor.
            vars(module).pop(name, None)
            module._parameters[name] = parameter
        for parameter, marks in self._marks:
            vars(parameter).clear()
            vars(parameter).update(marks)
        if _QUANT_STATE in vars(module):
            vars(module)[_QUANT_STATE] = self._quant_state
        if self._state is not None:
            vars(module.state).clear()
            vars(module.state).update(self._state)
        if next(iter(self._parameters.values())).device != device:
            module.to(device)


def hold_layouts(model: nn.Module, *, undo: bool = False) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for processors with AVX512-BF16.

    It does so in place, in the first forward without gradients in evaluation, and rounds the block scales to bfloat16
    for good. From then on a training forward of its layers fails, its own `dequantize_4bit` gives noise, and
    `state_dict`, which packs back, leaves the scales of weights without double quantisation in the wrong order (all
    seen with 0.50.2).

    Args:
        model: whose layers to hold as they are.
        undo: pack those back that were packed anew already, for training; otherwise they stay, so that disabling the
            adapters gives what the model gave in evaluation before.
    """
    module: Any
    for module in model.modules():
        if _CPU_LAYOUT not in vars(module):
            continue
        if is_packed_for_cpu(module):
            if not undo:
                continue
            module.weight.data, module.weight.quant_state = unpack_from_cpu(module)
        setattr(module, _CPU_LAYOUT, False)


def release_layouts(model: nn.Module) -> None:
    """Undo `hold_layouts`."""
    held = [module for module in model.modules() if _CPU_LAYOUT in vars(module)]
    if held:
        from bitsandbytes.functional import has_avx512bf16

        for module in held:
            setattr(module, _CPU_LAYOUT, has_avx512bf16())


def is_packed_for_cpu(module: nn.Module) -> bool:
    """Whether bitsandbytes packed a 4-bit weight anew for this processor."""
    state = getattr(getattr(module, "weight", None), _QUANT_STATE, None)
    return getattr(state, "packing_format_for_cpu", False)


def unpack_from_cpu(module: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight as it was packed before, and its quantisation state; the scales stay rounded, and single."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(module.weight.quant_state)
    # Quantising the scales again would round them a second time.
    state.original_nested = False
    scales = state.absmax.t().reshape(-1).float()
    packed, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    state.absmax = scales
    return packed, state
