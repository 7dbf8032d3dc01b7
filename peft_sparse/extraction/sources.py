"""Where differences come from: two checkpoints, read a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints.shards import Checkpoint
from ..core.exact_difference import values_between
from ..errors import FormatError
from ..selection.change import difference
from .pairing import pair
from .skeleton import Skeleton, skeleton_of

# Entries whose values are computed at once: the search for exact ones needs several float64 numbers for each.
_CHUNK = 2**22


class Source(Protocol):
    """A difference between two models, parameter by parameter.

    Attributes:
        skeleton: the model that the adapter is for.
        names: the parameters whose difference can be asked for, in the order of the model.
        heads: paths of the modules that the adapter saves whole.
        base_revision, tuned_revision: commit, or what was asked for; None where nothing is known.
    """

    skeleton: Skeleton
    names: list[str]
    heads: list[str]
    base_revision: str | None
    tuned_revision: str | None

    def difference(self, name: str) -> Tensor:
        """Tuned minus base: a fresh float32 tensor of the parameter's shape, finite."""

    def values(self, name: str, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """[k] what to add at these positions, and how many of the sums will not equal the tuned weight."""

    def head_tensors(self) -> dict[str, Tensor]:
        """What `heads` hold, by name of the parameter."""


class CheckpointPair:
    """The difference between two checkpoints of one architecture.

    Args:
        base: the model that was fine-tuned.
        tuned: what became of it.

    Raises:
        FormatError: a checkpoint is quantised, the config is missing, or the architectures do not match.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        for checkpoint in (base, tuned):
            check_unquantised(checkpoint)
        self.skeleton = skeleton_of(tuned.config, source=tuned.source)
        in_base, in_tuned = (self.skeleton.names_in(_floating(checkpoint)) for checkpoint in (base, tuned))
        pairing = pair(
            self.skeleton,
            {name: base.shape(stored) for name, stored in in_base.items()},
            {name: tuned.shape(stored) for name, stored in in_tuned.items()},
            base_source=base.source,
            tuned_source=tuned.source,
        )
        self._in_base = {parameter: in_base[name] for parameter, name in pairing.base.items()}
        self._in_tuned = {parameter: in_tuned[name] for parameter, name in pairing.tuned.items()}
        self._head_parameters = pairing.head_parameters
        self.names, self.heads = list(pairing.base), pairing.heads
        self.base_revision, self.tuned_revision = _commit(base), _commit(tuned)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.base.tensor(self._in_base[name]), self.tuned.tensor(self._in_tuned[name])

    def difference(self, name: str) -> Tensor:
        """See `Source`.

        Raises:
            FormatError: one of the two holds NaN or infinity.
        """
        base, tuned = self._tensors(name)
        found = difference(tuned, base)
        if not bool(found.isfinite().all()):
            for checkpoint, tensor in ((self.base, base), (self.tuned, tuned)):
                if broken := int((~tensor.isfinite()).sum()):
                    raise FormatError(
                        f"{checkpoint.source}: tensor '{name}' holds {broken} values that are NaN or infinite, so its "
                        "training had diverged. Nothing was written. Take an earlier checkpoint."
                    )
            raise FormatError(f"{self.tuned.source}: tensor '{name}' differs from its base by more than float32 holds.")
        return found

    def values(self, name: str, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Source`."""
        base, tuned = (tensor.reshape(-1) for tensor in self._tensors(name))
        values = torch.empty(indices.numel(), dtype=dtype)
        missed = 0
        for start in range(0, indices.numel(), _CHUNK):
            chosen = indices[start : start + _CHUNK].long()
            found, hit = values_between(base[chosen], tuned[chosen], dtype=dtype)
            values[start : start + _CHUNK] = found
            missed += int((~hit).sum())
        return values, missed

    def head_tensors(self) -> dict[str, Tensor]:
        """See `Source`."""
        return {name: self.tuned.tensor(self._in_tuned[name]).clone() for name in self._head_parameters}


def _commit(checkpoint: Checkpoint) -> str | None:
    """The commit that a snapshot in the Hub's cache was made of."""
    return checkpoint.folder.name if checkpoint.folder.parent.name == "snapshots" else None


def check_unquantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not the weights themselves.

    Raises:
        FormatError: its config says how it was quantised.
    """
    if settings := checkpoint.config.get("quantization_config"):
        method = settings.get("quant_method", "an unnamed method") if isinstance(settings, Mapping) else settings
        raise FormatError(
            f"{checkpoint.source} is quantised ({method}), so its tensors are no weights that could be subtracted. "
            "Load it, call model.dequantize(), save the result, and give that directory."
        )


def _floating(checkpoint: Checkpoint) -> list[str]:
    """The tensors that can be weights: integers are buffers, such as position ids, or packed."""
    return [name for name in checkpoint.names() if checkpoint.dtype(name).is_floating_point]
