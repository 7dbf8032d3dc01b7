"""Weight decay of sparse deltas alone: it pulls to the pretrained weights, and a head has none to be pulled to."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from ..core.sharded import is_sharded
from ..tuners.sparse_ft.layers.delta import AdapterDelta

logger = logging.getLogger(__name__)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model for an optimizer, with weight decay on the values of sparse deltas alone.

        optimizer = SparseAdamW(parameter_groups(model, weight_decay=30.0), lr=1e-4)

    Norms and biases are decayed if deltas tune them; heads (`modules_to_save`) and all else are not.

    Args:
        model: with its adapters, wrapped or not.
        weight_decay: lambda >= 0; as published it is large, for it is multiplied by a small learning rate.

    Returns:
        two groups, decayed parameters first.

    Source: thesis 7.3 ("regularising SpIEL"): decay of the parameters phi; its code decays heads as well.
    """
    values = _values_of_deltas(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in values], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in values], "weight_decay": 0.0},
    ]


def decay_deltas_only(optimizer: Any, model: nn.Module) -> None:
    """Give a trainer's optimizer the groups of `parameter_groups`, if it has those of transformers' own rule.

    That rule decays everything but norms and biases, heads among them. Saved states keep its order, so that checkpoints
    go back and forth between the two. Groups of the user's own are left alone.

    Args:
        optimizer: the trainer's, wrapped by accelerate or not.
        model: what it trains.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    values = _values_of_deltas(model)
    if not isinstance(optimizer, Optimizer) or not values or not _is_grouped_by_transformers(optimizer, model):
        return
    decayed, others = optimizer.param_groups
    together = [*decayed["params"], *others["params"]]
    if any(is_sharded(p) for p in together):
        logger.warning(
            "weight_decay=%g acts on heads too, and not on deltas on norms and biases: FSDP saves the optimizer by its "
            "groups, so they stay. A create_optimizer that uses peft_sparse.parameter_groups decays deltas alone.",
            decayed["weight_decay"],
        )
        return
    theirs = [list(decayed["params"]), list(others["params"])]
    ours = [[p for p in together if (id(p) in values) == is_decayed] for is_decayed in (True, False)]
    if [[id(p) for p in part] for part in theirs] == [[id(p) for p in part] for part in ours]:
        return

    def put(parts: list[list[Tensor]]) -> None:
        for group, part in zip(optimizer.param_groups, parts, strict=True):
            group["params"] = list(part)

    put(ours)
    optimizer.register_state_dict_pre_hook(lambda _: put(theirs))
    optimizer.register_state_dict_post_hook(lambda _, state: put(ours))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: put(theirs))
    optimizer.register_load_state_dict_post_hook(lambda _: put(ours))


def _values_of_deltas(model: nn.Module) -> set[int]:
    deltas = (module for module in model.modules() if isinstance(module, AdapterDelta))
    return {id(delta.held_values) for delta in deltas if delta.held_values.requires_grad}


def _is_grouped_by_transformers(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether there are two groups, decayed and not, just as `Trainer.create_optimizer` makes them."""
    if len(optimizer.param_groups) != 2:
        return False
    decayed, others = optimizer.param_groups
    if not decayed.get("weight_decay") or others.get("weight_decay"):
        return False
    rule = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    expected = [[id(p) for name, p in named if (name in rule) == is_decayed] for is_decayed in (True, False)]
    return expected == [[id(p) for p in group["params"]] for group in (decayed, others)]
