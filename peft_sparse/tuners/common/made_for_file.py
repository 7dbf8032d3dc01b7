"""Was this adapter made for this file? The one rule by which a refused file takes an adapter out of its model.

PEFT adds an adapter first and opens its file next. If the file is refused, that adapter is taken out again, since the
base model is to be as it was; one that holds anything of its own stays, with all its tensors. An adapter is made for
the file that comes next if

- its config was read from a folder, or it was added for inference: nobody trains such a one from the start; and
- its tensors, heads among them, are bit for bit those that it was made with. So no training run, assignment or earlier
  file can be lost. Neither a mark in a config nor torch's counter of writes would do: the first knows nothing of
  training, the second nothing of kernels that write past torch, and neither outlives a copy rightly.

What is asked elsewhere are other questions: whether the weights of a sparse adapter are selected yet
(`unselected.is_unselected`), and which support a layer has seen last (`AdapterDelta.support_version`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..._peft_bridge import BaseTuner
from ...core.sharded import is_sharded
from .base_model import tensors_of_adapter
from .removal import discard

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def note_new(model: nn.Module, config: Any, adapter_name: str) -> None:
    """Remember with a new adapter what it was made with, if its file is to follow.

    Args:
        model: whatever carries the adapter.
        config: its own copy of its config, whose `awaits_file` this answers.
        adapter_name: its name.
    """
    expects = config.awaits_file or config.inference_mode
    config.as_made = _checksums(model, adapter_name) if expects else None
    config.awaits_file = False


def is_made_for_file(model: nn.Module, config: Any, adapter_name: str) -> bool:
    """Whether an adapter was made for the file that comes next: see above."""
    return config.as_made is not None and config.as_made == _checksums(model, adapter_name)


class Receipt(ExitStack):
    """What is undone if an adapter cannot take a file; an adapter that was made for this file is taken out.

    Attributes:
        is_own_file: whether it was made for it, so that the file must hold what the config says.
    """

    is_own_file = False


@contextmanager
def cast_anew(model: nn.Module, config: Any, adapter_name: str) -> Iterator[None]:
    """Around a cast by PEFT: an adapter that is as it was made still counts as such afterwards."""
    is_made = is_made_for_file(model, config, adapter_name)
    yield
    if is_made:
        config.as_made = _checksums(model, adapter_name)


@contextmanager
def receiving(model: nn.Module, config: Any, adapter_name: str) -> Iterator[Receipt]:
    """Check a file, and make an adapter ready for it. If that fails, or the model refuses the tensors, it is undone.

    Args:
        model: whatever carries the adapter.
        config: the model's own copy of its config.
        adapter_name: its name.

    Yields:
        what is undone then. It takes callbacks that put back what an adapter held.
    """
    with Receipt() as undo:
        undo.is_own_file = is_made_for_file(model, config, adapter_name)
        if undo.is_own_file:
            undo.callback(discard, model, adapter_name)
        yield undo
        config.as_made = None
        tuner = model.base_model if isinstance(model, PeftModel) else model
        later = undo.pop_all()
        if isinstance(tuner, BaseTuner):
            tuner.undo_file = later


def _checksums(model: nn.Module, adapter_name: str) -> tuple[int, ...] | None:
    """A checksum of each tensor of an adapter; None if FSDP2 has sharded one."""
    tensors = list(tensors_of_adapter(model, adapter_name))
    if any(is_sharded(tensor) for tensor in tensors):
        return None
    sums = [_sum_of_bits(tensor) for tensor in tensors if not tensor.is_meta]
    found = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []
    return (len(tensors), *found)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
