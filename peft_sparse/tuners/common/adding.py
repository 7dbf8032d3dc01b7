"""Adding an adapter to a tuner: whole, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTunerLayer
from .adapter_names import check_adapter_name
from .base_model import modules_around_adapters
from .heads_in_files import check_heads, with_heads
from .made_for_file import note_new
from .removal import TRAINABLE_BEFORE, take_off, unload_as_before
from .stacked_heads import set_heads

if TYPE_CHECKING:
    from .tuner import AdapterTuner


@contextmanager
def adding(tuner: AdapterTuner, model: nn.Module, adapter_name: str) -> Iterator[Any]:
    """Give an adapter that PEFT adds to a tuner a config of its own; if it fails, the model is as it was before."""
    held = Held(tuner.model, adapter_name)
    is_first = len(tuner.peft_config) == 1 and not held
    named = model.named_parameters(remove_duplicate=False)
    before = [(name, parameter, parameter.requires_grad) for name, parameter in named]
    around = {id(module) for module in model.modules()}
    with ExitStack() as undo:
        undo.callback(_let_train, before)
        undo.callback(_take_out, tuner, adapter_name, is_first=is_first, around=around, held=held)
        config = tuner.peft_config[adapter_name] = copy.deepcopy(tuner.peft_config[adapter_name])
        config.modules_to_save = with_heads(config)
        check_adapter_name(adapter_name, tuner.peft_config.values())
        check_heads(config, model, adapter_name)
        if is_first:
            # What a refused file gives back, for PEFT freezes the base model first. transformers keeps no tuner.
            setattr(model, TRAINABLE_BEFORE, {name for name, _, requires_grad in before if requires_grad})
        yield config
        note_new(tuner, config, adapter_name)
        undo.pop_all()
    if not is_first:
        # PEFT activates the rows of trained tokens in an output layer that is tied, whatever adapter is active.
        set_heads(tuner, tuner.active_adapters)
        # PEFT restores what trains and what does not but for parameters whose paths hold the new adapter's name.
        _let_train(before)


def _let_train(before: list[tuple[str, nn.Parameter, bool]]) -> None:
    for _, parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


class Held:
    """The adapter of the same name that a model has when `get_peft_model` is called on it once more.

    True if there is one.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self._adapter_name = adapter_name
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        layers = [layer for _, layer in modules_around_adapters(model) if isinstance(layer, kinds)]
        self._active = [(layer, layer._active_adapter) for layer in layers]
        slots = [layer._modules.get(name) for layer in layers for name in layer.adapter_layer_names]
        self._slots = [(s, s._modules.get(adapter_name)) for s in slots if isinstance(s, nn.ModuleDict)]

    def __bool__(self) -> bool:
        return any(part is not None for _, part in self._slots)

    def put_back(self) -> None:
        """Put its parts where they were, in the place of what was half added."""
        for slot, part in self._slots:
            slot._modules.pop(self._adapter_name, None)
            if part is not None:
                slot[self._adapter_name] = part
        for layer, active in self._active:
            layer._active_adapter = active


def _take_out(tuner: AdapterTuner, adapter_name: str, *, is_first: bool, around: Collection[int], held: Held) -> None:
    """Take an adapter that was half added out of a tuner and its model.

    Args:
        tuner: the tuner.
        adapter_name: the adapter.
        is_first: whether it has no other.
        around: ids of the modules that were there before.
        held: the adapter of this name that the model had.
    """
    if held:
        take_off(tuner, [module for module in tuner.model.modules() if id(module) not in around])
        held.put_back()
        return
    is_touched = any(adapter_name in layer._all_available_adapter_names() for layer in tuner.tuned_layers())
    if is_touched and is_first:
        unload_as_before(tuner)
    elif is_touched:
        tuner.delete_adapter(adapter_name)
        take_off(tuner, [module for module in tuner.model.modules() if id(module) not in around])
    # PEFT has entered the name already; without an adapter behind it the model would be unusable.
    if not is_first:
        tuner.peft_config.pop(adapter_name, None)
