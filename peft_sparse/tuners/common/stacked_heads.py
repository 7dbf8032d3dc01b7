"""Heads (`modules_to_save`) where several adapters are active: a module can have one at a time, the last adapter's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer, ModulesToSaveWrapper
from ...errors import ConfigError

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
    layers = tuner.around.of_kind(tuner.tuner_layer_cls)
    hidden = set_heads(tuner, names, inference_mode=inference_mode)
    merged = [layer for layer in tuner.around.of_kind(BaseTunerLayer) if layer.merged]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
        tuner.unmerge_layers(merged)
    for layer in layers:
        layer.set_adapter(names, inference_mode=inference_mode)
    tuner.active_adapter = adapter_name if isinstance(adapter_name, str) else names
    for name, last in hidden.items():
        logger.info("Adapter %r has a head of its own, but that of %r acts, the last of the active ones.", name, last)


def check_rows_to_merge(tuner: AdapterTuner, names: Sequence[str]) -> None:
    """Refuse to merge adapters that have rows of the same trained token, with PEFT's ValueError."""
    for module in _wrappers_of_tokens(tuner):
        module.token_adapter._check_overlapping_tokens(_having(module, names))


def set_heads_to_merge(tuner: AdapterTuner, names: Sequence[str]) -> None:
    """Activate what adapters have beside their own layers, for a merge; of trained tokens the rows of all of them."""
    tokens = _wrappers_of_tokens(tuner)
    for module in tokens:
        module.token_adapter.set_adapter(_having(module, names), inference_mode=True)
    set_heads(tuner, names, inference_mode=True, apart_from=tokens)


def _wrappers_of_tokens(tuner: AdapterTuner) -> list[AuxiliaryTrainingWrapper]:
    found = tuner.around.of_kind(AuxiliaryTrainingWrapper)
    return [module for module in found if not isinstance(module, ModulesToSaveWrapper)]


def _having(module: AuxiliaryTrainingWrapper, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in module._get_available_adapters()]


def set_heads(
    tuner: AdapterTuner,
    names: Sequence[str],
    *,
    inference_mode: bool = False,
    apart_from: Collection[nn.Module] = (),
) -> dict[str, str]:
    """Activate the heads of adapters, without the adapters themselves; their rows of trained tokens as well.

    Args:
        tuner, names, inference_mode: as for `set_adapters`.
        apart_from: modules that are left alone.

    Returns:
        {adapter: the one whose head acts in the place of its own}.
    """
    hidden: dict[str, str] = {}
    for module in tuner.around.of_kind(AuxiliaryTrainingWrapper):
        if module in apart_from:
            continue
        own = list(names)
        if isinstance(module, ModulesToSaveWrapper):
            having = [name for name in dict.fromkeys(names) if name in module.modules_to_save]
            hidden.update(dict.fromkeys(having[:-1], having[-1] if having else ""))
            own = [name for name in names if name not in having[:-1]]
        chosen = module.check_set_adapter(own)
        module.set_adapter(chosen if chosen in module._get_available_adapters() else [], inference_mode=inference_mode)
    return hidden


def check_heads_of_merged(tuner: AdapterTuner, names: Sequence[str]) -> None:
    """Refuse to merge adapters whose head is not the one that acts.

    Heads are not merged: the merged weights would be computed with the head of the active adapters.

    Raises:
        ConfigError: so it would be.
    """
    layers = tuner.around.of_kind(tuner.tuner_layer_cls)
    together = [*dict.fromkeys(name for layer in layers for name in layer.merged_adapters), *names]
    for module in tuner.around.of_kind(AuxiliaryTrainingWrapper):
        having = _having(module, together)
        acting = list(module.active_adapters)
        if isinstance(module, ModulesToSaveWrapper) and having and acting != having[-1:]:
            raise ConfigError(
                f"merge_adapter({list(names)}) would put the weights of {having[-1]!r} under the head of "
                f"{acting[0] if acting else 'the base model'!r}, for heads (modules_to_save) follow the active "
                f"adapters. Call set_adapter({having[-1]!r}) first."
            )
        if others := [name for name in acting if name not in together]:
            logger.warning("Merging %s: heads and token rows of %s, which is active, go on acting.", names, others)


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
