"""What PEFT's state-dict hooks do for sparse adapters: seal a file when saving, check all of it before loading."""

from __future__ import annotations

import logging

from peft import PeftModel
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper
from ...checkpoints import native
from ...core.delta import SparseDelta
from ...core.sharded import is_sharded, whole
from ...errors import FormatError
from ..common.keys import embeddings_of
from .configs.base import SparseConfig
from .iteration import base_model_of, iter_deltas
from .layers.delta import with_support
from .unselected import is_unselected, warn_of_saving

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
    warn_of_saving(base_model_of(model), adapter_name, config)
    gather(model, own, state_dict)
    heads: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix("_fsdp_wrapped_module.")
            inside = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            heads.update({f"{name}.{k}": v for k, v in module.adapter_state_dict(adapter_name, inside).items()})
    return native.finish(own, heads, adapter_name=adapter_name)


def gather(model: nn.Module, own: dict[str, Tensor], state_dict: dict[str, Tensor]) -> None:
    """Put whole tensors in the place of sharded ones that go into an adapter's file, in both dictionaries.

    Args:
        model: whatever carries the adapter.
        own: the adapter's own tensors.
        state_dict: the model's state dict, in which the heads are.
    """
    heads = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    for tensors in (own, state_dict):
        for key, tensor in tensors.items():
            if (tensors is own or key.startswith(heads)) and is_sharded(tensor):
                tensors[key] = whole(tensor).cpu()


def for_loading(
    model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Check a loaded file as a whole, then size the adapter after it; returns what is left to load.

    Raises:
        FormatError: the file is damaged or does not belong to this model. An adapter that was added for it is taken out
            again.
    """
    deltas = {name: delta for name, _, _, delta in iter_deltas(model, adapter_name)}
    # Until something set the support, the adapter was made from the file's own config; later it may have grown out of
    # it (a resume).
    is_new = all(delta.support_version == 0 for delta in deltas.values())
    try:
        loaded = native.verify(
            state_dict,
            counts=config.counts if is_new else None,
            shapes={name: delta.shape for name, delta in deltas.items()},
            heads=_head_shapes(model, adapter_name),
            passengers=_embedding_names(model, adapter_name),
            adapter_name=adapter_name,
            verified=config.verified,
        )
    except FormatError:
        # One whose weights are to be selected was made to be trained, and a checkpoint is read into it.
        if is_new and not is_unselected(config):
            discard(model, adapter_name)
        raise
    for name, delta in deltas.items():
        if delta.values.is_meta:
            delta.values = nn.Parameter(loaded[name].values, requires_grad=delta.values.requires_grad)
        delta.set_support(loaded[name].indices, loaded[name].values)
    if any(delta.count for delta in loaded.values()):
        config.counts = {name: loaded[name].count for name in deltas}
    return _decoded(state_dict, loaded)


def _decoded(state_dict: dict[str, Tensor], loaded: dict[str, SparseDelta]) -> dict[str, Tensor]:
    """What is left to load of a checked file: no digest, and supports that need not be decoded once more."""
    left = {}
    for key, tensor in state_dict.items():
        name = native.canonical_name(key)
        if name == native.DIGEST_KEY:
            continue
        parameter = native.parameter_of(name) if name.endswith(f".{native.INDICES}") else None
        left[key] = tensor if parameter is None else with_support(tensor, loaded[parameter].indices)
    return left


def discard(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model whose loading failed; the base model is as it was before."""
    if not isinstance(model, PeftModel):
        logger.warning("The adapter %s was refused but stays in the model without effect: delete it.", adapter_name)
    elif len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        trainable = model.base_model.trainable_before
        for name, parameter in model.base_model.unload().named_parameters():
            parameter.requires_grad_(name in trainable)


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


def _embedding_names(model: nn.Module, adapter_name: str) -> set[str]:
    """The base model's own embeddings, which PEFT's `save_embedding_layers` puts into a file beside the adapter."""
    own = set(embeddings_of(model))
    keys = [f"{name}.{key}" for name, m in model.named_modules() if m in own for key, _ in m.named_parameters()]
    return {native.canonical_name(key, adapter_name=adapter_name) for key in keys}
