"""The interface of a first phase, to trainers and their checkpoints, and the registry of phases."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from torch import nn

from ...errors import ConfigError
from ...optim.l1 import Pull

# {name: phase}; a config names its own in `first_phase`.
PHASES: dict[str, type[Phase]] = {}
# Points of a run that are not in its first phase; see `ResumePoint`.
SELECTION, SECOND = "selection", "second"
_Kind = TypeVar("_Kind", bound="type[Phase]")


class Phase(ABC):
    """A phase before an adapter's weights train, as a trainer goes through it.

    A context manager: `select` in the block decides what trains afterwards, and leaving the block after an exception
    leaves the base model as it was. A new one is a class with `@first_phase`, whose name a config gives in
    `first_phase`; trainers, checkpoints and resuming need no word about it.

    Attributes:
        name, next_name: what logs call this phase and the one after it.
        args_name: the trainer's argument for how its training arguments differ; None if it takes none.
        folder: its checkpoints' folder in the output folder. The Hub's upload leaves out what starts with an
            underscore.
        file_name: the file that tells its checkpoints from others; None if it has none.
        trains: whether the trainer's loop runs in it. If not, `select` does all.
        holds_adapter: whether its checkpoints hold the adapter in PEFT's files, and not in `file_name` alone.
        model: the model it was started on.
        adapter_name: the adapter that it is for.
        l1_coefficient: of the penalty in it; 0 for none.
    """

    name: ClassVar[str]
    next_name: ClassVar[str] = "sparse"
    args_name: ClassVar[str | None] = None
    folder: ClassVar[str]
    file_name: ClassVar[str | None] = None
    trains: ClassVar[bool] = True
    holds_adapter: ClassVar[bool] = True

    model: nn.Module
    adapter_name: str
    l1_coefficient: float = 0.0

    @classmethod
    def is_before(cls, model: Any, adapter_name: str) -> bool:
        """Whether an adapter whose config names this phase is to go through it."""
        return True

    @classmethod  # noqa: B027
    def refuse(cls, trainer: Any) -> None:
        """Raise a ConfigError if this trainer cannot run the phase."""

    @classmethod  # noqa: B027
    def warn_of_args(cls, changes: Mapping[str, Any]) -> None:
        """Warn of training arguments (what `args_name` was given) that are legal and unwise."""

    @classmethod
    @abstractmethod
    def begin(cls, trainer: Any, adapter_name: str) -> Phase:
        """The phase, open on the trainer's model."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """How many weights it works on."""

    @abstractmethod
    def select(self) -> Any:
        """Decide, of what was learnt, what trains afterwards."""

    def save(self, directory: str | os.PathLike[str]) -> None:  # noqa: B027
        """Write what a checkpoint inside the phase needs, `file_name` among it, beside the trainer's own files."""

    def load(self, directory: str | os.PathLike[str]) -> None:  # noqa: B027
        """Put the open phase where `save` was called.

        Raises:
            FormatError: the checkpoint is of another phase or adapter, or damaged; nothing is changed then.
        """

    def pulls(self) -> Iterable[Pull]:
        """The parts of its L1 penalty."""
        return ()

    def __enter__(self) -> Any:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go over to the next phase if `select` was called and nothing was raised; else leave the model as it was."""


def first_phase(kind: _Kind) -> _Kind:
    """Class decorator: make a phase the one that `first_phase = name` of a config means.

    Raises:
        ConfigError: its name or file is another phase's.
    """
    others = [other for other in PHASES.values() if other.__qualname__ != kind.__qualname__]
    if kind.name in {SELECTION, SECOND, *(other.name for other in others)}:
        raise ConfigError(f"name of {kind.__name__} must be of no other phase, got {kind.name!r}.")
    if kind.file_name is not None and kind.file_name in {other.file_name for other in others}:
        raise ConfigError(f"file_name of {kind.__name__} must be of no other phase, got {kind.file_name!r}.")
    PHASES[kind.name] = kind
    return kind


def phase_called(name: str) -> type[Phase]:
    """The phase of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PHASES:
        raise ConfigError(
            f"first_phase must be one of {sorted(PHASES)}, got {name!r}. Import the module whose class has it, with "
            "@first_phase."
        )
    return PHASES[name]
