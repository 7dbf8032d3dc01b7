"""DeepSpeed ZeRO: sparse fine-tuning on a fixed support trains, what would have to move weights is refused."""

from __future__ import annotations

import pytest

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.refusals import make_bert
from tests.support.distributed.training import train_ddp
from tests.support.processes import run

pytest.importorskip("deepspeed")

from peft import PeftModel

from peft_sparse import SparseTrainer
from tests.support.distributed import deepspeed as cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize("stage", [2, 3])
def test_rand_sft_equals_one_process_on_the_joined_batch(tmp_path, stage):
    two = run(cases.train, tmp_path, stage=stage)
    assert_replicas(two)
    one = train_ddp("rand", "adamw", double=False, modules_to_save=None)
    assert_joined(two[0], {name: one[name] for name in two[0]})


@pytest.mark.parametrize(("stage", "method"), [(1, "ag"), (2, "ma"), (3, "ag")])
def test_spiel_is_refused(tmp_path, stage, method):
    for name, text in run(cases.refuse, tmp_path, stage=stage, method=method):
        assert name == "ConfigError"
        assert "DeepSpeed ZeRO" in text
        assert "FSDP2" in text


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_saves_the_adapter(tmp_path, stage):
    two = run(cases.train_by_trainer, tmp_path, folder=str(tmp_path / "out"), stage=stage)
    assert_replicas(two)
    loaded = PeftModel.from_pretrained(make_bert(dropout=0.0), tmp_path / "out")
    assert_joined(cases.result(loaded), two[0])
    # Ours writes the delta into the weights that DeepSpeed gathers for a pass.
    options = {"folder": str(tmp_path / "resident"), "stage": stage, "trainer_class": SparseTrainer}
    assert_replicas([two[0], *run(cases.train_by_trainer, tmp_path / "again", **options)])
