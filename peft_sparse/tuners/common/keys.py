"""Between the keys of a model's state dict and those of an adapter's file, for all tuner types.

Both ways start from the tuner layers themselves. PEFT filters keys by text: it drops those of an adapter that pass
through a module called like another adapter ("0", "mlp", "weight").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTunerLayer
from ...core.names import PREFIX, SLOTS, unwrapped, without_adapter
from ...core.sharded import how_sharded, is_sharded, whole
from ...errors import FormatError
from .base_model import modules_around_adapters
from .layer import PARAMETERS, WeightLayer

# What PEFT leaves out of the names of modules that save themselves.
_FSDP = "_fsdp_wrapped_module."


def own_state(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], layer_cls: type[BaseTunerLayer]
) -> dict[str, Tensor]:
    """All tensors of an adapter, by unwrapped key of the model's state dict.

    Args:
        model: whatever carries the adapter.
        adapter_name: its name.
        state_dict: the model's state dict, of which PEFT may have dropped keys. Those of heads and embeddings are put
            back into this very dictionary, from which PEFT takes them next.
        layer_cls: the tuner's layers.

    Raises:
        FormatError: a tensor is not in `state_dict`, and the model does not hold it whole or holds other values.
    """
    given = {unwrapped(key): key for key in state_dict}
    live = {unwrapped(key): (module, name) for key, module, name in _entries(model, adapter_name, layer_cls)}
    own = {key: state_dict[given[key]] for key in live if key in given}
    lost = [key for key in live if key not in given]
    if lost and own:
        _refuse_other_values(own, live, adapter_name)
    for key in lost:
        tensor = _entry(*live[key])
        if (part := how_sharded(tensor)) is not None and not is_sharded(tensor):
            if not own:
                # Only the first process was given the gathered weights, and only it writes.
                return {}
            raise FormatError(
                f"'{key}' of adapter {adapter_name!r} is not among the weights to save, and this process holds a part "
                f"of it ({part}). Nothing was saved. Adapters whose names are parts of the model's paths cannot be "
                "saved this way: give them other names."
            )
        own[key] = whole(tensor)
    _put_back_heads(model, adapter_name, state_dict, given)
    _put_back_embeddings(model, state_dict, given)
    _unmerge_embeddings(model, state_dict, given)
    return {key: own[key] for key in live}


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


def to_model_keys(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], layer_cls: type[BaseTunerLayer]
) -> dict[str, Tensor]:
    """The tensors of an adapter's file under the model's own keys; what is not the adapter's keeps its key."""
    keys = {}
    for path, module in modules_around_adapters(model):
        own = [f"{path}.{name}" if path else name for name, tensor in module._parameters.items() if tensor is not None]
        keys.update({unwrapped(key).removeprefix(PREFIX): key for key in own})
    for key, _, _ in _entries(model, adapter_name, layer_cls):
        keys[without_adapter(key, adapter_name).removeprefix(PREFIX)] = key
    return {keys.get(unwrapped(key).removeprefix(PREFIX), key): tensor for key, tensor in state_dict.items()}


def warn_if_not_finite(own: dict[str, Tensor], adapter_name: str) -> None:
    """Say at the time of saving that a file will be refused, while the run can still be looked at."""
    broken = [
        key for key, t in own.items() if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t).all())
    ]
    if broken:
        warnings.warn(
            f"Adapter {adapter_name!r} is saved with values that are NaN or infinite, in {len(broken)} of {len(own)} "
            f"tensors, {without_adapter(broken[0], adapter_name).removeprefix(PREFIX)} for one: the training run has "
            "diverged. The file will be refused when it is loaded. Go back to an earlier checkpoint, and train with a "
            "smaller learning rate.",
            stacklevel=2,
        )


