"""Whether a folder is the checkpoint that a model's adapters were brought back from, told by the weights in both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...checkpoints.native import SOURCE, canonical_name
from ...checkpoints.native_checks import INDICES, VALUES, tensor_names
from ...core.gaps import decode_gaps
from ...core.sharded import how_sharded
from ...errors import FormatError
from ...tuners.common.adapter_config import carrier_of
from ...tuners.sparse_ft.iteration import iter_deltas
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from ..trainer.stored_adapters import folders_of

# What a trainer writes of a model that carries adapters in a part of it.
_WHOLE_MODEL = "model.safetensors"


def holds_adapters(folder: str | os.PathLike[str], model: nn.Module, adapters: Iterable[str]) -> bool:
    """Whether a checkpoint holds some adapters as the model has them: the same weights at the same values.

    A trainer tells its callbacks how many steps were made by the checkpoint that it resumes from, and not where that
    lies. Another run may have written one of the same number.

    Args:
        folder: the checkpoint that may be the one.
        model: the model, wrapped or not, after its trainer has loaded the checkpoint.
        adapters: their names; frozen ones are passed over, for a trainer need not bring them back.

    Returns:
        True also where it cannot be told, because the folder has other kinds of files (pickles, FSDP's own) or none of
        an adapter. Where values are sharded the indices alone are compared.
    """
    for name in adapters:
        deltas = {parameter: delta for parameter, _, _, delta in iter_deltas(model, name)}
        if not any(delta.held_values.requires_grad for delta in deltas.values()):
            continue
        path = Path(folder, folders_of(carrier_of(model), [name])[name], SOURCE)
        if path.is_file():
            names = {parameter: tensor_names(parameter) for parameter in deltas}
        else:
            path, names = Path(folder, _WHOLE_MODEL), _names_in_model(model, deltas)
        if path.is_file() and not _agree(path, {names[parameter]: delta for parameter, delta in deltas.items()}):
            return False
    return True


def _names_in_model(model: nn.Module, deltas: Mapping[str, AdapterDelta]) -> dict[str, tuple[str, str]]:
    """As `tensor_names`, of the model's own state dict."""
    paths = {module: path for path, module in model.named_modules() if isinstance(module, AdapterDelta)}
    found = {parameter: f"{paths[delta]}." for parameter, delta in deltas.items()}
    return {key: (canonical_name(path + VALUES), canonical_name(path + INDICES)) for key, path in found.items()}


def _agree(path: Path, named: Mapping[tuple[str, str], AdapterDelta]) -> bool:
    """Whether a file holds these deltas, by the names of their values and their coded indices."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = {canonical_name(key): key for key in file.keys()}  # noqa: SIM118
            return all(
                _is_same(delta, file.get_tensor(keys[values]), file.get_tensor(keys[indices]))
                for (values, indices), delta in named.items()
            )
    except (OSError, KeyError, SafetensorError, FormatError):
        return False


def _is_same(delta: AdapterDelta, values: Tensor, coded: Tensor) -> bool:
    indices, _ = decode_gaps(coded, name="a support")
    held = delta.held_values.detach()
    if not torch.equal(indices.long(), delta.indices.long().cpu()):
        return False
    return how_sharded(held) is not None or torch.equal(values.to(held.dtype), held.cpu())
