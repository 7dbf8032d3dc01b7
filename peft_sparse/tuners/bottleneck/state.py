"""What PEFT's state-dict hooks do for bottleneck adapters: a file that does not fit is refused as a whole."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn

from ...errors import FormatError
from ..sparse_ft.state import discard
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
        FormatError: tensors are missing, unknown or of another shape. An adapter that was added for them is taken out
            again.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    own: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        if adapter_name in layer.adapters:
            for key, tensor in layer.adapters[adapter_name].state_dict().items():
                own[f"{name}.{adapters}.{adapter_name}.{key}"] = tuple(tensor.shape)
    given = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if f".{adapters}." in key}
    problem = _problem(own, given)
    if problem is None:
        return
    refuse(model, adapter_name, problem)


def refuse(model: nn.Module, adapter_name: str, problem: str) -> NoReturn:
    """Raise a FormatError about a file, and take out an adapter that was added for it."""
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    if all(layer.is_fresh(adapter_name) for layer in layers):
        discard(model, adapter_name)
    raise FormatError(
        f"the adapter file does not fit this model and config: {problem}. Nothing was loaded. Load it into the "
        "architecture it was trained on (adapter_config.json names it in base_model_name_or_path)."
    )


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
