"""The base model, whatever it is wrapped in, and the paths of its modules."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from ..._peft_bridge import BaseTuner
from ...core.names import unwrapped as path_in_base

__all__ = ["base_model_of", "path_in_base"]


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel, a tuner or a distributed wrapper; the model itself if it is none of these."""
    while True:
        if isinstance(model, PeftModel):
            model = model.base_model
        elif isinstance(model, BaseTuner):
            model = model.model
        elif _is_wrapper(model):
            model = model.module
        else:
            return model


def _is_wrapper(model: nn.Module) -> bool:
    """Whether a model stands around another one: DDP, or an engine that hands on the attributes of what is inside."""
    inside = getattr(model, "module", None)
    return isinstance(inside, (PeftModel, BaseTuner)) or (
        isinstance(inside, nn.Module) and not hasattr(model, "config")
    )
