"""Adapters in a checkpoint, in PEFT's files: where each lies, how it gets there, and back into a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict

from ...tuners.common.adapter_config import active_adapters_of, carrier_of, is_of_transformers
from .completeness import holds_adapter, naming

logger = logging.getLogger(__name__)


def folders_of(model: Any, adapters: Sequence[str]) -> dict[str, str]:
    """{adapter: its folder, in a checkpoint of the model}, as PEFT lays them out: "default" lies in the checkpoint
    itself. So does, whatever its name, the only active one of a model that transformers gave adapters.
    """
    is_alone = is_of_transformers(model) and len(active_adapters_of(model)) == 1
    return {name: "" if is_alone or name == "default" else name for name in adapters}


def save_adapter(model: Any, folder: str, adapter: str) -> None:
    """Save one of a model's active adapters where `load_adapters` finds it."""
    model = carrier_of(model)
    if is_of_transformers(model):
        _save_alone(model, model.save_pretrained, folder, adapter)
    else:
        model.save_pretrained(folder, selected_adapters=[adapter])


@contextmanager
def saving_each(model: Any) -> Iterator[None]:
    """While open, `save_pretrained` of a transformers model writes all of its active adapters, which it refuses by
    itself, as a `PeftModel` does: each into a folder of its own.

    Args:
        model: whatever carries adapters, or none; nothing changes for one with a single one, and for a `PeftModel`.
    """
    model = carrier_of(model)
    active = active_adapters_of(model)
    if not is_of_transformers(model) or len(active) < 2:
        yield
        return
    save_active = model.save_pretrained

    def save_pretrained(folder: str, **options: Any) -> None:
        for name in active:
            _save_alone(model, save_active, folder, name, **options)

    with _shadowed(model, save_pretrained=save_pretrained):
        yield


def _save_alone(model: Any, save: Callable[..., None], folder: str, adapter: str, **options: Any) -> None:
    """Save one of a transformers model's active adapters by its own `save_pretrained`, which sees no other."""
    own = os.path.join(folder, folders_of(model, [adapter])[adapter])
    with _shadowed(model, active_adapters=lambda: [adapter]):
        save(own, **options)


@contextmanager
def _shadowed(model: Any, **methods: Any) -> Iterator[None]:
    before = {name: vars(model)[name] for name in methods if name in vars(model)}
    vars(model).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(model)[name]
        vars(model).update(before)


def load_adapters(model: Any, folder: str, adapters: Sequence[str]) -> None:
    """Load adapters and heads. All are read before one is changed; one that was added later starts afresh.

    Raises:
        FormatError: a file is damaged.
    """
    model = carrier_of(model)
    folders = {name: os.path.join(folder, own) for name, own in folders_of(model, adapters).items()}
    known = {name: own for name, own in folders.items() if holds_adapter(own)}
    for name in set(adapters) - set(known):
        logger.warning("adapter %r is not in %s: it starts afresh.", name, folder)
    loaded = {name: _read(own) for name, own in known.items()}
    for name, tensors in loaded.items():
        set_peft_model_state_dict(model, tensors, adapter_name=name)


def _read(folder: str) -> dict[str, Any]:
    with naming(folder):
        return load_peft_weights(folder, device="cpu")
