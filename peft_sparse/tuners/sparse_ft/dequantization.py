"""From a quantised model with adapters to an ordinary one: merging without loss."""

from __future__ import annotations

import logging
from collections import Counter
from functools import reduce
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..._peft_bridge import BaseTunerLayer, QuantizationBackend, check_adapters_to_merge
from ...errors import ConfigError
from ..common.packed import dequantize, find_backend, is_transposed
from .iteration import iter_layers
from .layers.quantized import QuantizedLinear

logger = logging.getLogger(__name__)

# What transformers and bitsandbytes leave on a model that was loaded quantised.
_MODEL_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
_CONFIG_MARKS = ("quantization_config", "_is_quantized")


class Dequantization:
    """Makes a quantised model an ordinary one, adapters merged into it without loss.

    Every quantised linear layer becomes an `nn.Linear` (a `Conv1D` where the architecture has one) that holds the very
    weight that the tuned layer multiplied with, so its outputs are those of the unmerged adapters bit for bit. That
    weight is in the layer's compute dtype. Where it is not the dtype of the model's other parameters, the whole model
    goes to the narrowest dtype that holds both exactly, because an ordinary layer does not cast its inputs.

    Args:
        model: the base model with its tuner layers; nothing is changed yet.

    Raises:
        ConfigError: one of its modules is quantised in a way that cannot be undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # By identity: unloading changes the modules' paths.
        self._found: dict[int, tuple[nn.Module, QuantizationBackend]] = {}
        sizes: Counter[torch.dtype] = Counter()
        for name, module in model.named_modules():
            backend = None if isinstance(module, BaseTunerLayer) else find_backend(module)
            if backend is not None:
                if not backend.supports_merge:
                    raise ConfigError(
                        f"dequantize=True: {name} is quantised by {backend.backend_name}, which gives no way to "
                        "dequantise it. Merge without dequantize=True."
                    )
                self._found[id(module)] = module, backend
            elif "sparse_ft_" not in name:
                for parameter in module.parameters(recurse=False):
                    sizes[parameter.dtype] += parameter.numel() if parameter.is_floating_point() else 0
        # The dtype of nearly all activations; norms and routers may be kept in a wider one.
        self._own_dtype = sizes.most_common(1)[0][0] if sizes else None
        self._dtypes: set[torch.dtype] = set()

    def merge(self, adapter_names: list[str] | None) -> None:
        """Put ordinary layers with the adapters (the active ones if None) in the place of tuned quantised ones."""
        for name, layer in list(iter_layers(self._model)):
            if not isinstance(layer, QuantizedLinear):
                continue
            adapters = [*layer.merged_adapters, *check_adapters_to_merge(layer, adapter_names)]
            layer.merged_adapters.clear()
            layer.restore()
            base = layer.get_base_layer()
            dtype = self._dtype_of(base, layer.dequantized().dtype)
            weight, bias = layer.make_weight(adapters, dtype=dtype), layer.effective("bias", adapters)
            self._model.set_submodule(name, _ordinary(base, weight, bias))

    def finish(self, model: nn.Module) -> nn.Module:
        """Dequantise what is left, after the tuner was unloaded, and take the marks of quantisation off the model."""
        for name, module in list(model.named_modules()):
            if id(module) in self._found:
                weight = dequantize(*self._found[id(module)])
                weight = weight.to(self._dtype_of(module, weight.dtype))
                model.set_submodule(name, _ordinary(module, weight, module.bias))
        if not self._found:
            return model
        _forget_quantization(model)
        dtypes = self._dtypes | ({self._own_dtype} if self._own_dtype is not None else set())
        if len(dtypes) > 1:
            dtype = reduce(torch.promote_types, dtypes)
            logger.info("dequantize=True: the model's parts compute in %s, all of it goes to %s.", dtypes, dtype)
            model.to(dtype)
        return model

    def _dtype_of(self, module: nn.Module, stored: torch.dtype) -> torch.dtype:
        dtype = getattr(module, "compute_dtype", None) or self._own_dtype or stored
        self._dtypes.add(dtype)
        return dtype


def _ordinary(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """An unquantised layer of the same shape and place."""
    with torch.device("meta"):
        if is_transposed(module):
            layer: nn.Module = Conv1D(module.out_features, module.in_features)
        else:
            layer = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    elif is_transposed(module):
        layer.bias = nn.Parameter(weight.new_zeros(module.out_features), requires_grad=False)
    layer.train(module.training)
    if hasattr(module, "_hf_hook"):
        add_hook_to_module(layer, module._hf_hook)
    return layer


def _forget_quantization(model: nn.Module) -> None:
    """Make a model save, load, move and cast like one that was never quantised."""
    module: Any
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        for mark in _MODEL_MARKS:
            vars(module).pop(mark, None)
        for mark in _CONFIG_MARKS:
            vars(module.config).pop(mark, None)
        # How a quantised file was read, which saving would do backwards.
        conversions: list[Any] = getattr(module, "_weight_conversions", None) or []
        for conversion in conversions:
            operations = getattr(conversion, "operations", None)
            if operations:
                conversion.operations = [o for o in operations if not hasattr(o, "hf_quantizer")]
        if conversions:
            module._weight_conversions = [c for c in conversions if getattr(c, "operations", True) != []]  # type: ignore
