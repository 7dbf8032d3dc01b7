"""Merged adapters in a trainer that is none of ours: the run would train their heads alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from peft_sparse import AdaSftConfig, ConfigError, RandConfig
from peft_sparse.training.merged import MergedCallback
from tests.support.training import Labelled, make_args, make_bert

CONFIGS = {
    "sparse": lambda: RandConfig(density=0.1, target_modules="all-linear", modules_to_save=["classifier"]),
    "ada": lambda: AdaSftConfig(target_modules="all-linear", modules_to_save=["classifier"], init_weights=False),
}

LOADED = """
import sys
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification
import peft_sparse
config = BertConfig.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(BertForSequenceClassification(config), sys.argv[1])
model.merge_adapter()
assert "transformers.trainer" not in sys.modules
"""


def train(model, folder):
    trainer = Trainer(model=model, args=make_args(folder, max_steps=1), train_dataset=Labelled())
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_plain_trainer_does_not_train_the_heads_of_merged_adapters_alone(tmp_path, kind):
    model = get_peft_model(make_bert(), CONFIGS[kind]())
    model.merge_adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    with pytest.raises(ConfigError, match=r"\['default'\] are merged .* model\.unmerge_adapter\(\) first"):
        train(model, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.unmerge_adapter()
    train(model, tmp_path)
    assert any(not torch.equal(model.state_dict()[n], t) for n, t in before.items() if "_ft" in n or "_sft" in n)


def test_adapters_that_were_loaded_to_be_used_tell_no_trainer(tmp_path, interpreter):
    get_peft_model(make_bert(), CONFIGS["sparse"]()).save_pretrained(tmp_path)
    make_bert().config.save_pretrained(tmp_path / "base")
    interpreter.run(LOADED, tmp_path)


def test_a_head_may_be_trained_where_no_merged_adapter_is_to_be(tmp_path):
    get_peft_model(make_bert(), CONFIGS["sparse"]()).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(make_bert(), tmp_path / "a")
    model.merge_adapter()
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.requires_grad_(True)
    before = head.weight.clone()
    trainer = Trainer(
        model=model, args=make_args(tmp_path, max_steps=1), train_dataset=Labelled(), callbacks=[MergedCallback()]
    )
    trainer.train()
    assert not torch.equal(head.weight, before)
