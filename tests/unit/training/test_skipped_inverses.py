"""Trainers that leave out the module before which invertible adapters are undone."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from transformers import Trainer

from peft_sparse import BottleneckConfig, ConfigError, SparseTrainer
from peft_sparse.training.skipped_inverses import refuse_skipped_inverses
from tests.support.models import IDS, llama
from tests.support.training import make_args
from tests.support.trl import trl_trainer

ROWS = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 2


def adapted(invertible: str | None):
    return get_peft_model(llama(), BottleneckConfig(bottleneck_size=4, invertible=invertible, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("invertible", ["nice", "glow"])
def test_trl_neither_trains_nor_evaluates_without_the_inverse(tmp_path, invertible):
    trainer = trl_trainer(tmp_path, adapted(invertible))
    with pytest.raises(ConfigError, match=r"inverse of the adapters \['default'\].*invertible=None"):
        trainer.train()
    with pytest.raises(ConfigError, match="invertible: this trainer"):
        trainer.evaluate(trainer.train_dataset)


def test_trl_trains_what_needs_no_inverse(tmp_path):
    trl_trainer(tmp_path / "none", adapted(None)).train()
    model = adapted("nice")
    model.add_adapter("task", BottleneckConfig(bottleneck_size=4, task_type="CAUSAL_LM"))
    model.set_adapter("task")
    trl_trainer(tmp_path / "task", model).train()


@pytest.mark.parametrize("trainer_class", [Trainer, SparseTrainer])
def test_other_trainers_compute_what_the_model_does(tmp_path, trainer_class):
    model = adapted("nice")
    args = make_args(tmp_path, max_steps=1)
    trainer = trainer_class(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    expected = model.eval()(input_ids=IDS, labels=IDS).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    args.use_liger_kernel = True
    with pytest.raises(ConfigError, match="use_liger_kernel=True does"):
        refuse_skipped_inverses(args, model)
