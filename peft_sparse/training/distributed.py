"""Several processes: all of them choose the same weights, whether they hold replicas or shards of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.indices import checksum
from ..core.sharded import how_sharded, in_several_processes, is_sharded
from ..errors import ConfigError, SelectionError
from ..tuners.sparse_ft.layers.delta import AdapterDelta


def from_first_rank(indices: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first process's indices, on every process.

    Replicas are equal bit for bit and choose alike; this makes it so even where a kernel is not deterministic. Every
    process must call it.
    """
    if not in_several_processes():
        return indices
    shared = [{name: chosen.cpu() for name, chosen in indices.items()}]
    dist.broadcast_object_list(shared, src=0)
    return {name: chosen.to(indices[name].device) for name, chosen in shared[0].items()}


def means_over_ranks(tensors: Sequence[Tensor], *, what: str) -> list[Tensor]:
    """The means of tensors over all processes, on every process; the tensors themselves in a single one.

    Every process must call it with tensors of the same sizes, and all of them in one order.

    Args:
        tensors: floating point, of one dtype.
        what: what they are, the same on every process.

    Raises:
        SelectionError: the processes did not call it for the same.

    Cost: one collective per device, of the tensors' size, and one of a few bytes that tells whether all mean the same.
    """
    if not in_several_processes():
        return list(tensors)
    group = _own_group()
    means: list[Tensor | None] = [None] * len(tensors)
    for device in sorted({t.device for t in tensors}, key=str):
        members = [i for i, t in enumerate(tensors) if t.device == device]
        flat = torch.cat([tensors[i].reshape(-1) for i in members])
        _check_agreement(_digest_of_text(what), flat.numel(), device, f"the gradient of {what}")
        dist.all_reduce(flat, group=group)
        flat.div_(dist.get_world_size())
        parts = flat.split([tensors[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            means[i] = part.view_as(tensors[i])
    return [mean for mean in means if mean is not None]


def check_same_supports(indices: Mapping[str, Tensor], *, when: str) -> None:
    """Raise a SelectionError if the processes tune different weights. Every process must call it.

    Args:
        indices: {parameter name: [k] its support}.
        when: for the message.

    Cost: one collective of a few bytes.
    """
    if not in_several_processes() or not indices:
        return
    first = next(iter(indices.values()))
    digest = torch.zeros((), dtype=torch.int64, device=first.device)
    for support in indices.values():
        digest = digest * 31 + checksum(support).to(digest.device)
    total = sum(support.numel() for support in indices.values())
    _check_agreement(int(digest), total, first.device, f"the tuned weights {when}")


def _check_agreement(first: int, second: int, device: torch.device, what: str) -> None:
    own = torch.tensor([first, second], dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own, group=_own_group())
    differing = [rank for rank, other in enumerate(every) if not torch.equal(other, every[0])]
    if differing:
        raise SelectionError(
            f"the processes do not agree on {what}: rank {differing[0]} differs from rank 0 (this is rank "
            f"{dist.get_rank()}). Every process must run the same layers in every batch, start from the same adapter "
            "and step on averaged gradients: wrap the model in DDP or FSDP2 before training, and do not drop layers at "
            "random."
        )


def _digest_of_text(text: str) -> int:
    digest = 0
    for byte in text.encode():
        digest = (digest * 257 + byte) % (2**61 - 1)
    return digest


# The process group of our own collectives, and the default group that it was made under.
_group: tuple[Any, Any] | None = None


def _own_group() -> Any:
    """All processes, in a group apart from the one that DDP and FSDP reduce gradients in.

    Ours run inside the backward pass, where those wrappers start theirs as soon as a bucket is full; with unused
    parameters that is not at the same place on every process, and collectives of one group must not change their order.
    """
    global _group
    if _group is None or _group[0] is not dist.group.WORLD:
        _group = (dist.group.WORLD, dist.new_group())
    return _group[1]


def refuse_processes(adapter_name: str, budget: object, deltas: Mapping[str, AdapterDelta]) -> None:
    """Refuse settings with which several processes, or wrappers made for them, would silently train something else.

    Args:
        adapter_name: the adapter that reselects.
        budget: of its config.
        deltas: {parameter name: its delta}.

    Raises:
        ConfigError: weights would have to move between tensors, or to another place in a flattened parameter.
    """
    if budget == "global" and in_several_processes():
        raise ConfigError(
            f"budget='global' moves weights of adapter {adapter_name!r} between tensors while it trains, and DDP and "
            "FSDP cannot let a parameter change its size. Use budget='uniform', or a single process."
        )
    for name, delta in deltas.items():
        values = delta.held_values
        if not is_sharded(values) and (how := how_sharded(values)) is not None:
            raise ConfigError(
                f"the values of {name} are {how}, whose optimizer state cannot follow a weight to another place. SpIEL "
                "trains under DDP and FSDP2 (fsdp_config={'version': 2}), which shards the model as ZeRO-3 does; "
                "Rand-SFT (RandConfig) trains here."
            )


def refuse_sharded(name: str, parameter: Tensor, *, why: str = "the dense phase compares") -> None:
    """Raise a ConfigError if this process holds only a part of a parameter, or none of it.

    Args:
        name: of the parameter.
        parameter: it.
        why: what needs whole weights, for the message.

    Raises:
        ConfigError: the parameter is a DTensor, part of an FSDP unit, sharded by ZeRO-3, or on the meta device.
    """
    if parameter.is_meta:
        raise ConfigError(f"{name} is on the meta device: load the base model's weights first, for {why} weights.")
    sharding = how_sharded(parameter)
    if sharding is not None:
        raise ConfigError(
            f"{name} is {sharding}: {why} whole weights. Run it with one process per replica (DDP) "
            "or in a single process; the sparse phase may then be sharded."
        )
