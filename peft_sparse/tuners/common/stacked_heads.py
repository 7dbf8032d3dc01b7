"""Heads (`modules_to_save`) where several adapters are active: a module can have one at a time, the last adapter's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner, ModulesToSaveWrapper

if TYPE_CHECKING:
    from .tuner import AdapterTuner

logger = logging.getLogger(__name__)


def set_adapters(tuner: AdapterTuner, adapter_name: str | Sequence[str], *, inference_mode: bool = False) -> None:
    """Activate adapters as PEFT's `BaseTuner.set_adapter` does, which refuses several with heads for the same module.

    Args:
        tuner: the model that holds them.
        adapter_name: a name, or several in order. Where several of them have a head for the same module, that of the
            last acts, and one line of the log says so.
        inference_mode: whether what is activated stays frozen.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    around = tuner.around
    layers = around.of_kind(tuner.tuner_layer_cls)
    hidden: dict[str, str] = {}
    for module in around.of_kind(AuxiliaryTrainingWrapper):
        own = adapter_name
        if isinstance(module, ModulesToSaveWrapper):
            having = [name for name in dict.fromkeys(names) if name in module.modules_to_save]
            if len(having) > 1:
                hidden.update(dict.fromkeys(having[:-1], having[-1]))
                own = [name for name in names if name not in having[:-1]]
        chosen = module.check_set_adapter(own)
        module.set_adapter(chosen if chosen in module._get_available_adapters() else [], inference_mode=inference_mode)
    merged = [layer for layer in layers if layer.merged]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
        tuner.unmerge_layers(merged)
    for layer in layers:
        layer.set_adapter(names, inference_mode=inference_mode)
    tuner.active_adapter = adapter_name if isinstance(adapter_name, str) else names
    for name, last in hidden.items():
        logger.info("Adapter %r has a head of its own, but that of %r acts, the last of the active ones.", name, last)


def delete_heads(tuner: BaseTuner, adapter_name: str, left: Sequence[str]) -> None:
    """Take an adapter's heads out where several adapters stay active, which PEFT's `delete_adapter` cannot.

    Args:
        tuner: the model.
        adapter_name: the adapter that is about to be deleted.
        left: the adapters that will be active, in order; the last of them that has a head takes over.
    """
    merged = any(adapter_name in getattr(module, "merged_adapters", ()) for module in tuner.model.modules())
    if len(left) < 2 or merged or adapter_name not in tuner.peft_config:
        return
    for wrapper in _wrappers(tuner.model):
        if adapter_name in wrapper.modules_to_save:
            having = [name for name in left if name in wrapper.modules_to_save]
            wrapper.delete_adapter(adapter_name, having[-1:] if wrapper.active_adapters else None)


def _wrappers(model: nn.Module) -> Iterator[ModulesToSaveWrapper]:
    yield from (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
