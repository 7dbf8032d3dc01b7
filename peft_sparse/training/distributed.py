"""Several processes: replicas choose the same weights, shards are refused."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first_rank(indices: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first process's indices, on every process.

    Replicas are equal bit for bit and choose alike; this makes it so even where a kernel is not deterministic. Every
    process must call it.
    """
    if not is_distributed():
        return indices
    shared = [{name: chosen.cpu() for name, chosen in indices.items()}]
    dist.broadcast_object_list(shared, src=0)
    return {name: chosen.to(indices[name].device) for name, chosen in shared[0].items()}


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on every process; the tensor itself in a single one.

    Every process must call it, with tensors of one shape, in one order.
    """
    if not is_distributed():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def refuse_sharded(name: str, parameter: Tensor) -> None:
    """Raise a ConfigError if this process holds only a part of a parameter, or none of it.

    Raises:
        ConfigError: the parameter is a DTensor, part of an FSDP unit, sharded by ZeRO-3, or on the meta device.
    """
    if parameter.is_meta:
        raise ConfigError(f"{name} is on the meta device: load the base model's weights before the dense phase.")
    sharding = None
    if hasattr(parameter, "_local_tensor") or hasattr(parameter, "placements"):
        sharding = "a DTensor (FSDP2, tensor parallelism)"
    elif hasattr(parameter, "ds_id"):
        sharding = "sharded by DeepSpeed ZeRO-3"
    elif hasattr(parameter, "_is_flat_param") or hasattr(parameter, "_fsdp_flattened"):
        sharding = "part of an FSDP unit"
    if sharding is not None:
        raise ConfigError(
            f"{name} is {sharding}: the dense phase compares whole weights. Run it with one process per replica (DDP) "
            "or in a single process; the sparse phase may then be sharded."
        )
