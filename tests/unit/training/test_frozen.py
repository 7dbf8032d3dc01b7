"""A model of which nothing would train is refused before anything runs."""

from __future__ import annotations

import pytest
from peft import PeftModel, get_peft_model

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    ConfigError,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SpielAGConfig,
    select_by_gradients,
    start_dense_phase,
)
from tests.support.training import Labelled, assert_same_tensors, base_weights, make_bert, make_trainer

CONFIGS = {
    "rand": lambda: RandConfig(num_weights=60),
    "SpIEL": lambda: SpielAGConfig(num_weights=60),
    "LT-SFT": lambda: LotteryTicketConfig(num_weights=60),
    "one-shot": lambda: OneShotConfig(num_weights=60, criterion="fisher"),
    "Ada-SFT": AdaSftConfig,
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trainer_says_that_nothing_would_train_and_how_to_load_it(tmp_path, name):
    get_peft_model(make_bert(), CONFIGS[name]()).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(make_bert(), tmp_path / "a")
    before = base_weights(model)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    with pytest.raises(ConfigError, match=r"nothing would train: of the adapters \['default'\].*is_trainable=True"):
        trainer.train()
    assert steps == []
    assert_same_tensors(base_weights(model), before)
    model = PeftModel.from_pretrained(make_bert(), tmp_path / "a", is_trainable=True)
    first = {"LT-SFT": {"dense_args": {"max_steps": 2}}, "Ada-SFT": {"mask_args": {"max_steps": 2}}}.get(name, {})
    trainer = make_trainer(tmp_path, model=model, max_steps=1, **first)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_without_adapters(tmp_path):
    trainer = make_trainer(tmp_path, model=make_bert().requires_grad_(False), max_steps=1)
    with pytest.raises(
        ConfigError, match=r"nothing of this BertForSequenceClassification would train: .*get_peft_model"
    ):
        trainer.train()


def test_no_weights_are_selected_of_a_frozen_adapter():
    batch = {key: value[None] for key, value in Labelled(1)[0].items()}
    for config, verb in (
        (LotteryTicketConfig(num_weights=60), start_dense_phase),
        (OneShotConfig(num_weights=60, criterion="fisher"), lambda model: select_by_gradients(model, [batch])),
    ):
        model = get_peft_model(make_bert(), config)
        model.set_requires_grad("default", requires_grad=False)
        with pytest.raises(
            ConfigError, match=r"adapter 'default' is frozen, so .* would not train\. Load it with is_tr"
        ):
            verb(model)
        assert model.peft_config["default"].counts is None
        model.set_adapter("default")
        verb(model)
