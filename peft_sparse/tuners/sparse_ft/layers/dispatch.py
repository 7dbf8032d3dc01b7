"""Which layer class is put around which kind of module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...._peft_bridge import BaseTunerLayer
from ....core.sharded import is_sharded
from ....errors import ConfigError
from ...common.base_module import foreign_forward, has_foreign_forward, own_forward
from ...common.packed import check_tunable, find_backend, is_packed
from ...common.target_checks import NotInThisStateError
from ...common.targets import is_norm
from .base import PARAMETERS, SparseLayer
from .conv import Conv
from .embedding import Embedding
from .linear import Linear
from .norm import LayerNorm
from .own_forward import OwnForward
from .quantized import QuantizedLinear

SUPPORTED = "nn.Linear, transformers' Conv1D, nn.Embedding, norms, nn.Conv1d and nn.Conv2d"


def wrapper_for(
    module: nn.Module,
    name: str,
    *,
    quantization: Mapping[str, Any] | None = None,
) -> Callable[[nn.Module], SparseLayer]:
    """Choose the `SparseLayer` class for a module.

    Args:
        module: the module to tune, or a tuner layer of PEFT's that wraps it.
        name: its path in the model, for the error.
        quantization: what PEFT's `get_quantization_kwargs` finds in the model.

    Returns:
        a function that takes the module and returns the layer.

    Raises:
        ConfigError: the module's way to use its parameters is not known, its weight is packed and cannot be had, or it
            is sharded.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = type(base)
    _check_state(base, name)
    backend = find_backend(base, quantization)
    if backend is not None:
        check_tunable(base, backend, name)
        return partial(QuantizedLinear, backend=backend)
    if own_forward(base) is not None and {name for name, _ in base.named_parameters()} <= {*PARAMETERS}:
        return OwnForward
    if (
        isinstance(base, nn.Linear)
        and kind.forward is nn.Linear.forward
        and kind is not NonDynamicallyQuantizableLinear
    ):
        return Linear
    if isinstance(base, Conv1D):
        return partial(Linear, fan_in_fan_out=True)
    if isinstance(base, nn.Embedding) and (base.max_norm is not None or base.scale_grad_by_freq):
        raise ConfigError(
            f"target module {name} rescales its rows (max_norm) or their gradients (scale_grad_by_freq), which a delta "
            f"on them would not see. Leave it out with exclude_modules=[{name!r}], or train it whole with "
            f"modules_to_save=[{name!r}]."
        )
    if isinstance(base, nn.Embedding) and not is_packed(base.weight):
        is_lookup = kind.forward is nn.Embedding.forward or hasattr(base, "embed_scale")
        if is_lookup:
            return Embedding
        if all(next(child.parameters(), None) is None for child in base.children()):
            # Parts of a target cannot be targets: their paths would change under them.
            return OwnForward
    if isinstance(base, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward:
        return LayerNorm
    if is_norm(base):
        return OwnForward
    if isinstance(base, (nn.Conv1d, nn.Conv2d)) and kind.forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        return Conv
    raise ConfigError(
        f"target module {name} of type {kind.__name__} is not supported: sparse fine-tuning knows {SUPPORTED}. "
        f"Leave it out with exclude_modules=[{name!r}], or train it whole with modules_to_save=[{name!r}]."
    )


def _check_state(base: nn.Module, name: str) -> None:
    """Refuse a module that could be tuned, had nothing been done to it before."""
    if has_foreign_forward(base):
        raise foreign_forward(base, name)
    if any(is_sharded(parameter) for parameter in base.parameters(recurse=False)):
        raise NotInThisStateError(
            f"{name} is sharded already, and an adapter added now would be left out of that: no process would see the "
            "gradients of the others. Add the adapter to the whole model, then call fully_shard (trainers do so)."
        )
