"""`auto_find_batch_size=True`: a first phase, too, tries smaller batches where memory runs out."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_sparse import (
    AdaSftConfig,
    LotteryTicketConfig,
    OneShotConfig,
    SpielAGConfig,
    iter_deltas,
    select_by_gradients,
)
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from tests.support.training import assert_same_tensors, base_weights, deltas, make_bert, make_trainer

FISHER = {"num_weights": 200, "criterion": "fisher", "selection_batches": 3}
CONFIGS = {
    "LT-SFT": lambda: LotteryTicketConfig(num_weights=200),
    "one-shot": lambda: OneShotConfig(**FISHER),
    "Ada-SFT": AdaSftConfig,
    "SpIEL": lambda: SpielAGConfig(num_weights=200, reselection_steps=2, estimation_steps=1),
}


def fill_memory(model, *, at_most, seen):
    """Let a forward with more examples than `at_most` run out of memory; `seen` takes the sizes of the others."""

    def check(module, args, kwargs):
        size = len(kwargs["input_ids"])
        if module.training and size > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append(size)

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def trainer_of(folder, config, *, at_most, seen, **changes):
    model = fill_memory(get_peft_model(make_bert(dropout=0.0), config), at_most=at_most, seen=seen)
    settings = {"max_steps": 4, "auto_find_batch_size": True, **changes}
    return make_trainer(folder, model=model, **settings)


def test_a_selection_by_gradients_takes_the_batches_that_fit(tmp_path):
    seen = []
    trainer = trainer_of(tmp_path, CONFIGS["one-shot"](), at_most=2, seen=seen)
    before = base_weights(trainer.model)
    trainer.train()
    # Three batches of two in each of four passes, and four steps.
    assert seen == [2] * (3 * 4 + 4)
    assert trainer.state.global_step == 4
    twin = make_trainer(
        tmp_path / "twin",
        model=get_peft_model(make_bert(dropout=0.0), CONFIGS["one-shot"]()),
        per_device_train_batch_size=2,
    )
    torch.manual_seed(7)
    expected = select_by_gradients(twin.model, list(twin.get_train_dataloader())[:3])
    assert_same_tensors({name: indices for name, (indices, _) in deltas(trainer.model).items()}, expected)
    assert all((values != 0).all() for _, values in deltas(trainer.model).values())
    assert_same_tensors(base_weights(trainer.model), before)


def test_a_run_that_needs_less_than_its_selection_gets_its_own_batches(tmp_path):
    seen = []
    trainer = trainer_of(tmp_path, CONFIGS["one-shot"](), at_most=2, seen=seen)
    phase_of = trainer._select_with_fitting_batches

    def select(phase):
        phase_of(phase)
        trainer.model._forward_pre_hooks.clear()
        fill_memory(trainer.model, at_most=3, seen=seen)

    trainer._select_with_fitting_batches = select
    trainer.train()
    assert seen == [2] * 12 + [3] * 4


@pytest.mark.parametrize("name", ["LT-SFT", "Ada-SFT", "SpIEL"])
def test_every_phase_finds_the_batches_that_fit(tmp_path, name):
    seen = []
    first = {"LT-SFT": {"dense_args": {"max_steps": 3}}, "Ada-SFT": {"mask_args": {"max_steps": 3}}}.get(name, {})
    trainer = trainer_of(tmp_path, CONFIGS[name](), at_most=2, seen=seen, **first)
    before = base_weights(trainer.model)
    trainer.train()
    assert seen == [2] * (4 + 3 * bool(first))
    assert trainer.state.global_step == 4
    if name == "Ada-SFT":
        assert trainer.mask_state.global_step == 3
        assert all(masked.difference.any() for _, _, masked in iter_masked(trainer.model))
    else:
        assert sum(len(values) for _, values in deltas(trainer.model).values()) == 200
        assert all((values != 0).all() for _, values in deltas(trainer.model).values())
    frozen = {key for key in before if "classifier" not in key and "ada_sft" not in key}
    after = base_weights(trainer.model)
    assert_same_tensors({key: after[key] for key in frozen}, {key: before[key] for key in frozen})


def test_without_it_the_error_goes_through_and_nothing_is_selected(tmp_path):
    seen = []
    trainer = trainer_of(tmp_path, CONFIGS["one-shot"](), at_most=2, seen=seen, auto_find_batch_size=False)
    before = base_weights(trainer.model)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.model.peft_config["default"].counts is None
    assert all(len(values) == 0 for _, values in deltas(trainer.model).values())
    assert_same_tensors(base_weights(trainer.model), before)
    trainer = trainer_of(tmp_path, CONFIGS["one-shot"](), at_most=0, seen=seen)
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        trainer.train()
    assert trainer.model.peft_config["default"].counts is None


def test_a_window_that_was_open_stays_open_when_a_selection_fails():
    config = SpielAGConfig(num_weights=60, reselection_steps=2, estimation_steps=2, initial_support="fisher")
    model = get_peft_model(make_bert(dropout=0.0), config)
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}

    def broken(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    watched = [delta.observer for *_, delta in iter_deltas(model)]
    with pytest.raises(torch.OutOfMemoryError):
        select_by_gradients(model, [batch], loss_fn=broken)
    assert [delta.observer for *_, delta in iter_deltas(model)] == watched
    assert any(observer is not None for observer in watched)
