"""Taking an adapter out of a model: one whose loading failed, the last one, single layers and heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from ..._peft_bridge import PEFT_TYPE_TO_TUNER_MAPPING, AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer

if TYPE_CHECKING:
    from .tuner import AdapterTuner

# Where a base model remembers which of its parameters trained before the first adapter came.
TRAINABLE_BEFORE = "_peft_sparse_trainable_before"


def discard(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model whose loading failed: layers, what trains and what is active are as before it.

    Args:
        model: the `PeftModel`, its tuner, or the model that `inject_adapter_in_model` or transformers gave it to.
        adapter_name: the adapter, which is not active unless it is the only one.
    """
    tuner = _tuner_of(model, adapter_name)
    if len(tuner.peft_config) == 1:
        unload_as_before(tuner)
        train_as_before(tuner.model)
        if getattr(tuner.model, "_hf_peft_config_loaded", False):
            tuner.model._hf_peft_config_loaded = False
        return
    trained = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]
    alone = [module for module in tuner.model.modules() if _adapters_of(module) == {adapter_name}]
    for layer in alone:
        if isinstance(layer, tuner.tuner_layer_cls):
            layer.delete_adapter(adapter_name)
    take_off(tuner, alone)
    tuner.delete_adapter(adapter_name)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def unload_as_before(tuner: Any) -> None:
    """Take all tuner layers off a model, and put its own heads back; PEFT's `unload` would leave an adapter's there."""
    take_off(tuner, [module for module in tuner.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)])
    tuner.unload()


def take_off(tuner: AdapterTuner, modules: Iterable[nn.Module]) -> None:
    """Put base modules back in the place of layers and heads around them; other modules are left alone."""
    chosen = set(modules)
    for path, module in list(tuner.model.named_modules()):
        if module not in chosen:
            continue
        if isinstance(module, tuner.tuner_layer_cls):
            tuner.release(module)
            _put_back(tuner.model, path, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            _put_back(tuner.model, path, module.original_module)


def train_as_before(model: nn.Module) -> None:
    """Let the parameters of a model without adapters train or not as they did before PEFT froze them."""
    trained = vars(model).pop(TRAINABLE_BEFORE, None)
    for name, parameter in model.named_parameters():
        if trained is not None and parameter.is_floating_point():
            parameter.requires_grad_(name in trained)


def _tuner_of(model: nn.Module, adapter_name: str) -> Any:
    """The tuner of a model; transformers keeps none, so one is made around its model."""
    if isinstance(model, PeftModel):
        return model.base_model
    if isinstance(model, BaseTuner):
        return model
    kind = PEFT_TYPE_TO_TUNER_MAPPING[model.peft_config[adapter_name].peft_type]
    tuner = kind.__new__(kind)
    nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config = model, model.peft_config
    layers = [module for module in model.modules() if isinstance(module, kind.tuner_layer_cls)]
    tuner.active_adapter = [name for name in (layers[0].active_adapters if layers else ()) if name != adapter_name]
    return tuner


def _adapters_of(module: nn.Module) -> set[str]:
    """The adapters that a layer or a head is there for."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return set(module._get_available_adapters())
    if isinstance(module, BaseTunerLayer):
        # An embedding that looks up in the matrix of another one has none of its own.
        return {*module._all_available_adapter_names(), *getattr(module, "leaders", ())}
    return set()


def _put_back(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