def _entries(
    model: nn.Module, adapter_name: str, layer_cls: type[BaseTunerLayer]
) -> Iterator[tuple[str, nn.Module, str]]:
    """(key in the model's state dict, module that holds it, its name there) of everything that an adapter saves."""
    for path, layer in modules_around_adapters(model):
        if not isinstance(layer, layer_cls):
            continue
        for slot in layer.adapter_layer_names:
            held = layer._modules[slot]
            if adapter_name in held:
                prefix = f"{path}.{slot}.{adapter_name}" if path else f"{slot}.{adapter_name}"
                for inner, module in held[adapter_name].named_modules(prefix=prefix, remove_duplicate=False):
                    yield from ((f"{inner}.{name}", module, name) for name in _saved_names(module))


def _saved_names(module: nn.Module) -> list[str]:
    names = [name for name, tensor in module._parameters.items() if tensor is not None]
    buffers = module._buffers.items()
    names += [name for name, t in buffers if t is not None and name not in module._non_persistent_buffers_set]
    has_extra_state = type(module).get_extra_state is not nn.Module.get_extra_state
    return [*names, "_extra_state"] if has_extra_state else names


def _entry(module: nn.Module, name: str) -> Tensor:
    """A tensor as it is in the model, without asking the model for its whole state."""
    if name == "_extra_state":
        return module.get_extra_state()
    held = getattr(module, "held_values", None) if name == "values" else None
    return getattr(module, name) if held is None else held


def _refuse_other_values(own: dict[str, Tensor], live: dict[str, tuple[nn.Module, str]], adapter_name: str) -> None:
    """Refuse to fill up what was given from the model if it is not the model's own state (an average, say)."""
    for key, tensor in own.items():
        present = _entry(*live[key])
        if is_sharded(present) or how_sharded(present) is not None or tensor.is_meta or present.is_meta:
            continue
        if is_sharded(tensor) or tensor.shape != present.shape or not tensor.detach().cpu().equal(present.cpu()):
            raise FormatError(
                f"adapter {adapter_name!r} is to be saved from a state dict that has lost some of its tensors and "
                f"holds other values than the model ({key}). Nothing was saved. PEFT drops keys that pass through "
                "a module called like another adapter: give the adapters names that are no parts of the model's paths, "
                "or load the state dict into the model first."
            )


def _put_back_heads(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], given: dict[str, str]) -> None:
    for path, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        for name in module.adapter_state_dict_load_map(adapter_name).values():
            key = f"{path.removeprefix(_FSDP)}.{name}"
            if key in state_dict:
                continue
            source = given.get(unwrapped(key))
            state_dict[key] = state_dict[source] if source is not None else module.state_dict()[name]


def _put_back_embeddings(model: nn.Module, state_dict: dict[str, Tensor], given: dict[str, str]) -> None:
    """The base model's own embeddings, which PEFT saves beside an adapter if they were resized or are tuned."""
    own = {id(module) for module in embeddings_of(model)}
    for path, module in model.named_modules():
        if id(module) not in own:
            continue
        for name, parameter in module.named_parameters():
            key = f"{path}.{name}"
            if unwrapped(key) in given or SLOTS & set(name.split(".")) or how_sharded(parameter) is not None:
                continue
            state_dict[key] = parameter.detach()


def _unmerge_embeddings(model: nn.Module, state_dict: dict[str, Tensor], given: dict[str, str]) -> None:
    """Save the base model's own values of embeddings that adapters are merged into, or a dense phase moves, if PEFT
    saves these at all.
    """
    own = {id(module) for module in embeddings_of(model)}
    for path, module in model.named_modules():
        if id(module) not in own or not isinstance(module, WeightLayer) or module.holds_base():
            continue
        for name in PARAMETERS:
            key = given.get(unwrapped(f"{path}.base_layer.{name}"))
            if key is not None:
                state_dict[key] = module.untuned(name, []).detach()


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings that a model names, and what they wrap."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embedding = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        found += [m for m in (embedding, getattr(embedding, "base_layer", None)) if isinstance(m, nn.Module)]
    return found
