"""Resident mode: active deltas stand in the base weights, so that a forward costs what the base model's costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .iteration import iter_layers


@contextmanager
def resident(model: nn.Module) -> Iterator[nn.Module]:
    """Keep the active deltas written into the weights of linear layers for the length of the block.

    Every forward brings the k written entries up to date first, so training works as ever, with any optimizer. Leaving
    the block, also by an exception, restores the base weights bit for bit. Inside it, saving an adapter is right as
    ever, but the base weights (`model.state_dict()`, a merged copy made by hand) hold the delta. Tied weights,
    embeddings, norms, biases and convolutions keep the way they always work.

    Args:
        model: a PeftModel, a tuner or a model with sparse layers in it.

    Yields:
        the model.
    """
    layers = [layer for _, layer in iter_layers(model)]
    before = [layer.is_resident for layer in layers]
    for layer in layers:
        layer.is_resident = True
    try:
        yield model
    finally:
        for layer, was_resident in zip(layers, before, strict=True):
            layer.is_resident = was_resident
            if not was_resident and not layer.merged:
                layer.restore()
