"""What an adapter of another library holds, in this library's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.delta import SparseDelta
from ..errors import FormatError
from ..tuners.common.layer import PARAMETERS

COMPOSABLE_SFT, SPIEL, ROSA = "composable-sft", "spiel", "rosa"


@dataclass(frozen=True, eq=False)
class Foreign:
    """An adapter that was read and checked, and belongs to no model yet.

    Attributes:
        kind: `COMPOSABLE_SFT`, `SPIEL` or `ROSA`.
        source: where it came from, as it was given.
        path: the file of the weights on this machine.
        deltas: {parameter of the base model: difference}; none is empty.
        heads: {parameter: tensor} of what was trained whole.
        untouched: parameters that the file lists and changes nowhere.
        task_type: PEFT's, if the file says it.
        base: the base model, if the file says it.
        base_revision: its revision, if the file says it.
        settings: what the file's own configuration says of the training run, for the record.
    """

    kind: str
    source: str
    path: Path
    deltas: Mapping[str, SparseDelta]
    heads: Mapping[str, Tensor]
    untouched: frozenset[str] = frozenset()
    task_type: str | None = None
    base: str | None = None
    base_revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """How many weights it changes, heads aside."""
        return sum(delta.count for delta in self.deltas.values())


def check_holdable(deltas: Mapping[str, SparseDelta], source: str) -> None:
    """Refuse differences that no sparse adapter can hold: of parameters that are neither a weight nor a bias.

    Raises:
        FormatError: there are some.
    """
    for name in deltas:
        module, _, part = name.rpartition(".")
        if part not in PARAMETERS or not module:
            raise FormatError(
                f"{source} changes {name!r}, and a sparse adapter holds only the weights and biases of modules. "
                "Nothing was written. Merge it with the library that made it, and take the difference: peft-sparse diff"
            )


def check_finite(values: Tensor, name: str) -> None:
    """Refuse values of a run that had diverged.

    Raises:
        FormatError: some are NaN or infinite.
    """
    if broken := int((~values.isfinite()).sum()):
        raise FormatError(f"{name}: {broken} values are NaN or infinite, so the run that wrote them had diverged.")


def modules_of_heads(foreign: Foreign) -> list[str]:
    """The topmost modules that hold the heads and nothing else of the adapter: what PEFT calls `modules_to_save`.

    Raises:
        FormatError: a head lies in no such module.
    """
    others = {*foreign.deltas, *foreign.untouched}
    found: dict[str, None] = {}
    for name in foreign.heads:
        parts = name.split(".")[:-1]
        paths = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        module = next((path for path in paths if not any(other.startswith(f"{path}.") for other in others)), None)
        if module is None:
            raise FormatError(
                f"{foreign.source} holds {name!r} whole, in a module whose other parameters it changes sparsely. PEFT "
                "saves modules whole (modules_to_save). Leave the heads out: with_head=False (--no-head)."
            )
        found[module] = None
    return list(found)
