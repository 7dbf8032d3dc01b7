"""What PEFT's state-dict hooks do for sparse adapters: seal a file when saving, check all of it before loading."""

from __future__ import annotations

import contextlib
import logging
import math

import torch
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper
from ...checkpoints import native
from ...core.delta import SparseDelta
from ...core.sharded import is_sharded
from ..common.base_model import base_model_of
from ..common.keys import embeddings_of, gather
from ..common.other_heads import parts_of_other_heads, warn_of_other_head
from .configs.base import SparseConfig
from .iteration import iter_deltas
from .layers.delta import with_support
from .unselected import warn_of_saving

logger = logging.getLogger(__name__)


def for_saving(
    model: nn.Module, config: SparseConfig, adapter_name: str, own: dict[str, Tensor], state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The adapter's own tensors with the digest; brings the config's `counts` up to date.

    Args:
        model: whatever carries the adapter.
        config: its config, about to be written next to the tensors.
        adapter_name: its name, which the keys hold.
        own: its deltas' tensors, by key of the model's state dict.
        state_dict: the model's state dict, in which the heads are. Where FSDP2 has sharded them they are gathered, in
            this very dictionary; every process must call it then.
    """
    counts = count_weights(model, adapter_name)
    if any(counts.values()):
        config.counts = counts
    deltas = [delta for *_, delta in iter_deltas(model, adapter_name)]
    warn_of_saving(base_model_of(model), adapter_name, config, deltas)
    warn_beyond_range(model, adapter_name)
    gather(model, own, state_dict)
    heads: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix("_fsdp_wrapped_module.")
            inside = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            heads.update({f"{name}.{k}": v for k, v in module.adapter_state_dict(adapter_name, inside).items()})
    return native.finish(own, heads, adapter_name=adapter_name)


def leave_out_other_heads(config: SparseConfig, model: nn.Module, adapter_name: str) -> None:
    """Take out of a config's `counts` what belongs to a head that the model does not have."""
    counts = config.counts or {}
    heads = parts_of_other_heads({name.rpartition(".")[0] for name in counts}, model)
    if heads:
        config.left_out = {name: count for name, count in counts.items() if name.rpartition(".")[0] in heads}
        config.counts = {name: count for name, count in counts.items() if name not in config.left_out}
        warn_of_other_head(adapter_name, model, left_out=heads, lacking=())


def for_loading(
    model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor], *, is_own_file: bool
) -> dict[str, Tensor]:
    """Check a loaded file as a whole, then size the adapter after it; returns what is left to load.

    Args:
        model: whatever carries the adapter.
        config: its config.
        adapter_name: its name.
        state_dict: the tensors, as in the file but for heads.
        is_own_file: whether the config's `counts` speak of this file, because the adapter was made for it. One that has
            been selected or trained may have grown out of them (a resume).

    Raises:
        FormatError: the file is damaged or does not belong to this model.
        ConfigError: the number of weights would change, and FSDP2 has sharded them.
    """
    deltas = {name: delta for name, _, _, delta in iter_deltas(model, adapter_name)}
    loaded = native.verify(
        state_dict,
        counts={**(config.counts or {}), **config.left_out} if is_own_file and config.counts is not None else None,
        shapes={name: delta.shape for name, delta in deltas.items()},
        heads=_head_shapes(model, adapter_name),
        extras=_embedding_names(model, adapter_name),
        vocabularies=_vocabularies(model, adapter_name),
        left_out=config.left_out,
        adapter_name=adapter_name,
        verified=config.verified,
    )
    grown = {name: loaded[name].shape for name, delta in deltas.items() if loaded[name].shape != delta.shape}
    for name, shape in grown.items():
        logger.warning(
            "%s has %d rows here and had %d where adapter %r was trained: of the rows here the first %d are tuned.",
            name,
            deltas[name].shape[0],
            shape[0],
            adapter_name,
            shape[0],
        )
    for name, delta in deltas.items():
        delta.check_number(loaded[name].count)
    for name, delta in deltas.items():
        if delta.values.is_meta:
            delta.values = nn.Parameter(loaded[name].values, requires_grad=delta.values.requires_grad)
        delta.set_support(loaded[name].indices, loaded[name].values)
    warn_beyond_range(model, adapter_name)
    if any(delta.count for delta in loaded.values()):
        config.counts = {name: loaded[name].count for name in deltas}
    return _decoded(state_dict, loaded)


def _decoded(state_dict: dict[str, Tensor], loaded: dict[str, SparseDelta]) -> dict[str, Tensor]:
    """What is left to load of a checked file: no digest, nothing that was left out, and supports that need not be
    decoded once more.
    """
    left = {}
    for key, tensor in state_dict.items():
        name = native.canonical_name(key)
        if name == native.DIGEST_KEY:
            continue
        parameter = native.parameter_of(name)
        if parameter is not None and parameter not in loaded:
            continue
        is_support = parameter is not None and name.endswith(f".{native.INDICES}")
        left[key] = with_support(tensor, loaded[parameter].indices) if is_support else tensor
    return left


def warn_beyond_range(model: nn.Module, adapter_name: str) -> None:
    """Say that values are finite in their own dtype and not in that of the weight to which they are added."""
    broken = []
    for name, layer, part, delta in iter_deltas(model, adapter_name):
        weight = getattr(layer.get_base_layer(), part)
        values = delta.held_values.detach()
        if not weight.is_floating_point() or is_sharded(values) or values.is_meta or not values.numel():
            continue
        largest = float(values.abs().max())
        if torch.finfo(weight.dtype).max < largest < math.inf:
            broken.append(f"{name} ({largest:.3g} in {str(weight.dtype).removeprefix('torch.')})")
    if broken:
        logger.warning(
            "adapter %r holds values beyond the range of the weights that they are added to, which become infinite: %s",
            adapter_name,
            ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else ""),
        )


def counts_of(state_dict: dict[str, Tensor]) -> dict[str, int]:
    """{parameter: number of tuned weights} of an adapter's tensors, as `get_peft_model_state_dict` gives them."""
    named = {native.canonical_name(key): tensor for key, tensor in state_dict.items()}
    values = {name: tensor for name, tensor in named.items() if name.endswith(f".{native.VALUES}")}
    owned = {native.parameter_of(name): tensor.numel() for name, tensor in values.items()}
    return {parameter: count for parameter, count in owned.items() if parameter is not None}


def count_weights(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """{parameter: number of tuned weights} of an adapter."""
    return {name: delta.count for name, _, _, delta in iter_deltas(model, adapter_name)}


def _head_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict()
            for key, model_key in module.adapter_state_dict_load_map(adapter_name).items():
                shapes[native.canonical_name(f"{name}.{key}")] = tuple(state[model_key].shape)
    return shapes


def _vocabularies(model: nn.Module, adapter_name: str) -> set[str]:
    """The tuned parameters that have a row for each token: embeddings, and the output layer."""
    output = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        output = model.get_output_embeddings()
    return {
        name
        for name, layer, part, _ in iter_deltas(model, adapter_name)
        if isinstance(layer.get_base_layer(), nn.Embedding)
        or (output is not None and output in (layer, layer.base_layer))
    }


def _embedding_names(model: nn.Module, adapter_name: str) -> set[str]:
    """The base model's own embeddings, which PEFT's `save_embedding_layers` puts into a file beside the adapter."""
    own = set(embeddings_of(model))
    keys = [f"{name}.{key}" for name, m in model.named_modules() if m in own for key, _ in m.named_parameters()]
    return {native.canonical_name(key, adapter_name=adapter_name) for key in keys}
