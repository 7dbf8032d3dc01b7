"""A model's architecture without its weights: what its parameters are called, and which of them are one tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import ConfigError
from ..parsing import parser
from ..untrusted import UNREADABLE
from .tasks import BASE_CLASSES

# How many names an error lists.
_LISTED = 10
_MOST_LAYERS = 10_000


def read_config(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> PretrainedConfig:
    """A model's config, from a directory or the Hub; its weights are not looked at, and no code beside them is run.

    Raises:
        ConfigError: there is none, or its architecture is not one of transformers'.
    """
    where = os.fspath(path_or_id)
    if (where.startswith(("/", "./", "../", "~")) or where.count("/") > 1) and not os.path.isdir(where):
        raise ConfigError(f"there is no folder {where!r}: give the folder of a model or its id on the Hub.")
    try:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (*UNREADABLE, StrictDataclassError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{where!r} has no config of a transformers model: {reason}") from error


def class_name_of(config: PretrainedConfig, *, task_type: str | None = None) -> str:
    """The class of transformers that stands for a task (PEFT's `task_type`), or else the one that a config names.

    Raises:
        ConfigError: neither says.
    """
    if task_type in BASE_CLASSES:
        return BASE_CLASSES[task_type]
    for name in config.architectures or ():
        if _class_called(name) is not None:
            return name
    raise ConfigError(
        f"the class of the model is not known: its config names {config.architectures}, which transformers does not "
        f"have. Give a task, one of {list(BASE_CLASSES)}."
    )


def class_trained_on(adapter: Mapping[str, Any], config: PretrainedConfig) -> str | None:
    """The class of transformers that an adapter was trained on; None if its config does not say.

    Args:
        adapter: the content of its adapter_config.json.
        config: of the base model.

    Raises:
        ConfigError: as `class_name_of`.
    """
    mapping = adapter.get("auto_mapping") or {}
    if mapping.get("parent_library", "").startswith(("transformers", "peft_sparse.parsing")):
        return str(mapping["base_model_class"])
    task = adapter.get("task_type")
    return class_name_of(config, task_type=task) if task is not None else None


def skeleton(config: PretrainedConfig, class_name: str) -> PreTrainedModel:
    """A model on the meta device: names, shapes and ties of its parameters, and no memory.

    Args:
        config: its config.
        class_name: a class of transformers, "AutoModelForCausalLM" and its like included.

    Raises:
        ConfigError: transformers has no such class, or it does not take this config.
    """
    cls: Any = _class_called(class_name)
    if not isinstance(cls, type) or not (hasattr(cls, "from_config") or issubclass(cls, PreTrainedModel)):
        raise ConfigError(f"transformers has no model class {class_name!r}.")
    _check_layers(config)
    try:
        with torch.device("meta"):
            return cls.from_config(config) if not issubclass(cls, PreTrainedModel) else cls._from_config(config)
    except (*UNREADABLE, StrictDataclassError) as error:
        raise ConfigError(
            f"{class_name} cannot be made from a config of type {config.model_type!r}: {error}"
        ) from error


def _class_called(name: str) -> Any:
    """A class of transformers, or a parser of ours over one of its encoders; None if there is none."""
    return getattr(transformers, name, None) or getattr(parser, name, None)


def _check_layers(config: PretrainedConfig) -> None:
    """Refuse a config that claims more layers than any model has: building them would never end."""
    for name, value in config.to_dict().items():
        if "layer" in name and type(value) is int and value > _MOST_LAYERS:
            raise ConfigError(f"config.json says {name}={value}, and no model has more than {_MOST_LAYERS}.")


class Names:
    """From the names in a checkpoint, or in an adapter, to those of a model, as transformers maps them when it loads.

    That adds or strips the name of the base model ("bert.", "model."), renames what older versions called otherwise
    (LayerNorm.gamma), and fuses or splits tensors (experts).

    Args:
        model: the model, on the meta device.

    Attributes:
        parameters: {name in the model: parameter}, every name of a shared one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._known = model.state_dict()
        self._prefix = model.base_model_prefix
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def of_checkpoint(self, name: str) -> tuple[str, bool]:
        """(name in the model, whether the tensor goes into it as it is); a name that the model has not comes back."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)
        if renamed not in self._known and name in self._known:
            return self.of_adapter(name), True
        return renamed, pattern is None

    def of_adapter(self, name: str) -> str:
        """The name in this model of a parameter that an adapter of another class over the same base calls `name`."""
        renamed, _ = rename_source_key(name, [], [], self._prefix, self._known)
        return str(renamed)


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one tensor, for every tensor that has more than one name."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def labels_of_head(config: PretrainedConfig, model: nn.Module, heads: Mapping[str, Sequence[int]]) -> int | None:
    """The number of labels that a trained head has, where it is not the one that the config says.

    Args:
        config: what the model was made from.
        model: the model.
        heads: {name in the model: shape} of the head's tensors.
    """
    own = dict(model.named_parameters())
    found = {
        shape[0]
        for name, shape in heads.items()
        if name in own and shape and own[name].shape[0] == config.num_labels != shape[0]
    }
    return found.pop() if len(found) == 1 else None


def listed(items: Iterable[str]) -> str:
    """Names for an error, one a line, and how many more there are."""
    names = list(items)
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return "".join(f"\n  {line}" for line in [*names[:_LISTED], *more])
