"""What a sparse model says to the wrappers that train it in several processes, and what it cannot do inside them."""

from __future__ import annotations

from torch import nn

from .iteration import iter_layers


class WrappedInTraining:
    """The part of `SparseModel` that DDP and FSDP2 meet.

    Attributes:
        model: the base model, with its sparse layers.
    """

    model: nn.Module

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP would broadcast every support in every forward. All processes choose alike, so that is for nothing. It
        # looks names up from whatever it wraps: the PeftModel, or the tuner.
        names = [name for name, _ in self.model.named_buffers() if "sparse_ft_" in name]
        return [prefix + name for name in names for prefix in ("base_model.model.", "model.")]

    def _check_merge_allowed(self) -> None:
        # Called by PEFT before the first layer is merged. Its own version warns about tied embeddings; here merging
        # unties them.
        for name, layer in iter_layers(self.model):
            layer.refuse_parts(layer.active_adapters, name)
