"""What all adapters do around their files: gather what is sharded, take out what a refused file was to fill."""

from __future__ import annotations

import logging

from peft import PeftModel
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner
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
    """Take an adapter out of a model whose loading failed; the base model is as it was before.

    Args:
        model: the `PeftModel`, or its tuner.
        adapter_name: the adapter, which is not active unless it is the only one.
    """
    if not isinstance(model, (PeftModel, BaseTuner)):
        logger.warning("The adapter %s was refused but stays in the model without effect: delete it.", adapter_name)
    elif len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        tuner = model.base_model if isinstance(model, PeftModel) else model
        trainable = tuner.trainable_before
        for name, parameter in tuner.unload().named_parameters():
            parameter.requires_grad_(name in trainable)
