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
from .tuners.bottleneck.adapter import BottleneckWeights
from .tuners.bottleneck.config import BottleneckConfig
from .tuners.bottleneck.hub import load_adapter_hub, save_adapter_hub
from .tuners.bottleneck.model import BottleneckModel
from .tuners.bottleneck.weights import bottleneck_weights, generated_weights, iter_bottlenecks, set_bottleneck_weights
from .tuners.madg.config import MadGConfig
from .tuners.madg.generated import GeneratedAdapter
from .tuners.madg.importance import FeatureImportance
from .tuners.madg.model import MadGModel, generate_adapter, set_language
from .tuners.sparse_ft.config import SparseConfig
from .tuners.sparse_ft.iteration import iter_deltas
from .tuners.sparse_ft.model import SparseModel
from .tuners.sparse_ft.one_shot_configs import RandConfig
from .tuners.sparse_ft.resident import resident
from .tuners.sparse_ft.spiel_configs import SpielAGConfig, SpielMAConfig
from .tuners.sparse_ft.two_phase_configs import LotteryTicketConfig

if TYPE_CHECKING:
    from .inspection.conflicts import conflicts
    from .inspection.feature_importance import importance_table, plot_importance
    from .inspection.page import plot_adapters
    from .inspection.report import inspect_adapter
    from .training.callback import load_state as load_training_state
    from .training.callback import save_state as save_training_state
    from .training.dense_phase import DensePhase
    from .training.lottery import select, start_dense_phase, start_sparse_phase
    from .training.trainer import SparseSFTTrainer as SparseSFTTrainer
    from .training.trainer import SparseTrainer, sparse_trainer
    from .typology import Typology, load_typology

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "BottleneckConfig",
    "BottleneckModel",
    "BottleneckWeights",
    "ConfigError",
    "DensePhase",
    "FeatureImportance",
    "FormatError",
    "GeneratedAdapter",
    "LotteryTicketConfig",
    "MadGConfig",
    "MadGModel",
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
    "bottleneck_weights",
    "conflicts",
    "generate_adapter",
    "generated_weights",
    "importance_table",
    "inspect_adapter",
    "iter_bottlenecks",
    "iter_deltas",
    "iter_reselectors",
    "load_adapter_hub",
    "load_training_state",
    "load_typology",
    "plot_adapters",
    "plot_importance",
    "resident",
    "save_adapter_hub",
    "save_training_state",
    "select",
    "set_bottleneck_weights",
    "set_language",
    "sparse_trainer",
    "start_dense_phase",
    "start_sparse_phase",
]

# Loaded when asked for: trainers import transformers' trainer, and SparseSFTTrainer imports TRL, which is optional.
_LAZY = {
    "DensePhase": "training.dense_phase.DensePhase",
    "SparseSFTTrainer": "training.trainer.SparseSFTTrainer",
    "SparseTrainer": "training.trainer.SparseTrainer",
    "Typology": "typology.table.Typology",
    "conflicts": "inspection.conflicts.conflicts",
    "importance_table": "inspection.feature_importance.importance_table",
    "inspect_adapter": "inspection.report.inspect_adapter",
    "load_training_state": "training.callback.load_state",
    "load_typology": "typology.table.load_typology",
    "plot_adapters": "inspection.page.plot_adapters",
    "plot_importance": "inspection.feature_importance.plot_importance",
    "save_training_state": "training.callback.save_state",
    "select": "training.lottery.select",
    "sparse_trainer": "training.trainer.sparse_trainer",
    "start_dense_phase": "training.lottery.start_dense_phase",
    "start_sparse_phase": "training.lottery.start_sparse_phase",
}

register("SPARSE_FT", SparseConfig, SparseModel)
register("BOTTLENECK", BottleneckConfig, BottleneckModel)
register("MAD_G", MadGConfig, MadGModel)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].rpartition(".")
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
