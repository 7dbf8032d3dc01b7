"""The architecture of a checkpoint without its weights: what parameters there are, and what can be done with each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.architecture import Names, skeleton, tied_groups
from ..checkpoints.tasks import HEADS
from ..errors import ConfigError, FormatError
from ..tuners.common.target_checks import warn_of_exclusions
from ..tuners.common.targets import find_targets, is_excluded, is_left_out_norm, is_linear
from ..tuners.sparse_ft.configs.base import SparseConfig
from ..tuners.sparse_ft.layers.base import PARAMETERS
from ..tuners.sparse_ft.layers.dispatch import wrapper_for
from ..untrusted import UNREADABLE

# PEFT's task type by the ending of the architecture's name.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have shapes and no data.

    Attributes:
        model: the transformers model, on the meta device.
        task_type: PEFT's; None where it has none for this architecture.
        shapes: {name: shape} of all parameters, in the order of the model, tied ones under each of their names.
        aliases: {name of a parameter: names of all that share its memory, itself included}.
    """

    model: PreTrainedModel
    task_type: str | None
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Skeleton:
        """The skeleton that a model on the meta device is."""
        name = type(model).__name__
        task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
        if task is None and getattr(model.config, "is_encoder_decoder", False) and "Conditional" in name:
            task = "SEQ_2_SEQ_LM"
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
        tied = {name: tuple(group) for group in tied_groups(model) for name in group}
        return cls(model, task, shapes, {name: tied.get(name, (name,)) for name in shapes})

    @property
    def prefix(self) -> str:
        """Path of the model without its head, with a dot; of a model without a head, what a headed one would have."""
        return f"{self.model.base_model_prefix}."

    @property
    def has_head(self) -> bool:
        """Whether there is anything beside the model of that path."""
        return isinstance(getattr(self.model, self.model.base_model_prefix, None), nn.Module)

    def names_in(self, names: Iterable[str]) -> dict[str, str]:
        """{name in the model: name in a checkpoint of it, with another head or none}, as transformers loads one.

        Tensors that it cuts up or joins as it loads them (fused experts) keep their names, which no parameter has.
        """
        own = Names(self.model)
        found = {}
        for name in names:
            renamed, is_whole = own.of_checkpoint(name)
            found[renamed if is_whole else name] = name
        return found

    def forced_heads(self) -> list[str]:
        """The modules that PEFT saves whole whatever the config says, for this task."""
        return [name for name in HEADS.get(self.task_type or "", ()) if hasattr(self.model, name)]

    def tunable(self) -> dict[str, tuple[str, ...]]:
        """The parameters that a sparse adapter can hold, in the order of the model, each with those it stands for.

        Of embeddings that share one matrix the first stands for all, as in the tuner. An output layer tied to it is
        listed beside it, for an adapter acts on each of the two uses separately.
        """
        modules = dict(self.model.named_modules())
        found: dict[str, tuple[str, ...]] = {}
        done: set[str] = set()
        for name in self.shapes:
            path, _, part = name.rpartition(".")
            if part not in PARAMETERS or not path or name in done:
                continue
            try:
                wrapper_for(modules[path], path)
            except ConfigError:
                continue
            same = [n for n in self.aliases[name] if isinstance(modules[n.rpartition(".")[0]], nn.Embedding)]
            found[name] = tuple(same) if name in same else (name,)
            done.update(found[name])
        return found

    def targets(self, config: SparseConfig) -> list[str]:
        """The tunable parameters that a config targets; all of them if it names none."""
        if _targets_everything(config):
            warn_of_exclusions(config.exclude_modules, (name for name, _ in self.model.named_modules()))
            return [name for name in self.tunable() if not self._is_excluded(config, name)]
        wanted = {f"{path}.{part}" for path, parts in find_targets(config, self.model).items() for part in parts}
        return [name for name, same in self.tunable().items() if wanted.intersection(same)]

    def untunable(self, config: SparseConfig, names: Iterable[str]) -> list[str]:
        """Those of the names that a config would target if a sparse adapter could hold them, tied ones once.

        That can only be told where the config targets everything; what rules name is known to be tunable.
        """
        if not _targets_everything(config):
            return []
        tunable = {name for same in self.tunable().values() for name in same}
        return [
            name
            for name in names
            if name == self.aliases[name][0]
            and not tunable.intersection(self.aliases[name])
            and not self._is_excluded(config, name)
        ]

    def _is_excluded(self, config: SparseConfig, name: str) -> bool:
        path = name.rpartition(".")[0]
        return is_excluded(config, path) or is_left_out_norm(config, self.model.get_submodule(path))

    @property
    def numel(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def linear_names(self, names: Iterable[str]) -> set[str]:
        """Those of the names that are two-dimensional weights of linear layers."""
        modules = dict(self.model.named_modules())
        return {n for n in names if len(self.shapes[n]) == 2 and is_linear(modules[n.rpartition(".")[0]])}


def _targets_everything(config: SparseConfig) -> bool:
    return config.target_modules is None and not (config.target_parameters or config.target_norms)


def skeleton_of(config: Mapping[str, Any], *, source: str) -> Skeleton:
    """Build the skeleton that a config.json describes.

    Args:
        config: its content.
        source: what errors call the checkpoint.

    Raises:
        FormatError: there is no config, or the class that it names is not one of transformers' own.
    """
    if not config:
        raise FormatError(
            f"{source} has no config.json, which says what model the tensors belong to. Save the model with "
            "save_pretrained, or put its config.json beside the weights."
        )
    name = next(iter(config.get("architectures") or ()), None)
    kind = getattr(transformers, name, None) if name else None
    if kind is None or not hasattr(kind, "base_model_prefix"):
        raise FormatError(
            f"{source}: config.json names the architecture {name!r}, which is none of transformers' own; code that "
            "comes with a checkpoint is never run here. Set 'architectures' to the class that loads it, such as "
            "['LlamaForCausalLM']."
        )
    try:
        made = kind.config_class.from_dict(dict(config))
    except (*UNREADABLE, StrictDataclassError) as error:
        raise FormatError(f"{source}: config.json is no config of a {name}: {error}") from error
    return Skeleton.of(skeleton(made, name))
