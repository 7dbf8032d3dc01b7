"""What a native adapter file must hold: each check names the tensor, the rule and the way out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES
from ..core.delta import SparseDelta
from ..errors import FormatError

VALUES, INDICES = "values", "_extra_state"
REMEDY = "Nothing was loaded. Download the adapter again, or save it again from the model that trained it."


def tensor_names(parameter: str) -> tuple[str, str]:
    """Canonical names of the two tensors, values and coded indices, that hold the delta of a base-model parameter."""
    module, _, part = parameter.rpartition(".")
    stem = f"{module}.sparse_ft_{part}" if module else f"sparse_ft_{part}"
    return f"{stem}.{VALUES}", f"{stem}.{INDICES}"


def refuse_views(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that claim more numbers than they hold bytes for, as a pickled one can: reading takes them all."""
    for name, tensor in tensors.items():
        held = tensor.untyped_storage().nbytes() if not tensor.is_meta and tensor.layout == torch.strided else None
        if held is not None and tensor.numel() * tensor.element_size() > held and not hasattr(tensor, "full_tensor"):
            raise FormatError(
                f"{source}: tensor '{name}' claims the shape {tuple(tensor.shape)} and has {held} bytes. {REMEDY}"
            )


def check_values(values: Tensor, name: str, source: str) -> None:
    if values.dtype not in FLOAT_DTYPES.values() or values.dim() != 1:
        found = f"{values.dtype} of shape {tuple(values.shape)}"
        rule = "one-dimensional float32, bfloat16, float16 or float64"
        raise FormatError(f"{source}: tensor '{name}' must be {rule}, got {found}. {REMEDY}")
    # A digest can be right and the run that wrote the file diverged: one such weight makes every output NaN.
    if broken := int((~values.isfinite()).sum()):
        raise FormatError(
            f"{source}: tensor '{name}' holds {broken} values that are NaN or infinite, so the run that saved it had "
            "diverged. Nothing was loaded. Load an earlier checkpoint, or train again with a smaller learning rate."
        )


def check_surplus(names: Iterable[str], allowed: Collection[str] | None, source: str) -> None:
    for name in sorted(names):
        if allowed is not None and name not in allowed:
            raise FormatError(f"{source}: tensor '{name}' has no place in this model. {REMEDY}")


def check_heads(found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], source: str) -> None:
    check_surplus(found, expected, source)
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{source}: the head tensor '{name}' of this model is missing. {REMEDY}")
        if found[name].shape != tuple(shape):
            sizes = f"has shape {tuple(found[name].shape)} in the file and {tuple(shape)} in this model"
            raise FormatError(
                f"{source}: the head tensor '{name}' {sizes}. Nothing was loaded. Build the base model as in training "
                "(for a classifier, with the same num_labels; for a vocabulary, by resize_token_embeddings first)."
            )


def check_names(found: Mapping[str, object], expected: Mapping[str, object] | None, owner: str, source: str) -> None:
    if expected is None:
        return
    for parameter in sorted(expected.keys() - found.keys()):
        name = tensor_names(parameter)[0]
        raise FormatError(f"{source}: tensor '{name}' is missing, which {owner} asks for. {REMEDY}")
    for parameter in sorted(found.keys() - expected.keys()):
        reason = f"is surplus: {owner} has no tuned parameter '{parameter}'"
        raise FormatError(f"{source}: tensor '{tensor_names(parameter)[0]}' {reason}. {REMEDY}")


def check_counts(deltas: Mapping[str, SparseDelta], counts: Mapping[str, int], source: str) -> None:
    for parameter, count in counts.items():
        if deltas[parameter].count != count or isinstance(count, bool):
            raise FormatError(
                f"{source}: tensor '{tensor_names(parameter)[0]}' holds {deltas[parameter].count} weights, but "
                f"adapter_config.json ('counts') says {count!r}. {REMEDY}"
            )


def check_shapes(
    deltas: Mapping[str, SparseDelta], shapes: Mapping[str, Sequence[int]], vocabularies: Collection[str], source: str
) -> None:
    for parameter, shape in shapes.items():
        delta = deltas[parameter]
        if delta.shape == tuple(shape):
            continue
        way_out = (
            "Load the base model that the adapter was trained on (base_model_name_or_path in adapter_config.json)."
        )
        if parameter in vocabularies and delta.shape[1:] == tuple(shape[1:]):
            if delta.shape[0] < shape[0]:
                continue
            lost = int((delta.indices.long() >= math.prod(shape)).sum())
            way_out = (
                f"{lost:,} of its {delta.count:,} tuned weights are in rows that this model lacks: give it the rows "
                f"first, resize_token_embeddings({delta.shape[0]})."
            )
        raise FormatError(
            f"{source}: tensor '{tensor_names(parameter)[1]}' was made for a parameter of shape {delta.shape}, but "
            f"'{parameter}' of this model has {tuple(shape)}. Nothing was loaded. {way_out}"
        )
