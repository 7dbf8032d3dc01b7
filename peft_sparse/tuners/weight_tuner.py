"""What the tuners of this library share in how PEFT drives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .mixed_batches import give_names, names_by_module
from .weight_layer import WeightLayer

# What PEFT adds to `modules_to_save` of the config that it was given once the adapter is in: too late for our copy.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class WeightTuner(BaseTuner):
    """Base class of tuners whose layers are `WeightLayer`s."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight`, which a head of several layers (XLM-R's classifier) does not have, and moves
        # an adapter on the meta device if its layer is one of bitsandbytes' 8-bit ones. Ours lie where they belong.
        setattr(parent, child_name, new_module)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        # PEFT warns that nothing ties the adapters; here the rule is fixed: the output matrix keeps the base weights.
        return

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it alone was active, the first that is left takes over."""
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        left = left or list(self.peft_config)[:1]
        # PEFT lets every layer fall back to the first adapter that it has itself: layers would end on different ones,
        # and the model on none if its first layer has none.
        layers = [module for module in self.model.modules() if isinstance(module, WeightLayer)]
        if any(layer.active_adapters != left for layer in layers):
            self.set_adapter(left)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per example, to every layer for the length of one forward or generate call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        handles = [
            give_names(module, names)
            for module, names in names_by_module(self, list(adapter_names), kwargs, WeightLayer)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def with_heads(config: PeftConfig) -> list[str] | None:
    """`modules_to_save` of a config, with the heads that PEFT adds for its task."""
    own = list(config.modules_to_save or ())
    heads = _HEADS.get(config.task_type or "", ())
    return [*own, *(head for head in heads if head not in own)] or config.modules_to_save
