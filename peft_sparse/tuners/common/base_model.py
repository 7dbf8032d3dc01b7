"""The base model, whatever it is wrapped in, and its modules and tuned layers by their paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from peft import PeftModel
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer, TrainableTokensLayer
from ...core.names import path_of_layer

_Layer = TypeVar("_Layer", bound=nn.Module)


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel, a tuner, the wrapper of a compiled or distributed one, or a module of the
    user's own in which it is the only part with adapters (an encoder under a head); else the model.
    """
    found = base_models_in(model)
    return found[0] if len(found) == 1 else outer_base_model_of(model)


def base_models_in(model: nn.Module) -> list[nn.Module]:
    """The base models of all parts of a model that carry adapters; its own, if it carries them or nothing does."""
    model = outer_base_model_of(model)
    return [outer_base_model_of(part) for part in carriers_in(model)] or [model]


def outer_base_model_of(model: nn.Module) -> nn.Module:
    """As `base_model_of`, without a look at parts: the model that a new adapter would tune."""
    while True:
        if isinstance(model, PeftModel):
            model = model.base_model
        elif isinstance(model, BaseTuner):
            model = model.model
        elif (inside := uncompiled(model)) is not model:
            model = inside
        elif _is_wrapper(model):
            model = model.module
        else:
            return model


def carries_adapters(module: nn.Module) -> bool:
    """Whether a module itself, and not a part of it, is what carries adapters: PEFT notes their configs there."""
    return isinstance(module, (PeftModel, BaseTuner)) or isinstance(vars(module).get("peft_config"), dict)


def carriers_in(model: nn.Module) -> list[nn.Module]:
    """The models that carry adapters, outermost ones alone: the model itself, or parts of it.

    None where adapters are being added to the model itself: they act on its layers before it carries them. Of a
    `PeftModel` and its base model, if a module holds both, the former counts.
    """
    found: dict[int, nn.Module] = {}  # by the base model
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, BaseTunerLayer):
            return []
        if id(module) in seen:
            continue
        seen.add(id(module))
        if carries_adapters(module):
            base = outer_base_model_of(module)
            if module is not base or id(base) not in found:
                found[id(base)] = module
        else:
            waiting += reversed([child for child in module._modules.values() if child is not None])
    return list(found.values())


def uncompiled(model: Any) -> Any:
    """The model inside torch.compile's wrapper; without one the model itself."""
    # Not its attribute: a PeftModel hands on those of a compiled base model.
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def _is_wrapper(model: nn.Module) -> bool:
    """Whether a model wraps another one: DDP, or an engine that hands on the attributes of what is inside."""
    inside = getattr(model, "module", None)
    return isinstance(inside, (PeftModel, BaseTuner)) or (
        isinstance(inside, nn.Module) and not hasattr(model, "config")
    )


def modules_around_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without the adapters inside of tuner layers: the cost does not grow with their number."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        slots = module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ()
        inside = [(name, child) for name, child in module._modules.items() if child is not None and name not in slots]
        waiting += [(f"{path}.{name}" if path else name, child) for name, child in reversed(inside)]


class KnownModules:
    """What `modules_around_adapters` finds in a model, kept until the children of a module change.

    For what is asked of a whole model at every switch of adapters. A copy knows nothing.

    Attributes:
        modules: what was found last, in the order of the model; not to be changed.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._model: nn.Module | None = None
        self._children: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
        self._of_kind: dict[type, list[Any]] = {}

    def __reduce__(self) -> tuple[type[KnownModules], tuple[()]]:
        return KnownModules, ()

    def see(self, model: nn.Module) -> KnownModules:
        """Walk over the model again if anything in it has changed; returns itself."""
        if model is not self._model or any(module._modules != held for module, held in self._children):
            self.modules = [module for _, module in modules_around_adapters(model)]
            self._children = [(module, dict(module._modules)) for module in self.modules]
            self._model, self._of_kind = model, {}
        return self

    def of_kind(self, kind: type[_Layer]) -> list[_Layer]:
        """Those of a class, as they were seen last; not to be changed."""
        found = self._of_kind.get(kind)
        if found is None:
            found = self._of_kind[kind] = [module for module in self.modules if isinstance(module, kind)]
        return found


def modules_of_adapter(model: nn.Module, adapter_name: str) -> Iterator[nn.Module]:
    """What an adapter itself consists of, whatever its type: what it has in each tuner layer, and its heads."""
    for _, module in modules_around_adapters(model):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            slots = [module._modules.get(name) for name in module.adapter_layer_names]
            held = [slot for slot in slots if isinstance(slot, nn.ModuleDict) and adapter_name in slot]
            yield from (slot[adapter_name] for slot in held)


def tensors_of_adapter(model: nn.Module, adapter_name: str) -> Iterator[Tensor]:
    """Parameters and buffers of what an adapter consists of, heads and rows of trained tokens among them."""
    for module in modules_of_adapter(model, adapter_name):
        yield from module.parameters()
        yield from module.buffers()
    for _, layer in modules_around_adapters(model):
        if isinstance(layer, TrainableTokensLayer) and adapter_name in layer.trainable_tokens_delta:
            yield layer.trainable_tokens_delta[adapter_name]


def iter_tuned(model: nn.Module, kind: type[_Layer]) -> Iterator[tuple[str, _Layer]]:
    """(path in the base model, layer) of every tuned layer of a kind, in the order of the model."""
    for name, module in modules_around_adapters(base_model_of(model)):
        if isinstance(module, kind):
            yield path_of_layer(name), module
