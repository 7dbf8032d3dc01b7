"""A learning rate that is off by ten or more is said in the log, and no other."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_sparse import LotteryTicketConfig, RandConfig, SparseTrainer, SpielAGConfig, SpielMAConfig, start_dense_phase
from peft_sparse.training.rates import recommended, warn_of_rate
from tests.support.models import llama

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8


def warnings_of(caplog, folder, config, rate, *, trainer=SparseTrainer, dense_rate=None, **settings) -> list[str]:
    model = get_peft_model(llama(num_hidden_layers=1), config)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=1, learning_rate=rate, report_to="none", save_strategy="no", **settings
    )
    collate = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
    dense = {"dense_args": {"learning_rate": dense_rate}} if dense_rate else {}
    with caplog.at_level(logging.WARNING, logger="peft_sparse.training.rates"):
        trainer(model=model, args=args, train_dataset=ROWS, data_collator=collate, **dense).train()
    return [record.getMessage() for record in caplog.records if record.name == "peft_sparse.training.rates"]


@pytest.mark.parametrize("trainer", [Trainer, SparseTrainer])
def test_the_default_rate_of_trl_is_too_small_for_spiel(caplog, tmp_path, trainer):
    (said,) = warnings_of(caplog, tmp_path, SpielAGConfig(density=0.1), 2e-5, trainer=trainer)
    assert "the learning rate 2e-05 of adapter 'default' (SpielAGConfig) is 100 times smaller than" in said
    assert "0.002 (chosen for SmolLM2-135M" in said


@pytest.mark.parametrize(
    ("config", "rate", "times"),
    [
        (SpielAGConfig(density=0.1), 2.1e-4, None),
        (SpielAGConfig(density=0.1), 2e-4, "10 times smaller"),
        (SpielAGConfig(density=0.1), 1.9e-2, None),
        (SpielAGConfig(density=0.1), 2e-2, "10 times larger"),
        (SpielMAConfig(density=0.1), 8e-3, None),
        (SpielMAConfig(density=0.1), 8e-4, "10 times smaller"),
        (RandConfig(density=0.1), 1e-3, None),
        (RandConfig(density=0.1), 2e-5, "100 times smaller"),
    ],
)
def test_a_factor_of_ten_is_the_limit(caplog, tmp_path, config, rate, times):
    said = warnings_of(caplog, tmp_path, config, rate)
    assert [times in text for text in said] == ([True] if times else [])


def test_each_phase_of_lt_sft_is_judged_by_its_own_rate(caplog, tmp_path):
    (said,) = warnings_of(caplog, tmp_path, LotteryTicketConfig(density=0.1), 5e-4, dense_rate=1e-2)
    assert "0.01 of adapter 'default'" in said
    assert "50 times larger than" in said


def test_other_optimizers_are_not_judged(caplog, tmp_path):
    assert warnings_of(caplog, tmp_path, RandConfig(density=0.1), 1e-6, optim="sgd") == []


def test_large_models_want_the_rates_of_the_thesis():
    found = recommended(SpielAGConfig(density=0.01), 7_000_000_000)
    assert (found.low, found.high) == (1e-5, 1e-4)
    found = recommended(SpielMAConfig(density=0.01), 7_000_000_000, with_sm3=True)
    assert (found.low, found.high) == (4e-4, 1e-3)


@pytest.mark.parametrize("num_parameters", [10**8, 10**10])
def test_a_fitted_rate_is_on_the_scale_of_random_supports(num_parameters):
    fitted, plain = (SpielAGConfig(density=0.1, fitted_rate=fits) for fits in (True, False))
    random = recommended(RandConfig(density=0.1), num_parameters)
    assert recommended(fitted, num_parameters) == random != recommended(plain, num_parameters)


def test_an_adapter_that_waits_for_its_selection_is_not_judged_by_what_another_one_trains(caplog):
    """DPO's reference beside an adapter in its dense phase is such a one."""
    model = get_peft_model(llama(num_hidden_layers=1), LotteryTicketConfig(density=0.1))
    model.add_adapter("ref", LotteryTicketConfig(density=0.1))
    phase = start_dense_phase(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with caplog.at_level(logging.WARNING, logger="peft_sparse.training.rates"):
        warn_of_rate(model, optimizer)
        (said,) = [record.getMessage() for record in caplog.records]
        assert "of adapter 'default' (LotteryTicketConfig)" in said
        phase.abort()
        caplog.clear()
        warn_of_rate(model, optimizer)
    assert caplog.records == []
