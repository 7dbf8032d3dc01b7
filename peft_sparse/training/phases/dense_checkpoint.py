"""What a checkpoint inside the dense phase holds: the moved weights and heads, and proof of where they started."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import FormatError
from ...files import atomic_file, save_tensors
from ..trainer.completeness import naming
from .targets import Target

FILE_NAME = "dense_phase.safetensors"
_VERSION = "1"


class OpenPhase(Protocol):
    """What is saved of a `DensePhase`."""

    adapter_name: str
    targets: list[Target]
    originals: dict[str, Tensor]
    others: dict[str, Tensor]
    start_of_others: dict[str, Tensor]


def save_dense_phase(phase: OpenPhase, directory: str | os.PathLike[str]) -> None:
    """Write the state of a dense phase into `directory`, under a temporary name first.

    The targets are stored as they are, with a digest of where they started (that is the base model, which is at hand
    when training resumes); heads and buffers are stored both as they are and as they started, because a random start
    is nowhere else.

    Cost: the size of the targeted parameters on disk.
    """
    tensors = {f"target.{t.name}": t.parameter.detach().cpu().contiguous() for t in phase.targets}
    tensors.update((f"other.{name}", tensor.detach().cpu().clone()) for name, tensor in phase.others.items())
    tensors.update((f"start.{name}", tensor) for name, tensor in phase.start_of_others.items())
    metadata = {
        "peft_sparse_dense_phase": _VERSION,
        "adapter": phase.adapter_name,
        "originals": json.dumps({name: _digest(original) for name, original in phase.originals.items()}),
    }
    path = Path(directory, FILE_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_tensors(tensors, temporary, metadata=metadata)


def load_dense_phase(phase: OpenPhase, directory: str | os.PathLike[str]) -> None:
    """Put an open dense phase where a saved one stood.

    Raises:
        FormatError: the file is of another adapter, other targets or another base model, or damaged. Nothing is changed
            then.
    """
    path = Path(directory, FILE_NAME)
    with naming(str(path)), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("peft_sparse_dense_phase") != _VERSION:
            found = metadata.get("peft_sparse_dense_phase")
            raise FormatError(
                f"{path} must be a dense phase of version {_VERSION}, got {found!r}. pip install -U peft-sparse"
            )
        expected = _expected(phase)
        _check_names(path, set(file.keys()), set(expected))
        for name, tensor in expected.items():
            slot = file.get_slice(name)
            if tuple(slot.get_shape()) != tuple(tensor.shape):
                raise FormatError(
                    f"{path}: {name} must have shape {tuple(tensor.shape)}, got {tuple(slot.get_shape())}"
                )
        _check_originals(path, phase, json.loads(metadata["originals"]))
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(file.get_tensor(name))


def _expected(phase: OpenPhase) -> dict[str, Tensor]:
    """Where every tensor of the file goes."""
    tensors = {f"target.{t.name}": t.parameter.data for t in phase.targets}
    tensors.update((f"other.{name}", tensor.data) for name, tensor in phase.others.items())
    tensors.update((f"start.{name}", tensor) for name, tensor in phase.start_of_others.items())
    return tensors


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        differing = sorted(found ^ expected)
        raise FormatError(
            f"{path} does not fit this model and adapter: {len(differing)} tensors are in one of them only, "
            f"{differing[0]} the first. Resume with the model and the config that the run was started with."
        )


def _check_originals(path: Path, phase: OpenPhase, digests: dict[str, str]) -> None:
    for name, original in phase.originals.items():
        if digests.get(name) != _digest(original):
            raise FormatError(
                f"{path}: the run was started from other base weights ({name} differs). Resume from the same base "
                "model; if a part of it is initialised at random, set the same seed before making it."
            )


def _digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()
