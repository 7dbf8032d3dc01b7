"""Whether a checkpoint holds, undamaged, all that a bit-identical resume needs."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...checks import is_whole
from ...errors import FormatError, SparseError
from .preemption import SENTINEL

STATE = "trainer_state.json"
WAY_OUT = (
    "resume_from_checkpoint=True takes the newest complete one of the output folder; or name another one, or train "
    "from the start."
)
_TRAINING = ("optimizer.pt", "scheduler.pt")


@dataclass(frozen=True)
class Needs:
    """What a run has to find in a checkpoint.

    Attributes:
        adapters: {name: folder in the checkpoint} of the adapters that it trains.
        files: further files, e.g. the state of the reselection; paths in the checkpoint's folder.
        training: whether it finds states of optimizer, scheduler and random generators (not with `save_only_model`, and
            not where FSDP or DeepSpeed writes them in its own way).
        rank: of this process, if there are several.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    training: bool = True
    rank: int | None = None


@dataclass(frozen=True)
class Fault:
    """Why a checkpoint is not complete.

    Attributes:
        path: the file.
        what: "is missing", or how it is damaged.
    """

    path: str
    what: str

    @property
    def is_missing(self) -> bool:
        """Whether the file is not there at all."""
        return self.what == "is missing"

    def __str__(self) -> str:
        return f"{self.path} {self.what}"

    def error(self) -> FormatError:
        """What to tell a user who named this checkpoint."""
        return FormatError(f"resume_from_checkpoint: {self}, so this checkpoint cannot be resumed from. {WAY_OUT}")


def faults(folder: str, files: tuple[str, ...], needs: Needs) -> Iterator[Fault]:
    """What is wrong with a checkpoint of a trainer.

    Files are opened, and their tensors are not read: a truncated, an empty and an unreadable file are found, a flipped
    bit is not.

    Args:
        folder: the checkpoint.
        files: what makes it a checkpoint of its phase, e.g. "trainer_state.json"; paths in it.
        needs: what the run needs besides.

    Yields:
        what is missing or damaged, the gravest first.
    """
    if os.path.exists(os.path.join(folder, SENTINEL)):
        yield Fault(os.path.join(folder, SENTINEL), "says that the writing of the checkpoint was cut short")
    for name in (*files, *_adapter_files(folder, needs.adapters)):
        yield from _fault(folder, name)
    if STATE not in files:
        return
    if needs.training:
        random = "rng_state.pth" if needs.rank is None else f"rng_state_{needs.rank}.pth"
        for name in (*_TRAINING, random):
            yield from _fault(folder, name)
    for name in needs.files:
        yield from _fault(folder, name)


def holds_adapter(folder: str) -> bool:
    """Whether there is an adapter in a folder, be it damaged."""
    return any(os.path.exists(os.path.join(folder, name)) for name in ("adapter_config.json", *_WEIGHTS))


_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def _adapter_files(folder: str, adapters: Mapping[str, str]) -> Iterator[str]:
    """An adapter that was added after the checkpoint is not in it; but one of those that train has to be."""
    folders = list(adapters.values())
    for own in [own for own in folders if holds_adapter(os.path.join(folder, own))] or folders[:1]:
        yield os.path.join(own, "adapter_config.json")
        weights = [os.path.join(own, name) for name in _WEIGHTS]
        yield next((name for name in weights if os.path.exists(os.path.join(folder, name))), weights[0])


def _fault(folder: str, name: str) -> Iterator[Fault]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        yield Fault(path, "is missing")
        return
    check = _CHECKS.get(os.path.splitext(name)[1])
    try:
        if check is not None:
            check(path)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        yield Fault(path, f"is damaged ({str(error) or type(error).__name__})")


def _check_json(path: str) -> None:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")  # noqa: TRY004
    if os.path.basename(path) == STATE and not _is_count(content.get("global_step")):
        raise ValueError(f"global_step must be a whole number, got {content.get('global_step')!r}")


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _check_safetensors(path: str) -> None:
    with safe_open(path, framework="pt"):
        pass


def _check_zip(path: str) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("its end is missing, or it was not written by torch.save")


_CHECKS: dict[str, Callable[[str], None]] = {
    ".json": _check_json,
    ".safetensors": _check_safetensors,
    ".pt": _check_zip,
    ".pth": _check_zip,
    ".bin": _check_zip,
}


def damaged(path: str, error: Exception) -> FormatError:
    """What to tell a user whose checkpoint has a file that opens, but does not hold what it should."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return FormatError(f"{path} is damaged, or of another run ({reason}). {WAY_OUT}")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Tell which file of a checkpoint it is that cannot be read.

    Raises:
        FormatError: it cannot.
    """
    try:
        yield
    except (torch.OutOfMemoryError, SparseError):
        raise
    except _UNREADABLE as error:
        raise damaged(path, error) from error


# What torch.load, json and safetensors raise at bytes that make no sense, and optimizers at a foreign state.
_UNREADABLE = (
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    OSError,
    RecursionError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def check_moments(optimizer: Any) -> None:
    """Refuse a loaded state whose moments are of other weights: torch notices only at the first step, if at all.

    Raises:
        ValueError: a moment has another shape than its parameter.
    """
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            moment = state.get(key)
            if isinstance(moment, torch.Tensor) and moment.shape != parameter.shape:
                raise ValueError(
                    f"{key} of shape {tuple(moment.shape)} is for a parameter of shape {tuple(parameter.shape)}"
                )
