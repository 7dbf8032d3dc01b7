"""Heads (`modules_to_save`) of an adapter that is loaded: what its file has and the model needs, before PEFT looks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping

from peft import PeftConfig
from torch import Tensor, nn

from ..._peft_bridge import BaseTunerLayer, ModulesToSaveWrapper
from ...checkpoints.tasks import HEADS
from ...checks import nearest
from ...core.names import is_trained_whole, unwrapped
from ...core.sharded import is_sharded
from ...errors import ConfigError, FormatError
from .base_model import modules_around_adapters
from .keys import embeddings_of

logger = logging.getLogger(__name__)


def check_heads(config: PeftConfig, model: nn.Module, adapter_name: str) -> None:
    """Bring a new adapter's `modules_to_save` in line with its file, and refuse what PEFT would fail at halfway.

    Args:
        config: the adapter's own copy of its config. PEFT's model for a task has added the task's heads to it; those
            of an adapter that was saved without any are taken out, and the base model's own act.
        model: the base model, still without the adapter.
        adapter_name: for the messages.

    Raises:
        ConfigError: a head is a module that another adapter tunes, or inside of a compiled model; or the model has
            none of the modules that a new adapter's config names.
        FormatError: the adapter's file lacks a head.
    """
    _drop_heads_of_the_task(config, adapter_name)
    held = config.held_in_file
    if held is None:
        _check_names(config, model, adapter_name)
    for path, name, module in _named_by(config.modules_to_save or (), model):
        if isinstance(module, BaseTunerLayer):
            raise ConfigError(
                f"modules_to_save of adapter {adapter_name!r} names {path}, which another adapter of this model tunes: "
                f"a module can be tuned or trained whole, not both. Leave it out there with exclude_modules=[{path!r}]."
            )
        if held is None or name not in config.saved_heads:
            continue
        if path != unwrapped(path):
            raise ConfigError(
                f"{path} is inside of a compiled model, where PEFT does not find the heads of an adapter's file. Load "
                "the adapter into the model as it was before torch.compile and compile the result, or compile in place "
                "with model.compile()."
            )
        for key in module.state_dict():
            if f"{path}.{key}" not in held:
                raise FormatError(
                    f"the file of adapter {adapter_name!r} has no '{path}.{key}', which its config says is "
                    "trained whole (modules_to_save, task_type). Nothing was loaded. Save it again from the model that "
                    "trained it, or set both fields to null in adapter_config.json if it was trained without a head."
                )


def check_shapes(tuner: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Compare heads that are about to be loaded with the model's, before the first tensor is copied.

    Args:
        tuner: the tuner, which holds the base model.
        state_dict: what is loaded, by key.
        prefix: the tuner's own path in these keys, with its dot.

    Raises:
        FormatError: the shapes differ.
    """
    vocabulary = {id(module) for module in embeddings_of(tuner.model)}
    for path, wrapper in modules_around_adapters(tuner.model):
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        original = wrapper.original_module
        is_vocabulary = id(wrapper) in vocabulary or id(original) in vocabulary
        for name, own in wrapper.modules_to_save.named_parameters():
            given = state_dict.get(f"{prefix}model.{path}.modules_to_save.{name}")
            if given is None or is_sharded(own) or is_sharded(given) or own.shape == given.shape:
                continue
            way_out = (
                f"Give the base model the vocabulary of the training run first: resize_token_embeddings({len(given)})."
                if is_vocabulary and own.shape[1:] == given.shape[1:]
                else "Build the base model as in training (for a classifier, with the same num_labels)."
            )
            raise FormatError(
                f"the head tensor '{unwrapped(path)}.{name.partition('.')[2]}' has shape {tuple(given.shape)} in "
                f"the file and {tuple(own.shape)} in this model. Nothing was loaded. {way_out}"
            )


def _check_names(config: PeftConfig, model: nn.Module, adapter_name: str) -> None:
    """Tell of heads that the model does not have: PEFT would train none, and say nothing."""
    of_tasks = {head for heads in HEADS.values() for head in heads}
    names = list(config.modules_to_save or ())
    paths = [unwrapped(path) for path, _ in modules_around_adapters(model)]
    found = [name for name in names if any(is_trained_whole(path, [name]) for path in paths)]
    missing = [name for name in names if name not in found and name not in of_tasks]
    if not missing:
        return
    endings = {path.rpartition(".")[2] for path in paths if path}
    hints = "".join(nearest(name, endings) for name in missing)
    said = f"modules_to_save of adapter {adapter_name!r}: no module of the model is called {missing}.{hints}"
    if not found:
        raise ConfigError(f"{said} Nothing would be trained whole.")
    logger.warning("%s", said)


def _drop_heads_of_the_task(config: PeftConfig, adapter_name: str) -> None:
    if config.saved_heads is None or config.task_type in HEADS:
        return
    added = {head for heads in HEADS.values() for head in heads} - config.saved_heads
    kept = [name for name in config.modules_to_save or () if name not in added]
    if len(kept) < len(config.modules_to_save or ()):
        config.modules_to_save = kept or None
        logger.info("Adapter %r was saved without a head: the base model's own acts with it.", adapter_name)


def _named_by(names: Collection[str], model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(path, name, module) of what PEFT is going to copy for an adapter, as the base model has it."""
    for path, module in modules_around_adapters(model):
        name = next((name for name in names if is_trained_whole(path, [name])), None)
        if name is not None:
            yield path, name, module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def with_heads(config: PeftConfig) -> list[str] | None:
    """`modules_to_save` of a config, with the heads that PEFT adds for its task.

    For some tasks it does so once the adapter is in, to the config that it was given: too late for the tuner's copy.
    """
    own = list(config.modules_to_save or ())
    heads = HEADS.get(config.task_type or "", ())
    return [*own, *(head for head in heads if head not in own)] or config.modules_to_save
