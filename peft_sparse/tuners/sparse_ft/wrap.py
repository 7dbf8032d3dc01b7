"""Which wrapper serves which kind of module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError
from .conv import Conv
from .embedding import Embedding
from .layer import SparseLayer
from .linear import Linear
from .norm import LayerNorm
from .own_forward import OwnForward

SUPPORTED = (
    "nn.Linear, transformers' Conv1D, nn.Embedding, nn.LayerNorm, transformers' RMSNorms, nn.Conv1d and nn.Conv2d"
)


def wrapper_for(module: nn.Module, name: str) -> Callable[[nn.Module], SparseLayer]:
    """What puts the right `SparseLayer` around a module.

    Args:
        module: the module to tune, or a tuner layer of PEFT's that stands around it.
        name: its path in the model, for the error.

    Returns:
        a function that takes the module and returns the layer.

    Raises:
        ConfigError: the module's way to use its parameters is not known.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = type(base)
    if resolve_quantization_backend(base) is not None:
        raise ConfigError(
            f"{name} is quantised ({kind.__name__}), which this version cannot tune. Load the base model unquantised, "
            f"or leave the module out with exclude_modules=[{name!r}]."
        )
    if (
        isinstance(base, nn.Linear)
        and kind.forward is nn.Linear.forward
        and kind is not NonDynamicallyQuantizableLinear
    ):
        return Linear
    if isinstance(base, Conv1D):
        return partial(Linear, fan_in_fan_out=True)
    if isinstance(base, nn.Embedding) and base.max_norm is None:
        is_lookup = kind.forward is nn.Embedding.forward or hasattr(base, "embed_scale")
        return Embedding if is_lookup else OwnForward
    if isinstance(base, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward:
        return LayerNorm
    if is_rms_norm(base):
        return OwnForward
    if isinstance(base, (nn.Conv1d, nn.Conv2d)) and kind.forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        return Conv
    raise ConfigError(
        f"target module {name} of type {kind.__name__} is not supported: sparse fine-tuning knows {SUPPORTED}. "
        f"Leave it out with exclude_modules=[{name!r}], or train it whole with modules_to_save=[{name!r}]."
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer that can carry a delta."""
    return (isinstance(module, nn.LayerNorm) and module.elementwise_affine) or is_rms_norm(module)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is a root-mean-square norm: by class name, with one vector `weight` and no other parameter."""
    kind = type(module).__name__
    parameters = dict(module.named_parameters())
    return (
        ("RMSNorm" in kind or kind == "T5LayerNorm")
        and list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that LoRA would adapt as a linear layer."""
    return isinstance(module, (nn.Linear, Conv1D))
