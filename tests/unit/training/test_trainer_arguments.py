"""Arguments of trainers that a stranger would guess."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_sparse import ConfigError, RandConfig, SparseTrainer, sparse_trainer


class WithPeftConfig(Trainer):
    """As TRL's trainers."""

    def __init__(self, *args, peft_config=None, **kwargs):
        self.given = peft_config
        super().__init__(*args, **kwargs)


def test_a_config_is_refused_where_no_trainer_takes_it(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    config = RandConfig(density=0.1, target_modules="all-linear")
    message = (
        r"SparseTrainer takes a model that has its adapter: model=get_peft_model\(model, config\).*SparseSFTTrainer"
    )
    with pytest.raises(ConfigError, match=message):
        SparseTrainer(model=nn.Linear(2, 2), args=args, peft_config=config)
    trainer = sparse_trainer(WithPeftConfig)(model=nn.Linear(2, 2), args=args, peft_config=config)
    assert trainer.given is config
