"""Ties between tensors that merging has given different contents."""

from __future__ import annotations

from torch import nn


def forget_broken_ties(model: nn.Module) -> None:
    """Make a merged model save and reload as it is, where merging gave tied tensors different contents."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if not ties:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    broken = [k for k, v in ties.items() if k in parameters and v in parameters and parameters[k] is not parameters[v]]
    for key in broken:
        del ties[key]
