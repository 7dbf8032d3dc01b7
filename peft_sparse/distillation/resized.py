"""A copy of a model with other sizes: its own class says which tensors, attributes and config entries follow."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .._peft_bridge import BaseTunerLayer
from ..checks import is_whole
from ..errors import ConfigError

# Entries of configs that hold ids, but for those called "..._token_id", "..._token_ids" and "..._token_index".
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids")
# Those that hold {language or task: id} (Whisper, SeamlessM4T).
_MAPPINGS = ("lang_to_id", "task_to_id", "text_decoder_lang_to_code_id")
PLAIN = (int, float, str, bool, tuple, type(None))


def check_model(model: object) -> None:
    """Refuse what has no plain weights to cut.

    Raises:
        ConfigError: it is no model of transformers, has adapters in it, or is quantised.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if isinstance(model, PeftModel) or any(isinstance(one, BaseTunerLayer) for one in parts):
        raise ConfigError(
            "model must be the base model without adapters: merge_and_unload() or unload() them first, or load the "
            "base model anew. Saved adapters follow by reduce_adapter."
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model must be a model of transformers (PreTrainedModel), got {type(model).__name__}.")
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        raise ConfigError("model is quantised. Take the unquantised one, save the result, and quantise that.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("model has parameters without data (meta device). Load it without offloading.")


# Shapes


def with_rows(
    model: PreTrainedModel, rows: Tensor, new_ids: Mapping[int, int]
) -> tuple[PreTrainedModel, dict[str, int]]:
    """A copy of a model that has only some rows of its vocabulary.

    Args:
        model: the model; not changed.
        rows: [n] int64, the old row of each new one.
        new_ids: {old id: new id}.

    Returns:
        the copy, and {tensor: dimension} of what was cut.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    config = copy.deepcopy(model.config)
    _renumber(config, new_ids, old_size, len(rows))
    before, after = on_meta(model, model.config), on_meta(model, config)
    tensors = _cut_dimensions(model, before, after, old_size, len(rows))
    own = dict(_tensors(model))
    memo: dict[int, Any] = {}
    for name, dimension in tensors.items():
        old = own[name]
        if id(old) not in memo:
            memo[id(old)] = _like(old, old.detach().index_select(dimension, rows.to(old.device)))
    kept_alive = list(own.values())  # deepcopy's memo goes by ids, which are those of living objects only
    reduced = copy.deepcopy(model, memo)
    del kept_alive
    for held in configs_of(reduced):
        _renumber(held, new_ids, old_size, len(rows))
    follow_attributes(reduced, before, after)
    return reduced, tensors


def on_meta(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """What the model's class makes of a config, without memory."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(config))


def follow_attributes(model: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Give the modules of a model the plain attributes that two configs make different: sizes, ids, numbers of layers.

    Args:
        model: its modules are changed.
        before, after: what its class makes of the old config and of the new one.
    """
    olds, news = dict(before.named_modules()), dict(after.named_modules())
    for name, module in model.named_modules():
        old, new = vars(olds[name]), vars(news[name])
        for key, value in new.items():
            if isinstance(value, PLAIN) and key in old and old[key] != value:
                setattr(module, key, value)


def _cut_dimensions(
    model: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel, old_size: int, new_size: int
) -> dict[str, int]:
    found = {}
    own, olds, news = (dict(_tensors(one)) for one in (model, before, after))
    for name, tensor in own.items():
        old, new = (None if name not in ones else tuple(ones[name].shape) for ones in (olds, news))
        if old is None or new is None or old != tuple(tensor.shape):
            raise ConfigError(
                f"{type(model).__name__} made from its own config has other tensors than the model: '{name}' is "
                f"{tuple(tensor.shape)} in the model and {old} by the config. Save the model, load it anew, try again."
            )
        differing = [place for place, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        if differing and (len(differing) > 1 or (old[differing[0]], new[differing[0]]) != (old_size, new_size)):
            raise ConfigError(f"'{name}' depends on the size of the vocabulary in an unknown way: {old} becomes {new}.")
        if differing:
            found[name] = differing[0]
    if not any(own[name] is model.get_input_embeddings().weight for name in found):
        raise ConfigError(f"the config of {type(model).__name__} does not say how many embeddings it has: vocab_size.")
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _like(old: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else values


# Ids in configs


def ids_in_configs(model: PreTrainedModel) -> set[int]:
    """Ids of tokens that a model's configs name for a purpose of their own: padding, beginning, end and the like."""
    size = model.get_input_embeddings().weight.shape[0]
    found: set[int] = set()
    for config in configs_of(model):
        for _, _, value in _named_ids(config, size):
            found |= {one for one in (value if isinstance(value, list) else [value]) if 0 <= one < size}
    return found


def position_pad_id(model: PreTrainedModel) -> int:
    """The pad id from which a model counts its positions, as RoBERTa does: it must keep its number. 0 if none does."""
    found = [
        module.padding_idx
        for name, module in model.named_modules()
        if "position" in name and isinstance(getattr(module, "padding_idx", None), int)
    ]
    return max(found, default=0)


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config object that a model and its modules hold, and its generation config; each once."""
    found = [getattr(model, "generation_config", None)]
    found += [vars(module).get("config") for module in model.modules()]
    return list({id(one): one for one in found if one is not None}.values())


def _named_ids(config: Any, size: int) -> Iterator[tuple[Any, str, Any]]:
    """(holder, key, id or list of ids) of a config, and of what is nested in it and is of the same vocabulary."""
    entries = config if isinstance(config, dict) else vars(config)
    for key, value in list(entries.items()):
        if isinstance(value, dict) and key in _MAPPINGS:
            yield from ((value, name, one) for name, one in list(value.items()) if is_whole(one))
        elif isinstance(value, dict):
            yield from _named_ids(value, size)
        elif isinstance(value, PretrainedConfig):
            if getattr(value, "vocab_size", size) == size:
                yield from _named_ids(value, size)
        elif isinstance(key, str) and key.endswith(("_token_id", "_token_ids", "_token_index")):
            ids = value if isinstance(value, list) else [value]
            if ids and all(is_whole(one) for one in ids):
                yield entries, key, value


def _renumber(config: Any, new_ids: Mapping[int, int], old_size: int, new_size: int) -> None:
    """Write new ids and the new size into a config, in place."""
    for holder, key, value in _named_ids(config, old_size):
        # An id outside of the model's vocabulary means none of its rows, before and after.
        changed = [new_ids.get(one, one) for one in (value if isinstance(value, list) else [value])]
        holder[key] = changed if isinstance(value, list) else changed[0]
    for holder in _holders(config, old_size):
        for key in (*_LISTS, *_SEQUENCES, "forced_decoder_ids", "sequence_bias", "vocab_size"):
            value = holder.get(key)
            if value is not None:
                holder[key] = _renumbered(key, value, new_ids, old_size, new_size)


def _holders(config: Any, size: int) -> Iterator[dict[str, Any]]:
    entries = config if isinstance(config, dict) else vars(config)
    yield entries
    for value in list(entries.values()):
        is_part = isinstance(value, PretrainedConfig) and getattr(value, "vocab_size", size) == size
        if is_part or isinstance(value, dict):
            yield from _holders(value, size)


def _renumbered(key: str, value: Any, new_ids: Mapping[int, int], old_size: int, new_size: int) -> Any:
    if key == "vocab_size":
        return new_size if value == old_size else value
    if key in _LISTS:  # what is not in the vocabulary any more cannot be generated
        return [new_ids.get(one, one) for one in value if one in new_ids or one < 0]
    if key in _SEQUENCES:
        return [_sequence(one, new_ids) for one in value if _all_kept(one, new_ids)] or None
    if key == "forced_decoder_ids":
        return [
            [place, new_ids[one] if one is not None else None] for place, one in value if one is None or one in new_ids
        ]
    if isinstance(value, dict):
        return {tuple(new_ids[one] for one in ids): bias for ids, bias in value.items() if _all_kept(ids, new_ids)}
    return [[[new_ids[one] for one in ids], bias] for ids, bias in value if _all_kept(ids, new_ids)]


def _sequence(ids: Any, new_ids: Mapping[int, int]) -> Any:
    return [_sequence(one, new_ids) for one in ids] if isinstance(ids, (list, tuple)) else new_ids[ids]


def _all_kept(ids: Any, new_ids: Mapping[int, int]) -> bool:
    return all(_all_kept(one, new_ids) for one in ids) if isinstance(ids, (list, tuple)) else ids in new_ids
