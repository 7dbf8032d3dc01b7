"""A layer budget out of an adapter: of a model, of a config, or of a file."""

from __future__ import annotations

import os

from torch import nn

from ...checkpoints.adapter_files import read_sparse_config
from ...selection.layer_budgets import measured_shares
from ..common.adapter_config import config_of
from .configs.base import SPARSE_FT, SparseConfig
from .state import count_weights


def layer_budget_from(
    adapter: nn.Module | SparseConfig | str | os.PathLike[str], adapter_name: str = "default"
) -> dict[str, float]:
    """The distribution over layers that an adapter shows, to be given to another as its budget.

        RandConfig(density=0.05, budget=layer_budget_from("path/to/lt-sft"), target_modules="all")

    Args:
        adapter: a model with adapters, the config of an adapter whose weights are selected, or a saved one, of which
            adapter_config.json alone is read: its folder, or an id of the Hub ("owner/name[/folder][@revision]").
        adapter_name: which of a model's adapters.

    Returns:
        {regex: share}, see `peft_sparse.selection.layer_budgets.measured_shares`: on the same targets and at the same
        density each layer gets as many weights as it has there.

    Raises:
        ConfigError: there is no such adapter, or it has no weights.
        FormatError: what is saved there is damaged, or no sparse adapter.
    """
    if isinstance(adapter, SparseConfig):
        counts = adapter.counts or {}
    elif isinstance(adapter, nn.Module):
        config_of(adapter, adapter_name, SPARSE_FT, called="a sparse adapter")
        counts = count_weights(adapter, adapter_name)
    else:
        counts = read_sparse_config(adapter)["counts"] or {}
    return measured_shares(counts)
