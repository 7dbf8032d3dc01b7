"""What PEFT's state-dict hooks do for bottleneck adapters: a file that does not fit is refused as a whole."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import FormatError
from ..sparse_ft.state import discard
from .layer import ADAPTERS, BottleneckLayer


def check_loaded(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare a file's tensors with the adapter that is about to take them.

    Args:
        model: whatever carries the adapter.
        adapter_name: its name, which the keys hold.
        state_dict: the tensors under the model's own keys.

    Raises:
        FormatError: tensors are missing, unknown or of another shape. An adapter that was added for them is taken out
            again.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    own: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        if adapter_name in layer.bottleneck_adapters:
            for key, parameter in layer.bottleneck_adapters[adapter_name].named_parameters():
                own[f"{name}.{ADAPTERS}.{adapter_name}.{key}"] = tuple(parameter.shape)
    given = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if f".{ADAPTERS}." in key}
    problem = _problem(own, given)
    if problem is None:
        return
    if all(layer.is_fresh(adapter_name) for layer in layers.values()):
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
