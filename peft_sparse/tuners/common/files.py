"""What all adapters do around their files: gather what is sharded, take out what a refused file was to fill."""

from __future__ import annotations

import logging

from peft import PeftModel
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper
from ...core.sharded import is_sharded, whole

logger = logging.getLogger(__name__)


def gather(model: nn.Module, own: dict[str, Tensor], state_dict: dict[str, Tensor]) -> None:
    """Put whole tensors in the place of sharded ones that go into an adapter's file, in both dictionaries.

    Args:
        model: whatever carries the adapter.
        own: the adapter's own tensors.
        state_dict: the model's state dict, in which the heads are.
    """
    heads = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    for tensors in (own, state_dict):
        for key, tensor in tensors.items():
            if (tensors is own or key.startswith(heads)) and is_sharded(tensor):
                tensors[key] = whole(tensor).cpu()


def discard(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model whose loading failed; the base model is as it was before."""
    if not isinstance(model, PeftModel):
        logger.warning("The adapter %s was refused but stays in the model without effect: delete it.", adapter_name)
    elif len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        trainable = model.base_model.trainable_before
        for name, parameter in model.base_model.unload().named_parameters():
            parameter.requires_grad_(name in trainable)
