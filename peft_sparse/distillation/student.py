"""A student: the teacher's model with some of its layers, and everything else copied."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..checks import is_number, is_whole
from ..errors import ConfigError
from ..selection.anatomy import depths
from .resized import PLAIN, check_model, configs_of, follow_attributes, on_meta

logger = logging.getLogger(__name__)

# In the student's config, and so in its config.json: which layers of the teacher its own were, by index from 0.
LAYERS_KEY = "teacher_layers"
# Beside it: how many layers that teacher had, for the indices mean those of no other.
DEPTH_KEY = "teacher_num_layers"
COPIED, RANDOM = "copied", "random"


def make_student(
    model: PreTrainedModel,
    *,
    stride: int | None = None,
    layers: Sequence[int] | None = None,
    start: str = COPIED,
    dropout: float | None = 0.0,
) -> PreTrainedModel:
    """A model with some layers of another one: every `stride`-th with the last one among them, or those that are named.

    Student layer i is teacher layer (i + 1) * stride - 1, counted from 0. Embeddings, norms and heads are copied, and
    so is each layer's kind (local or global attention). Its config says which layers they were, under "teacher_layers".

    Args:
        model: the teacher's base model, without adapters: an encoder or a decoder. Not changed.
        stride: divides the number of layers.
        layers: instead of it, indices of the layers to keep, from 0, ascending.
        start: "copied", or "random" for the same shape with random weights throughout (the thesis's Scratch).
        dropout: of the student, everywhere; 0 as in the authors' training, for attention maps are compared after
            dropout. None leaves it as the model has it.

    Returns:
        the student, of the same class and dtype on the same device; all of its weights train. It shares no memory.

    Raises:
        ConfigError: both or neither of `stride` and `layers`, or ones that do not fit; a model whose layers are not one
            list (encoder-decoders), share weights, or depend on their position in another way than the config says.

    Source: BiStil (Ansell et al. 2023, arXiv:2306.01709), section 3.2; thesis 5.3.2. The authors' code leaves the
        layers random, in lines that are commented out; the paper and the thesis say copied.
    """
    check_model(model)
    if start not in (COPIED, RANDOM):
        raise ConfigError(f"start must be {COPIED!r} or {RANDOM!r}, got {start!r}.")
    if dropout is not None and not (is_number(dropout) and 0 <= dropout < 1):
        raise ConfigError(f"dropout must be in [0, 1) or None, got {dropout!r}.")
    stack, depth = stack_of(model)
    kept = _kept_layers(depth, stride, layers)
    config = copy.deepcopy(model.config)
    _slice_config(config.get_text_config(), kept, depth)
    before, after = on_meta(model, model.config), on_meta(model, config)
    _check_places(before, after, stack, kept)
    if start == RANDOM:
        student = type(model)._from_config(config).to(dtype=model.dtype, device=model.device)
    else:
        student = _copied(model, stack, kept)
        follow_attributes(student, before, after)
        lists = [one.get_submodule(stack) for one in (student, before, after)]
        for new, old in enumerate(kept):  # the numbers of layers, by which caches go
            follow_attributes(lists[0][new], lists[1][old], lists[2][new])
        for held in configs_of(student):
            if isinstance(held, type(config.get_text_config())):
                _slice_config(held, kept, depth)
    setattr(student.config, LAYERS_KEY, kept)
    setattr(student.config, DEPTH_KEY, depth)
    if dropout is not None:
        _set_dropout(student, dropout)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    logger.info("The student has the layers %s of %d", kept, depth)
    return student.train()


def stack_of(model: PreTrainedModel) -> tuple[str, int]:
    """(path of the list of layers, their number)."""
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{type(model).__name__} has an encoder and a decoder; students are made of one alone.")
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(f"{type(model).__name__} has layers that need others, or their own number: none can go.")
    depth = config.num_hidden_layers
    found = [stack for stack, count in depths(name for name, _ in model.named_parameters()).items() if count == depth]
    if len(found) != 1 or not isinstance(model.get_submodule(found[0]), nn.ModuleList):
        raise ConfigError(
            f"{type(model).__name__} must have its {depth} layers in one list, found {found or 'none'}: layers "
            "that share weights, or lie in several lists, cannot be left out."
        )
    return found[0], depth


def _kept_layers(depth: int, stride: int | None, layers: Sequence[int] | None) -> list[int]:
    if (stride is None) == (layers is None):
        raise ConfigError("give either stride=2 (every second layer) or layers=[1, 3, 5] (indices from 0).")
    if layers is None:
        if not is_whole(stride) or stride < 1 or depth % stride:
            fitting = [one for one in range(1, depth + 1) if depth % one == 0]
            raise ConfigError(f"stride must divide the {depth} layers, so be one of {fitting}, got {stride!r}.")
        return list(range(stride - 1, depth, stride))
    kept = list(layers)
    is_known = all(is_whole(one) and 0 <= one < depth for one in kept)
    if not kept or not is_known or kept != sorted(set(kept)):
        raise ConfigError(f"layers must be ascending indices of the {depth} layers, 0 to {depth - 1}, got {kept}.")
    return kept


def _copied(model: PreTrainedModel, stack: str, kept: Sequence[int]) -> PreTrainedModel:
    whole = model.get_submodule(stack)
    assert isinstance(whole, nn.ModuleList)
    memo: dict[int, Any] = {}
    # Under the same memo, so that what a layer shares with the rest of the model is shared in the copy.
    memo[id(whole)] = nn.ModuleList(copy.deepcopy(whole[index], memo) for index in kept)
    return copy.deepcopy(model, memo)


def _slice_config(config: PretrainedConfig, kept: Sequence[int], depth: int) -> None:
    """Write into a config how many layers there are, and of each what it says of it."""
    if config.num_hidden_layers != depth:
        return
    config.num_hidden_layers = len(kept)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and "layer" in key and key != LAYERS_KEY and len(value) == depth:
            setattr(config, key, [value[index] for index in kept])
    if isinstance(first := getattr(config, "max_window_layers", None), int):
        config.max_window_layers = sum(index < first for index in kept)


def _check_places(before: nn.Module, after: nn.Module, stack: str, kept: Sequence[int]) -> None:
    """Refuse a student in whose place the class would make a layer of another kind than the one that is copied."""
    olds, news = before.get_submodule(stack), after.get_submodule(stack)
    assert isinstance(olds, nn.ModuleList)
    assert isinstance(news, nn.ModuleList)
    for new, old in enumerate(kept):
        differing = _difference(olds[old], news[new], old, new)
        if differing is not None:
            raise ConfigError(
                f"layer {old} of {type(before).__name__} would be another one as layer {new} of the student: "
                f"{differing} depends on the place of a layer. Choose layers that keep their kind."
            )


def _difference(old: nn.Module, new: nn.Module, old_index: int, new_index: int) -> str | None:
    shapes = [{name: tuple(one.shape) for name, one in layer.named_parameters()} for layer in (old, new)]
    if shapes[0] != shapes[1]:
        return f"the shape of '{min(name for name, _ in shapes[0].items() ^ shapes[1].items())}'"
    for (name, module), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
        for key, value in vars(module).items():
            found = vars(other).get(key)
            is_index = (value, found) == (old_index, new_index)
            if isinstance(value, PLAIN) and value != found and not is_index:
                return f"'{name}.{key}' ({value!r}, {found!r})".replace("'.", "'")
    return None


def _set_dropout(model: nn.Module, dropout: float) -> None:
    for module in model.modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and (_is_dropout(key) or (is_dropout and key == "p")):
                setattr(module, key, dropout)
    for config in configs_of(model):
        for key, value in list(vars(config).items()):
            if isinstance(value, float) and _is_dropout(key):
                setattr(config, key, dropout)


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name or "drop_prob" in name or name == "layerdrop"
