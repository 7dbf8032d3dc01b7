"""What PEFT's state-dict hooks do for bottleneck adapters: a file that does not fit is refused as a whole.

Where FSDP2 has sharded a model, files hold whole tensors all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.sharded import is_sharded, sharded_like
from ...errors import ConfigError, FormatError
from .layer import ADAPTERS, BottleneckLayer


def check_loaded(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], *, adapters: str = ADAPTERS
) -> None:
    """Compare a file's tensors with the adapter that is about to take them.

    Args:
        model: whatever carries the adapter.
        adapter_name: its name, which the keys hold.
        state_dict: the tensors under the model's own keys.
        adapters: the attribute of the layers that holds adapters.

    Raises:
        FormatError: tensors are missing, unknown or of another shape.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    own: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        if adapter_name in layer.adapters:
            for key, tensor in layer.adapters[adapter_name].state_dict().items():
                own[f"{name}.{adapters}.{adapter_name}.{key}"] = tuple(tensor.shape)
    given = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if f".{adapters}." in key}
    problem = _problem(own, given) or _not_finite({key: state_dict[key] for key in own})
    if problem is not None:
        raise unfit(problem)


def as_sharded(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, sharded as the model's own are."""
    own = dict(model.named_parameters())
    return {
        key: sharded_like(tensor, own[key]) if key in own and not is_sharded(tensor) else tensor
        for key, tensor in state_dict.items()
    }


def refuse_new_adapter(model: nn.Module, adapter_name: str) -> None:
    """Raise a ConfigError if FSDP2 has sharded a model: it would not know the parameters of a new adapter."""
    if _is_sharded_model(model):
        raise ConfigError(
            f"the model is sharded already, and adapter {adapter_name!r} added now would be left out of that: no "
            "process would see the gradients of the others. Add the adapter to the whole model, then call fully_shard "
            "(trainers do so)."
        )


def refuse_baking(model: nn.Module) -> None:
    """Raise a ConfigError if FSDP2 has sharded a model: without the PeftModel nobody would gather its parameters."""
    if _is_sharded_model(model):
        raise ConfigError(
            "the model is sharded (FSDP2), and what merge_and_unload() gives back would hold parts of its weights. "
            "Save the adapter, load it into the base model in a single process, and merge there."
        )


def _is_sharded_model(model: nn.Module) -> bool:
    # The method is FSDP2's own, of its modules. If the PeftModel around this one is the only such module, adapters tell
    # it, unless a forward has left them whole.
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    in_root = any(is_sharded(parameter) for layer in layers for parameter in layer.adapters.parameters())
    return in_root or any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def unfit(problem: str) -> FormatError:
    """The error about a file that does not fit."""
    return FormatError(
        f"the adapter file does not fit this model and config: {problem}. Nothing was loaded. Load it into the "
        "architecture it was trained on (adapter_config.json names it in base_model_name_or_path)."
    )


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            return f"{key} holds values that are NaN or infinite, so the run that saved it had diverged"
    return None


def _problem(own: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str | None:
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing:
        return f"it lacks {len(missing)} tensors, {missing[0]} for one"
    if unknown:
        return f"it has {len(unknown)} tensors too many, {unknown[0]} for one"
    for key, shape in own.items():
        if given[key] != shape:
            return f"{key} is of shape {list(given[key])} where {list(shape)} is needed"
    return None
