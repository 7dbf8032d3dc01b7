"""The public face: what is offered, that old names go on working, and that a name loads no more than it needs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import peft_sparse
from peft_sparse._names import read_stub

# What `import peft_sparse` has offered at some time: all of it goes on working.
EVER_PUBLIC = [
    "AdaSftConfig", "AdaSftModel", "AdapterAverage", "BottleneckConfig", "BottleneckModel", "BottleneckWeights",
    "ConfigError", "Criterion", "DeftXConfig", "DensePhase", "DistillationLoss", "DistillationTrainer",
    "Exported", "Extraction", "FeatureImportance", "FormatError", "GeneratedAdapter", "GivenConfig",
    "GradientMeans", "Imported", "LanguageSwitch", "LotteryTicketConfig", "MadGConfig", "MadGModel", "MemoryPlan",
    "MultiSourceCollator", "MultiSourceDataset", "OneShotConfig", "RandConfig", "Reselection", "Reselector",
    "SM3", "SelectionError", "SparseAdamW", "SparseConfig", "SparseDelta", "SparseError", "SparseModel",
    "SparseSFTTrainer", "SparseTrainer", "SpielAGConfig", "SpielMAConfig", "Teacher", "Typology",
    "bottleneck_weights", "conflicts", "distilled_trainer", "evaluation_batches", "export_adapter",
    "extract_adapter", "for_language", "generate_adapter", "generated_weights", "import_adapter", "import_mask",
    "importance_table", "inspect_adapter", "iter_bottlenecks", "iter_deltas", "iter_reselectors",
    "language_below_task", "layer_budget_from", "load_adapter_hub", "load_training_state", "load_typology",
    "make_student", "merge_checkpoint", "plan_memory", "plot_adapters", "plot_importance", "reduce_adapter",
    "reduce_vocabulary", "resident", "save_adapter_hub", "save_training_state", "select", "select_by_gradients",
    "set_bottleneck_weights", "set_language", "sparse_from_ada", "sparse_trainer", "start_dense_phase",
    "start_sparse_phase", "start_weight_phase",
]  # fmt: skip
HOMES, PUBLIC = read_stub(Path(peft_sparse.__file__).with_suffix(".pyi"))


# Public for the first time in the version that is being made.
NEW = {
    "BiaffineParser", "ParserCollator", "Source", "Translated", "add_language_adapter", "add_language_code",
    "attachment_scores", "batches_of_an_epoch", "encode_sentences", "few_shot", "parameter_groups", "rate_scales",
    "translate_rows",
}  # fmt: skip


@pytest.mark.parametrize("name", EVER_PUBLIC)
def test_an_old_name_is_what_its_home_holds(name):
    module, attribute = HOMES[name]
    found = getattr(peft_sparse, name)
    assert found is getattr(import_module(f"peft_sparse.{module}"), attribute)
    # Defined there, and not only imported: SparseSFTTrainer is made when it is asked for.
    assert found.__module__ == f"peft_sparse.{module}" or name == "SparseSFTTrainer"


def test_what_is_offered():
    assert peft_sparse.__all__ == PUBLIC
    assert len(set(PUBLIC)) == len(PUBLIC) <= 52
    assert set(PUBLIC) <= HOMES.keys()
    assert {"SparseSFTTrainer", "add_language_adapter", "SM3", "SparseConfig", "plan_memory"} <= set(PUBLIC)
    assert set(PUBLIC) <= set(dir(peft_sparse))
    # Result types and registries live in their subpackages; what was renamed has an alias.
    assert not {"MemoryPlan", "Reselector", "SparseModel", "GradientMeans", "select", "for_language"} & set(PUBLIC)
    assert peft_sparse.for_language is peft_sparse.add_language_adapter
    assert set(EVER_PUBLIC) | NEW == HOMES.keys()


def test_an_unknown_name_is_said_to_be_unknown():
    with pytest.raises(AttributeError, match="module 'peft_sparse' has no attribute 'SparseDPO'"):
        _ = peft_sparse.SparseDPO


def test_a_star_import_works_without_trl(interpreter):
    code = (
        "import sys; sys.modules['trl'] = None; from peft_sparse import *; print(SparseTrainer.__name__, SM3.__name__)"
    )
    assert interpreter.run(code).stdout.strip() == "SparseTrainer SM3"


def test_importing_the_package_and_its_configs_loads_no_trainer(interpreter):
    code = (
        "import sys, peft_sparse; c = peft_sparse.SparseConfig(method='spiel-ag', density=0.1); "
        "print(type(c).__name__, [m for m in ('transformers.trainer', 'trl', 'datasets') if m in sys.modules])"
    )
    assert interpreter.run(code).stdout.strip() == "SpielAGConfig []"
