"""Sparse fine-tuning and cross-lingual adapters for PEFT. Importing this package registers its tuner types."""

from __future__ import annotations

from ._peft_bridge import register
from .core.delta import SparseDelta
from .errors import ConfigError, FormatError, SelectionError, SparseError
from .tuners.sparse_ft.config import LotteryTicketConfig, RandConfig, SparseConfig
from .tuners.sparse_ft.iteration import iter_deltas
from .tuners.sparse_ft.model import SparseModel
from .tuners.sparse_ft.resident import resident

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "FormatError",
    "LotteryTicketConfig",
    "RandConfig",
    "SelectionError",
    "SparseConfig",
    "SparseDelta",
    "SparseError",
    "SparseModel",
    "iter_deltas",
    "resident",
]

register("SPARSE_FT", SparseConfig, SparseModel)
