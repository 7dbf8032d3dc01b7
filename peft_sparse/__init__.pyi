"""The names of the package and where they live: read by type checkers, and by the package itself when it is imported.

`__all__` is what users need: configs, trainers, optimizers and verbs. What follows it are result types, registries and
what is called otherwise now: they go on working from here, and live in their subpackages.
"""

from __future__ import annotations

from .checkpoints.merge import merge_checkpoint as merge_checkpoint
from .distillation.adapters import reduce_adapter as reduce_adapter
from .distillation.student import make_student as make_student
from .distillation.trainer import DistillationTrainer as DistillationTrainer
from .distillation.trainer import distilled_trainer as distilled_trainer
from .distillation.vocabulary import reduce_vocabulary as reduce_vocabulary
from .extraction.extract import extract_adapter as extract_adapter
from .importing.export_adapter import export_adapter as export_adapter
from .importing.import_adapter import import_adapter as import_adapter
from .inspection.conflicts import conflicts as conflicts
from .inspection.page import plot_adapters as plot_adapters
from .inspection.report import inspect_adapter as inspect_adapter
from .optim.sm3 import SM3 as SM3
from .optim.sparse_adamw import SparseAdamW as SparseAdamW
from .parsing.parser import BiaffineParser as BiaffineParser
from .planning.plan import plan_memory as plan_memory
from .training.languages.mixture import Source as Source
from .training.languages.mixture import few_shot as few_shot
from .training.languages.multisource import MultiSourceCollator as MultiSourceCollator
from .training.languages.multisource import MultiSourceDataset as MultiSourceDataset
from .training.languages.translate import translate_rows as translate_rows
from .training.phases.dense_phase import start_dense_phase as start_dense_phase
from .training.phases.lottery import start_sparse_phase as start_sparse_phase
from .training.phases.mask_phase import start_weight_phase as start_weight_phase
from .training.phases.one_shot import select_by_gradients as select_by_gradients
from .training.spiel.callback import load_state as load_training_state
from .training.spiel.callback import save_state as save_training_state
from .training.spiel.reselector import iter_reselectors as iter_reselectors
from .training.trainer.trainer import SparseSFTTrainer as SparseSFTTrainer
from .training.trainer.trainer import SparseTrainer as SparseTrainer
from .training.trainer.trainer import sparse_trainer as sparse_trainer
from .tuners.ada_sft.config import AdaSftConfig as AdaSftConfig
from .tuners.ada_sft.to_sparse import sparse_from_ada as sparse_from_ada
from .tuners.bottleneck.config import BottleneckConfig as BottleneckConfig
from .tuners.bottleneck.hub import load_adapter_hub as load_adapter_hub
from .tuners.bottleneck.hub import save_adapter_hub as save_adapter_hub
from .tuners.language_adapter import add_language_adapter as add_language_adapter
from .tuners.madg.config import MadGConfig as MadGConfig
from .tuners.madg.model import generate_adapter as generate_adapter
from .tuners.madg.model import set_language as set_language
from .tuners.sparse_ft.configs.base import SparseConfig as SparseConfig
from .tuners.sparse_ft.configs.one_shot import GivenConfig as GivenConfig
from .tuners.sparse_ft.configs.one_shot import OneShotConfig as OneShotConfig
from .tuners.sparse_ft.configs.one_shot import RandConfig as RandConfig
from .tuners.sparse_ft.configs.spiel import SpielAGConfig as SpielAGConfig
from .tuners.sparse_ft.configs.spiel import SpielMAConfig as SpielMAConfig
from .tuners.sparse_ft.configs.two_phase import DeftXConfig as DeftXConfig
from .tuners.sparse_ft.configs.two_phase import LotteryTicketConfig as LotteryTicketConfig
from .tuners.sparse_ft.iteration import iter_deltas as iter_deltas
from .tuners.sparse_ft.measured_budget import layer_budget_from as layer_budget_from
from .tuners.sparse_ft.resident import resident as resident
from .typology.table import load_typology as load_typology

