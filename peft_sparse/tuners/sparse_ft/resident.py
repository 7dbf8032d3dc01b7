"""Resident mode: active deltas are in the base weights, so that a forward costs what the base model's costs."""

from __future__ import annotations

import threading
import warnings
from contextlib import AbstractContextManager, ContextDecorator

from torch import nn

from .iteration import iter_layers
from .layers.base import SparseLayer

# Held while blocks are entered and left: layers count them.
_lock = threading.Lock()


class resident(ContextDecorator, AbstractContextManager[nn.Module]):
    """Keep the active deltas written into the weights of linear layers for the length of the block.

    Every forward brings the k written entries up to date first, so training works as usual, with any optimizer; one
    that records no gradients and finds the values as they were written calls the base layer and nothing else. Values
    may be changed in any way, by `.data` as well. What is written into tuned places of the weights themselves inside
    the block does not outlast it (loading a state dict does, see below). Leaving
    the block, also by an exception, restores the base weights bit for bit. Blocks may be nested, overlap, and be open
    in several threads: the last one to be left restores. Tied, quantised and offloaded weights, embeddings, norms,
    biases and convolutions keep the way they always work.

    State dicts that are taken inside, of the model or of any part of it, hold the base model's own weights, and so does
    whatever is saved by them (`save_pretrained`, accelerate's `save_state`, safetensors' `save_model`); what is loaded
    inside takes their place. Copies of the model (`copy.deepcopy`, `torch.save`) are of the model outside of the block.
    Only the parameters themselves, read one by one (`named_parameters()`), show the weights with the deltas in them:
    copy those outside of the block, or from `state_dict()`. A program that torch.export or torch.jit.trace makes of the
    model uses these parameters: none is made inside of the block, and one that was made before is not to be run there.

    Args:
        model: a PeftModel, a tuner or a model with sparse layers in it. `with` gives it back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._entered: list[list[SparseLayer]] = []
        self._was_entered = False

    def __enter__(self) -> nn.Module:
        layers = [layer for _, layer in iter_layers(self.model)]
        with _lock:
            for layer in layers:
                layer.num_resident += 1
            self._entered.append(layers)
            self._was_entered = True
        return self.model

    def __exit__(self, *exception: object) -> None:
        with _lock:
            for layer in self._entered.pop():
                layer.num_resident -= 1
                if not layer.is_resident and not layer.merged:
                    layer.restore()

    def __del__(self) -> None:
        if not getattr(self, "_was_entered", True):
            warnings.warn(
                "resident(model) does nothing by itself: write `with resident(model): ...` around the training or the "
                "forwards.",
                stacklevel=2,
            )
