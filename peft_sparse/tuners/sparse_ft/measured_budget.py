"""A layer budget out of an adapter: of a model, of a config, or of a file."""

from __future__ import annotations

import os

from torch import nn

from ...checkpoints.files import read_counts
from ...errors import ConfigError
from ...selection.layer_budgets import measured_shares
from .config import SparseConfig
from .state import count_weights


def layer_budget_from(
    adapter: nn.Module | SparseConfig | str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> dict[str, float]:
    """The distribution over layers that an adapter shows, to be given to another as its budget.

        RandConfig(density=0.05, budget=layer_budget_from("path/to/lt-sft"), target_modules="all")

    Args:
        adapter: a model with adapters, the config of an adapter whose weights are selected, or the folder or Hub
            repository of a saved one, of which adapter_config.json alone is read.
        adapter_name: which of a model's adapters.
        subfolder, revision: where in the repository.

    Returns:
        {regex: share}, see `peft_sparse.selection.layer_budgets.measured_shares`: on the same targets and at the same
        density each layer gets as many weights as it has there.

    Raises:
        ConfigError: the adapter has no weights, or the model no such adapter.
        FormatError: the folder holds no sparse adapter.
    """
    if isinstance(adapter, SparseConfig):
        counts = adapter.counts or {}
    elif isinstance(adapter, nn.Module):
        counts = count_weights(adapter, adapter_name)
        if not counts:
            raise ConfigError(f"adapter_name must name a sparse adapter of the model, got {adapter_name!r}.")
    else:
        counts = read_counts(adapter, subfolder=subfolder, revision=revision)
    return measured_shares(counts)
