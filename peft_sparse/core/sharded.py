"""Tensors of which this process holds a part (the DTensors of FSDP2), seen as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def in_several_processes() -> bool:
    """Whether this process is one of several that train or compute together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Told by its interface: torch.distributed.tensor is slow to import."""
    return hasattr(tensor, "full_tensor")


def how_sharded(tensor: Tensor) -> str | None:
    """In words, who holds a tensor in parts, if anyone does."""
    if is_sharded(tensor):
        return "a DTensor (FSDP2, tensor parallelism)"
    if hasattr(tensor, "ds_id"):
        return "sharded by DeepSpeed ZeRO-3"
    if hasattr(tensor, "_hp_mapping"):
        return "part of a flat buffer of DeepSpeed ZeRO"
    if hasattr(tensor, "_is_flat_param") or hasattr(tensor, "_fsdp_flattened"):
        return "part of an FSDP unit"
    return None


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, outside of autograd. If it is sharded this is a collective: every process must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, inside autograd; the tensor itself if it is not sharded.

    For what reads a parameter of another FSDP2 unit, which is cut up while its own unit does not compute. The gradient
    reaches the shards as the mean over all processes, as FSDP2 forms it. A collective, in the backward as well.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    complete: Tensor = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    if complete.requires_grad:
        # The sum is formed by gloo too, the mean is not.
        complete.register_hook(lambda gradient: gradient / mesh.size())
    return complete


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory, outside of autograd; all of it if it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A tensor that every process holds whole, cut up as `pattern` is; the tensor itself if that is not sharded.

    Args:
        tensor: the same on every process; of the shape of `pattern`.
        pattern: sharded or not.
    """
    if not is_sharded(pattern):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = pattern.device_mesh, pattern.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None).to(pattern.device)


def overwrite(tensor: Tensor, whole_tensor: Tensor) -> None:
    """Write what every process holds whole into a tensor that may be sharded, in place.

    Raises:
        ValueError: the shapes differ; a sharded tensor cannot be given another.
    """
    if tensor.shape != whole_tensor.shape:
        raise ValueError(f"shape must be {tuple(tensor.shape)}, got {tuple(whole_tensor.shape)}")
    with torch.no_grad():
        own_part(tensor).copy_(own_part(sharded_like(whole_tensor, tensor)))


class ObjectTensor(Tensor):
    """A tensor that torch.distributed.checkpoint stores as an object of whatever size, instead of in pieces.

    A checkpoint is loaded into the tensors of the present state dict, which must have the same sizes: a coded support
    has not. Copies and files hold a plain tensor.
    """

    def __create_write_items__(self, name: str, value: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

        return [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)
