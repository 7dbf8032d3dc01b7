"""`nn.DataParallel` without GPUs: torch's own replicas, whose tensors are copies on the same device."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# The package has a function of the module's name.
replication = importlib.import_module("torch.nn.parallel.replicate")


def _copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    return [[t * 1 if t.requires_grad and not detach else t.detach().clone() for t in tensors] for _ in devices]


def replicas_of(model: nn.Module, count: int = 2) -> list[nn.Module]:
    """What `torch.nn.parallel.replicate` makes of a model."""
    with (
        mock.patch.object(replication, "_get_device_index", lambda device, *_: device),
        mock.patch.object(replication, "_broadcast_coalesced_reshape", _copies),
    ):
        return replication.replicate(model, list(range(count)))


class OnReplicas(nn.DataParallel):
    """A model of which two replicas compute half of each batch, in a thread each."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        replicas, has_grad = replicas_of(self.module), torch.is_grad_enabled()

        def part(thing: Any, n: int) -> Any:
            return thing.tensor_split(len(replicas))[n] if isinstance(thing, Tensor) else thing

        def run(n: int) -> Any:
            with torch.set_grad_enabled(has_grad):
                given = {name: part(thing, n) for name, thing in kwargs.items()}
                return replicas[n](*(part(thing, n) for thing in args), **given)

        with ThreadPoolExecutor(len(replicas)) as pool:
            found = list(pool.map(run, range(len(replicas))))
        return _gathered(found)


def _gathered(found: list[Any]) -> Any:
    first = found[0]
    if isinstance(first, Tensor):
        return torch.stack(found) if first.dim() == 0 else torch.cat(found)
    return type(first)(
        **{name: _gathered([one[name] for one in found]) for name in ("loss", "logits") if name in first}
    )
