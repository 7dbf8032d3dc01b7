"""Adapters that also tune the head of the class that they were trained on, loaded into a class with another head."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from ...core.names import is_above_encoder
from .targets import base_prefix, named_targets

logger = logging.getLogger(__name__)


def parts_of_other_heads(paths: Collection[str], model: nn.Module) -> list[str]:
    """Modules of an adapter's file that belong to a head that this model does not have.

    Only heads can be left out, and the pooler below them, which classes that need none do not have. A model that lacks
    another module of the encoder is another model.

    Args:
        paths: modules that the file holds something of, by their path in the base model.
        model: the base model.
    """
    root = base_prefix(model)
    if not root or not any(path.startswith(root) for path in paths):
        return []
    known = {path for path, _ in named_targets(model)}
    return sorted(path for path in paths if is_above_encoder(path, root) and path not in known)


def heads_without_part(paths: Collection[str], held: Collection[str], model: nn.Module) -> list[str]:
    """The targeted modules of this model's head that an adapter's file holds nothing of.

    Args:
        paths: the targets.
        held: modules that the file holds something of.
        model: the base model.
    """
    root = base_prefix(model)
    if not root or not any(path.startswith(root) for path in held):
        return []
    return sorted(path for path in paths if is_above_encoder(path, root) and path not in held)


def warn_of_other_head(
    adapter_name: str, model: nn.Module, *, left_out: Collection[str], lacking: Collection[str]
) -> None:
    """Say which parts of an adapter have no place in a model, and which parts of its head the adapter leaves alone."""
    name = type(model).__name__
    if left_out:
        logger.warning(
            "adapter %r also tunes %s, of the head that it was trained with. %s has no such part: it is left "
            "out, and what is saved from here lacks it. Below the head all is as trained.",
            adapter_name,
            ", ".join(left_out),
            name,
        )
    if lacking:
        logger.warning(
            "the file of adapter %r holds nothing for %s: these layers of %s's head stay as in the base model.",
            adapter_name,
            ", ".join(lacking),
            name,
        )
