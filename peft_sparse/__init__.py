"""Sparse fine-tuning and cross-lingual adapters for PEFT. Importing this package registers its tuner types."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._peft_bridge import register
from .core.delta import SparseDelta
from .errors import ConfigError, FormatError, SelectionError, SparseError
from .optim.sm3 import SM3
from .optim.sparse_adamw import SparseAdamW
from .training.reselector import Reselection, Reselector, iter_reselectors
from .tuners.sparse_ft.config import SparseConfig
from .tuners.sparse_ft.iteration import iter_deltas
from .tuners.sparse_ft.model import SparseModel
from .tuners.sparse_ft.one_shot_configs import RandConfig
from .tuners.sparse_ft.resident import resident
from .tuners.sparse_ft.spiel_configs import SpielAGConfig, SpielMAConfig
from .tuners.sparse_ft.two_phase_configs import LotteryTicketConfig

if TYPE_CHECKING:
    from .inspection.conflicts import conflicts
    from .inspection.page import plot_adapters
    from .inspection.report import inspect_adapter
    from .training.callback import load_state as load_training_state
    from .training.callback import save_state as save_training_state
    from .training.dense_phase import DensePhase
    from .training.language_switch import LanguageSwitch, language_below_task
    from .training.lottery import select, start_dense_phase, start_sparse_phase
    from .training.multisource import MultiSourceCollator, MultiSourceDataset, evaluation_batches
    from .training.trainer import SparseSFTTrainer as SparseSFTTrainer
    from .training.trainer import SparseTrainer, sparse_trainer
    from .tuners.for_language import for_language
    from .typology import Typology, load_typology

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "ConfigError",
    "DensePhase",
    "FormatError",
    "LanguageSwitch",
    "LotteryTicketConfig",
    "MultiSourceCollator",
    "MultiSourceDataset",
    "RandConfig",
    "Reselection",
    "Reselector",
    "SelectionError",
    "SparseAdamW",
    "SparseConfig",
    "SparseDelta",
    "SparseError",
    "SparseModel",
    "SparseTrainer",
    "SpielAGConfig",
    "SpielMAConfig",
    "Typology",
    "conflicts",
    "evaluation_batches",
    "for_language",
    "inspect_adapter",
    "iter_deltas",
    "iter_reselectors",
    "language_below_task",
    "load_training_state",
    "load_typology",
    "plot_adapters",
    "resident",
    "save_training_state",
    "select",
    "sparse_trainer",
    "start_dense_phase",
    "start_sparse_phase",
]

# Loaded when asked for: trainers import transformers' trainer, and SparseSFTTrainer imports TRL, which is optional.
_LAZY = {
    "DensePhase": "training.dense_phase.DensePhase",
    "LanguageSwitch": "training.language_switch.LanguageSwitch",
    "MultiSourceCollator": "training.multisource.MultiSourceCollator",
    "MultiSourceDataset": "training.multisource.MultiSourceDataset",
    "SparseSFTTrainer": "training.trainer.SparseSFTTrainer",
    "SparseTrainer": "training.trainer.SparseTrainer",
    "Typology": "typology.table.Typology",
    "conflicts": "inspection.conflicts.conflicts",
    "evaluation_batches": "training.multisource.evaluation_batches",
    "for_language": "tuners.for_language.for_language",
    "inspect_adapter": "inspection.report.inspect_adapter",
    "language_below_task": "training.language_switch.language_below_task",
    "load_training_state": "training.callback.load_state",
    "load_typology": "typology.table.load_typology",
    "plot_adapters": "inspection.page.plot_adapters",
    "save_training_state": "training.callback.save_state",
    "select": "training.lottery.select",
    "sparse_trainer": "training.trainer.sparse_trainer",
    "start_dense_phase": "training.lottery.start_dense_phase",
    "start_sparse_phase": "training.lottery.start_sparse_phase",
}

register("SPARSE_FT", SparseConfig, SparseModel)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].rpartition(".")
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
