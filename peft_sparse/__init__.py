"""Sparse fine-tuning and cross-lingual adapters for PEFT. Importing this package registers its tuner types."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._peft_bridge import register
from .core.delta import SparseDelta
from .errors import ConfigError, FormatError, SelectionError, SparseError
from .optim.sm3 import SM3
from .optim.sparse_adamw import SparseAdamW
from .selection.criteria import Criterion, GradientMeans
from .training.fitted_rate import rate_scales
from .training.phases import unfinished as unfinished
from .training.spiel.reselector import Reselection, Reselector, iter_reselectors
from .tuners.ada_sft.config import AdaSftConfig
from .tuners.ada_sft.model import AdaSftModel
from .tuners.ada_sft.to_sparse import sparse_from_ada
from .tuners.bottleneck.adapter import BottleneckWeights
from .tuners.bottleneck.config import BottleneckConfig
from .tuners.bottleneck.hub import load_adapter_hub, save_adapter_hub
from .tuners.bottleneck.model import BottleneckModel
from .tuners.bottleneck.weights import bottleneck_weights, generated_weights, iter_bottlenecks, set_bottleneck_weights
from .tuners.madg.config import MadGConfig
from .tuners.madg.generated import GeneratedAdapter
from .tuners.madg.importance import FeatureImportance
from .tuners.madg.model import MadGModel, generate_adapter, set_language
from .tuners.sparse_ft.configs.base import SparseConfig
from .tuners.sparse_ft.configs.one_shot import GivenConfig, OneShotConfig, RandConfig
from .tuners.sparse_ft.configs.spiel import SpielAGConfig, SpielMAConfig
from .tuners.sparse_ft.configs.two_phase import DeftXConfig, LotteryTicketConfig
from .tuners.sparse_ft.iteration import iter_deltas
from .tuners.sparse_ft.measured_budget import layer_budget_from
from .tuners.sparse_ft.model import SparseModel
from .tuners.sparse_ft.resident import resident

if TYPE_CHECKING:
    from .checkpoints.merge import merge_checkpoint
    from .distillation.adapters import reduce_adapter
    from .distillation.losses import DistillationLoss
    from .distillation.student import make_student
    from .distillation.teacher import Teacher
    from .distillation.trainer import DistillationTrainer, distilled_trainer
    from .distillation.vocabulary import reduce_vocabulary
    from .extraction.extract import extract_adapter
    from .extraction.report import Extraction
    from .importing.export_adapter import Exported, export_adapter
    from .importing.import_adapter import Imported, import_adapter
    from .importing.rosa import import_mask
    from .inspection.conflicts import conflicts
    from .inspection.feature_importance import importance_table, plot_importance
    from .inspection.page import plot_adapters
    from .inspection.report import inspect_adapter
    from .planning.plan import MemoryPlan, plan_memory
    from .training.average import AdapterAverage
    from .training.decay import parameter_groups
    from .training.languages.language_switch import LanguageSwitch, language_below_task
    from .training.languages.multisource import MultiSourceCollator, MultiSourceDataset, evaluation_batches
    from .training.phases.dense_phase import DensePhase
    from .training.phases.lottery import select, start_dense_phase, start_sparse_phase
    from .training.phases.mask_phase import start_weight_phase
    from .training.phases.one_shot import select_by_gradients
    from .training.spiel.callback import load_state as load_training_state
    from .training.spiel.callback import save_state as save_training_state
    from .training.trainer.trainer import SparseSFTTrainer as SparseSFTTrainer
    from .training.trainer.trainer import SparseTrainer, sparse_trainer
    from .tuners.for_language import for_language
    from .typology import Typology, load_typology

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "AdaSftConfig",
    "AdaSftModel",
    "AdapterAverage",
    "BottleneckConfig",
    "BottleneckModel",
    "BottleneckWeights",
    "ConfigError",
    "Criterion",
    "DeftXConfig",
    "DensePhase",
    "DistillationLoss",
    "DistillationTrainer",
    "Exported",
    "Extraction",
    "FeatureImportance",
    "FormatError",
    "GeneratedAdapter",
    "GivenConfig",
    "GradientMeans",
    "Imported",
    "LanguageSwitch",
    "LotteryTicketConfig",
    "MadGConfig",
    "MadGModel",
    "MemoryPlan",
    "MultiSourceCollator",
    "MultiSourceDataset",
    "OneShotConfig",
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
    "Teacher",
    "Typology",
    "bottleneck_weights",
    "conflicts",
    "distilled_trainer",
    "evaluation_batches",
    "export_adapter",
    "extract_adapter",
    "for_language",
    "generate_adapter",
    "generated_weights",
    "import_adapter",
    "import_mask",
    "importance_table",
    "inspect_adapter",
    "iter_bottlenecks",
    "iter_deltas",
    "iter_reselectors",
    "language_below_task",
    "layer_budget_from",
    "load_adapter_hub",
    "load_training_state",
    "load_typology",
    "make_student",
    "merge_checkpoint",
    "parameter_groups",
    "plan_memory",
    "plot_adapters",
    "plot_importance",
    "rate_scales",
    "reduce_adapter",
    "reduce_vocabulary",
    "resident",
    "save_adapter_hub",
    "save_training_state",
    "select",
    "select_by_gradients",
    "set_bottleneck_weights",
    "set_language",
    "sparse_from_ada",
    "sparse_trainer",
    "start_dense_phase",
    "start_sparse_phase",
    "start_weight_phase",
]

# Loaded when asked for: trainers import transformers' trainer, and SparseSFTTrainer imports TRL, which is optional.
_LAZY = {
    "AdapterAverage": "training.average.AdapterAverage",
    "DensePhase": "training.phases.dense_phase.DensePhase",
    "DistillationLoss": "distillation.losses.DistillationLoss",
    "DistillationTrainer": "distillation.trainer.DistillationTrainer",
    "Exported": "importing.export_adapter.Exported",
    "Extraction": "extraction.report.Extraction",
    "Imported": "importing.import_adapter.Imported",
    "LanguageSwitch": "training.languages.language_switch.LanguageSwitch",
    "MemoryPlan": "planning.plan.MemoryPlan",
    "MultiSourceCollator": "training.languages.multisource.MultiSourceCollator",
    "MultiSourceDataset": "training.languages.multisource.MultiSourceDataset",
    "SparseSFTTrainer": "training.trainer.trainer.SparseSFTTrainer",
    "SparseTrainer": "training.trainer.trainer.SparseTrainer",
    "Teacher": "distillation.teacher.Teacher",
    "Typology": "typology.table.Typology",
    "conflicts": "inspection.conflicts.conflicts",
    "distilled_trainer": "distillation.trainer.distilled_trainer",
    "evaluation_batches": "training.languages.multisource.evaluation_batches",
    "export_adapter": "importing.export_adapter.export_adapter",
    "extract_adapter": "extraction.extract.extract_adapter",
    "for_language": "tuners.for_language.for_language",
    "import_adapter": "importing.import_adapter.import_adapter",
    "import_mask": "importing.rosa.import_mask",
    "importance_table": "inspection.feature_importance.importance_table",
    "inspect_adapter": "inspection.report.inspect_adapter",
    "language_below_task": "training.languages.language_switch.language_below_task",
    "load_training_state": "training.spiel.callback.load_state",
    "load_typology": "typology.table.load_typology",
    "make_student": "distillation.student.make_student",
    "merge_checkpoint": "checkpoints.merge.merge_checkpoint",
    "parameter_groups": "training.decay.parameter_groups",
    "plan_memory": "planning.plan.plan_memory",
    "plot_adapters": "inspection.page.plot_adapters",
    "plot_importance": "inspection.feature_importance.plot_importance",
    "reduce_adapter": "distillation.adapters.reduce_adapter",
    "reduce_vocabulary": "distillation.vocabulary.reduce_vocabulary",
    "save_training_state": "training.spiel.callback.save_state",
    "select": "training.phases.lottery.select",
    "select_by_gradients": "training.phases.one_shot.select_by_gradients",
    "sparse_trainer": "training.trainer.trainer.sparse_trainer",
    "start_dense_phase": "training.phases.lottery.start_dense_phase",
    "start_sparse_phase": "training.phases.lottery.start_sparse_phase",
    "start_weight_phase": "training.phases.mask_phase.start_weight_phase",
}

register("SPARSE_FT", SparseConfig, SparseModel)
register("BOTTLENECK", BottleneckConfig, BottleneckModel)
register("MAD_G", MadGConfig, MadGModel)
register("ADA_SFT", AdaSftConfig, AdaSftModel)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].rpartition(".")
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
