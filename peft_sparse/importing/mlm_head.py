"""The head of a masked language model, which language adapters of composable-sft hold whole.

PEFT saves modules whole, and this head is none: it shares its matrix with the embeddings, and the file lacks what was
frozen. So it becomes a difference from the base model's own head, whose weights have to be at hand for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..checkpoints.architecture import Names, listed, skeleton
from ..checkpoints.shards import Checkpoint
from ..core.delta import SparseDelta
from ..core.exact_difference import values_between
from ..errors import ConfigError, FormatError
from ..extraction.skeleton import Skeleton

_CLASS = "AutoModelForMaskedLM"


def differences_of_head(
    heads: Mapping[str, Tensor], config: PretrainedConfig, *, base: str, revision: str | None, source: str
) -> tuple[dict[str, SparseDelta], dict[str, str]]:
    """What leads from the base model's head to the trained one.

    Args:
        heads: {parameter: tensor} of the trained head.
        config: of the base model.
        base: folder or Hub id of the base model, whose weights are read.
        revision: of it on the Hub.
        source: what errors call the adapter.

    Returns:
        the differences, under names that a sparse adapter can hold; PEFT's `auto_mapping`, which says the class.

    Raises:
        ConfigError: the weights of the base cannot be had.
        FormatError: its head is another.
    """
    try:
        checkpoint = Checkpoint(base, revision=revision)
    except FormatError as error:
        raise ConfigError(
            f"with_head: the head of a masked language model is kept as a difference from the base's own, whose "
            f"weights are needed for that. {error}"
        ) from error
    model = Skeleton.of(skeleton(config, _CLASS))
    names = Names(model.model)
    stored = {names.of_checkpoint(name)[0]: name for name in checkpoint.names()}
    tunable = model.tunable()
    deltas, problems = {}, list[str]()
    for name, tensor in heads.items():
        aliases = model.aliases.get(name, ())
        own = next((alias for alias in aliases if alias in tunable), None)
        here = next((stored[alias] for alias in aliases if alias in stored), None)
        if own is None or here is None:
            problems.append(f"{name}: not in {base}")
        elif checkpoint.shape(here) != tuple(tensor.shape):
            problems.append(f"{name}: {list(tensor.shape)} in the adapter, {list(checkpoint.shape(here))} in the base")
        else:
            deltas[own] = _difference(checkpoint.tensor(here), tensor)
    if problems:
        raise FormatError(f"the head of {source} does not fit {base}. Nothing was written.{listed(problems)}")
    kind = type(model.model)
    return deltas, {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _difference(base: Tensor, tuned: Tensor) -> SparseDelta:
    """Exact wherever float32 can be."""
    values, _ = values_between(base, tuned, dtype=torch.float32)
    return SparseDelta.from_dense(values)