__version__: str
__all__ = [
    "SM3",
    "AdaSftConfig",
    "BiaffineParser",
    "BottleneckConfig",
    "DeftXConfig",
    "DistillationTrainer",
    "GivenConfig",
    "LotteryTicketConfig",
    "MadGConfig",
    "MultiSourceCollator",
    "MultiSourceDataset",
    "OneShotConfig",
    "RandConfig",
    "Source",
    "SparseAdamW",
    "SparseConfig",
    "SparseSFTTrainer",
    "SparseTrainer",
    "SpielAGConfig",
    "SpielMAConfig",
    "add_language_adapter",
    "conflicts",
    "distilled_trainer",
    "export_adapter",
    "extract_adapter",
    "few_shot",
    "generate_adapter",
    "import_adapter",
    "inspect_adapter",
    "iter_deltas",
    "iter_reselectors",
    "layer_budget_from",
    "load_adapter_hub",
    "load_training_state",
    "load_typology",
    "make_student",
    "merge_checkpoint",
    "plan_memory",
    "plot_adapters",
    "reduce_adapter",
    "reduce_vocabulary",
    "resident",
    "save_adapter_hub",
    "save_training_state",
    "select_by_gradients",
    "set_language",
    "sparse_from_ada",
    "sparse_trainer",
    "start_dense_phase",
    "start_sparse_phase",
    "start_weight_phase",
    "translate_rows",
]

from .core.delta import SparseDelta as SparseDelta
from .distillation.losses import DistillationLoss as DistillationLoss
from .distillation.teacher import Teacher as Teacher
from .errors import ConfigError as ConfigError
from .errors import FormatError as FormatError
from .errors import SelectionError as SelectionError
from .errors import SparseError as SparseError
from .extraction.result import Extraction as Extraction
from .importing.export_adapter import Exported as Exported
from .importing.import_adapter import Imported as Imported
from .importing.rosa import import_mask as import_mask
from .inspection.feature_importance import importance_table as importance_table
from .inspection.feature_importance import plot_importance as plot_importance
from .parsing.features import ParserCollator as ParserCollator
from .parsing.features import encode_sentences as encode_sentences
from .parsing.scores import attachment_scores as attachment_scores
from .planning.plan import MemoryPlan as MemoryPlan
from .selection.criteria import Criterion as Criterion
from .selection.criteria import GradientMeans as GradientMeans
from .training.average import AdapterAverage as AdapterAverage
from .training.decay import parameter_groups as parameter_groups
from .training.fitted_rate import rate_scales as rate_scales
from .training.languages.language_switch import LanguageSwitch as LanguageSwitch
from .training.languages.language_switch import language_below_task as language_below_task
from .training.languages.mixture import batches_of_an_epoch as batches_of_an_epoch
from .training.languages.multisource import evaluation_batches as evaluation_batches
from .training.languages.translate import Translated as Translated
from .training.languages.translate import add_language_code as add_language_code
from .training.phases.dense_phase import DensePhase as DensePhase
from .training.phases.lottery import select as select
from .training.spiel.history import Reselection as Reselection
from .training.spiel.reselector import Reselector as Reselector
from .tuners.ada_sft.model import AdaSftModel as AdaSftModel
from .tuners.bottleneck.adapter import BottleneckWeights as BottleneckWeights
from .tuners.bottleneck.iteration import bottleneck_weights as bottleneck_weights
from .tuners.bottleneck.iteration import generated_weights as generated_weights
from .tuners.bottleneck.iteration import iter_bottlenecks as iter_bottlenecks
from .tuners.bottleneck.iteration import set_bottleneck_weights as set_bottleneck_weights
from .tuners.bottleneck.model import BottleneckModel as BottleneckModel
from .tuners.language_adapter import for_language as for_language
from .tuners.madg.generated import GeneratedAdapter as GeneratedAdapter
from .tuners.madg.importance import FeatureImportance as FeatureImportance
from .tuners.madg.model import MadGModel as MadGModel
from .tuners.sparse_ft.model import SparseModel as SparseModel
from .typology.table import Typology as Typology
