from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_sparse import AdaSftConfig, ConfigError, FormatError, SelectionError, start_weight_phase
from peft_sparse.training.trainer.resume import find_resume_point
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from tests.support.training import (
    KillAt,
    Killed,
    Labelled,
    assert_same_tensors,
    base_weights,
    head,
    make_adapted,
    make_args,
    make_bert,
    make_trainer,
)

SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "mask_args": {"max_steps": 9, "learning_rate": 1e-1},
}


def make_masked(**config):
    settings = {"target_modules": ["query", "dense"], "exclude_modules": r".*pooler.*", **config}
    return get_peft_model(make_bert(), AdaSftConfig(**{"modules_to_save": ["classifier"], **settings}))


def held(model, adapter_name="default"):
    """{parameter: (scores, difference)}, as far as the adapter holds them."""
    found = iter_masked(model, adapter_name)
    return {name: tuple(p.detach().clone() for p in masked.parameters()) for name, _, masked in found}


def own_weights(model):
    weights = base_weights(model)
    return {n: p for n, p in weights.items() if "ada_sft_" not in n and "modules_to_save" not in n}


# ---- loops of one's own ----------------------------------------------------------------------------------------------


def test_the_second_phase_trains_the_weights_from_the_pretrained_ones():
    model = make_masked()
    for _, _, masked in iter_masked(model):
        masked.scores.data.normal_()
        masked.scores.grad = torch.ones_like(masked.scores)
    before, heads = held(model), head(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".scores" in n or "modules_to_save" in n for n in trained)
    count = start_weight_phase(model)
    assert count == sum(scores.numel() for (scores,) in before.values()) > 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".difference" in n or "modules_to_save" in n for n in trained)
    assert sum(".difference" in n for n in trained) == len(before)
    for name, (scores, difference) in held(model).items():
        assert torch.equal(scores, before[name][0])
        assert not difference.any()
    assert all(masked.scores.grad is None for _, _, masked in iter_masked(model))
    assert_same_tensors(head(model), heads)
    assert model.peft_config["default"].phase == "weights"
    # Switching adapters is what PEFT unfreezes them by.
    model.set_adapter("default")
    model.set_requires_grad("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_mask_phase_that_diverged_is_refused(score):
    model = make_masked()
    name, _, masked = list(iter_masked(model))[1]
    masked.scores.data[0, 0] = score
    with pytest.raises(SelectionError, match=rf"the mask phase diverged: the scores of {name} hold NaN or infinite"):
        start_weight_phase(model)
    assert model.peft_config["default"].phase == "mask"
    assert all(masked.trained is masked.scores for _, _, masked in iter_masked(model))


def test_what_has_no_mask_phase_before_it_is_refused():
    with pytest.raises(ConfigError, match=r"one of \['default'\], got 'nobody'"):
        start_weight_phase(make_masked(), "nobody")
    with pytest.raises(ConfigError, match=r"must be an adapter of Ada-SFT, and this model has none, got 'default'"):
        start_weight_phase(get_peft_model(make_bert(), LoraConfig(target_modules=["query"])))
    model = make_masked(modules_to_save=None)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"adapters \['default'\] are merged into .*query\.weight"):
        start_weight_phase(model)
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match="must not be wrapped when its phase changes"):
        start_weight_phase(torch.nn.DataParallel(model))
    start_weight_phase(model)
    with pytest.raises(ConfigError, match="has its masks fixed already"):
        start_weight_phase(model)
    model.add_weighted_adapter(["default"], [2.0], "sum")
    with pytest.raises(ConfigError, match="is a sum of others, without masks"):
        start_weight_phase(model, "sum")


# ---- the trainer -----------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """What each phase began and stepped with."""

    def __init__(self):
        self.begins, self.rates = [], []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trainable = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad and "ada_sft" in n}
        self.begins.append((state.max_steps, trainable, args.weight_decay, held(model), head(model)))
        assert not getattr(optimizer, "optimizer", optimizer).state

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


def test_two_phases_each_with_its_own_length_rate_and_optimizer(tmp_path, caplog):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        model=make_masked(),
        max_steps=6,
        mask_args={"max_steps": 4, "learning_rate": 1e-1, "lr_scheduler_type": "constant"},
        callbacks=[recorder],
    )
    before = own_weights(trainer.model)
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        output = trainer.train()
    (steps, names, decay, _, _), (second_steps, second_names, _, boundary, head_then) = recorder.begins
    assert (steps, names, decay) == (4, {"scores"}, 0.0)
    assert (second_steps, second_names) == (6, {"difference"})
    assert recorder.rates[:4] == [1e-1] * 4
    assert recorder.rates[4:] == pytest.approx([1e-2 * left / 6 for left in (5, 4, 3, 2, 1, 0)])
    assert_same_tensors(own_weights(trainer.model), before)
    for name, (scores, difference) in held(trainer.model).items():
        assert torch.equal(scores, boundary[name][0])
        assert scores.any()
        assert not boundary[name][1].any()
        assert difference.any()
    assert any(not torch.equal(head_then[n], recorder.begins[0][4][n]) for n in head_then), "heads go on"
    assert (trainer.mask_state.global_step, trainer.mask_output.global_step, output.global_step) == (4, 4, 6)
    assert trainer.dense_state is None
    assert {entry["phase"] for entry in trainer.mask_state.log_history} == {"mask"}
    assert {entry["phase"] for entry in trainer.state.log_history} == {"weights"}
    assert "masks are fixed" in caplog.text


def test_it_is_two_plain_trainings_with_the_phase_changed_between(tmp_path):
    changes = {"max_steps": 4, "learning_rate": 1e-1, "weight_decay": 0.0}
    trainer = make_trainer(tmp_path, model=make_masked(), max_steps=5, mask_args=changes)
    trainer.train()
    model = make_masked()
    for number, settings in enumerate((changes, {"max_steps": 5})):
        if number:
            start_weight_phase(model)
        args = make_args(tmp_path / "plain", **settings)
        Trainer(model=model, args=args, train_dataset=Labelled()).train()
    assert_same_tensors(held(model), held(trainer.model))
    assert_same_tensors(head(model), head(trainer.model))


def test_an_adapter_past_its_masks_trains_in_one_phase(tmp_path):
    model = make_masked()
    start_weight_phase(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=2, mask_args={"max_steps": 3})
    trainer.train()
    assert trainer.mask_state is None
    assert all(difference.any() and not scores.any() for scores, difference in held(model).values())


def test_best_model_of_each_phase(tmp_path):
    """The best masks are the ones that get fixed; the best weights are what stays."""
    seen = {}

    class Spy(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen[trainer._phase_name, state.global_step] = held(model)

    evaluations = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        tmp_path,
        model=make_masked(),
        max_steps=5,
        load_best_model_at_end=True,
        mask_args={"max_steps": 4, "learning_rate": 1e-1},
        callbacks=[Spy()],
        **evaluations,
    )
    ranking = {"mask": [4, 1, 3, 2], "weights": [5, 4, 1, 3, 2]}
    evaluate = trainer.evaluate

    def ranked(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_loss"] = float(ranking[trainer._phase_name][trainer.state.global_step - 1])
        return metrics

    trainer.evaluate = ranked
    trainer.train()
    assert trainer.mask_state.best_model_checkpoint == str(tmp_path / "_mask" / "checkpoint-2")
    assert_same_tensors(held(trainer.model), seen["weights", 3])
    masks = {name: scores for name, (scores, _) in held(trainer.model).items()}
    assert_same_tensors(masks, {name: scores for name, (scores,) in seen["mask", 2].items()})
    assert not any(torch.equal(masks[name], scores) for name, (scores,) in seen["mask", 4].items())


def test_arguments_of_another_kind_of_first_phase_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, model=make_masked(), dense_args={"max_steps": 1})
    with pytest.raises(ConfigError, match=r"dense_args is for a dense phase.*begins with a mask phase: mask_args="):
        trainer.train()
    trainer = make_trainer(tmp_path, mask_args={"max_steps": 1})
    with pytest.raises(ConfigError, match=r"mask_args is for a mask phase.*dense phase: dense_args="):
        trainer.train()
    with pytest.raises(ConfigError, match=r"mask_args: 'learning_rat' is no field of TrainingArguments"):
        make_trainer(tmp_path, model=make_masked(), mask_args={"learning_rat": 1})


def test_one_adapter_at_a_time(tmp_path):
    model = make_masked(modules_to_save=None)
    model.add_adapter("other", AdaSftConfig(target_modules=["query"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"one adapter at a time.*\['default', 'other'\]"):
        make_trainer(tmp_path, model=model).train()
    # A frozen one acts and is left alone.
    model.set_requires_grad("other", requires_grad=False)
    other = held(model, "other")
    trainer = make_trainer(tmp_path, model=model, max_steps=1, mask_args={"max_steps": 1})
    trainer.train()
    assert model.peft_config["default"].phase == "weights"
    assert model.peft_config["other"].phase == "mask"
    assert_same_tensors(held(model, "other"), other)


# ---- going on --------------------------------------------------------------------------------------------------------


def run(folder, *, resume=None, kill=None, model=None, seed_before=0, **changes):
    trainer = make_trainer(
        folder, model=model or make_masked(), callbacks=[kill] if kill else None, **{**SETTINGS, **changes}
    )
    torch.manual_seed(seed_before)
    if kill is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        kill.trainer = trainer
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("phase", "step", "found"),
    [
        ("mask", 3, "_mask/checkpoint-2"),
        ("mask", None, "_mask/checkpoint-9"),
        ("weights", 0, "_mask/selection"),
        ("weights", 3, "checkpoint-2"),
        ("weights", None, "checkpoint-8"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole, phase, step, found):
    run(tmp_path, kill=KillAt(phase, step), seed_before=1)
    assert find_resume_point(str(tmp_path), True, "mask").path == os.path.join(tmp_path, found)
    resumed = run(tmp_path, resume=True, seed_before=2)
    assert_same_tensors(held(resumed.model), held(whole.model))
    assert_same_tensors(head(resumed.model), head(whole.model))
    logged = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (resumed, whole)]
    assert logged[0] == logged[1]
    # What was saved is what was trained.
    resumed.model.save_pretrained(tmp_path / "end")
    loaded = PeftModel.from_pretrained(make_bert(seed=0), tmp_path / "end")
    assert_same_tensors(held(loaded), held(whole.model))


def test_other_adapter_names_resume_in_either_phase(tmp_path):
    def make():
        model = make_masked(modules_to_save=None)
        model.add_adapter("task", AdaSftConfig(target_modules=["query"]))
        model.set_adapter("task")
        return model

    uninterrupted = run(tmp_path / "whole", model=make())
    for resume, kill in ((None, KillAt("mask", 5)), (True, KillAt("weights", 0)), (True, KillAt("weights", 3))):
        run(tmp_path / "killed", resume=resume, kill=kill, model=make())
    resumed = run(tmp_path / "killed", resume=True, model=make())
    assert_same_tensors(held(resumed.model, "task"), held(uninterrupted.model, "task"))
    assert not any(scores.any() for (scores,) in held(resumed.model).values())


def test_checkpoints_of_another_run_are_refused(tmp_path):
    run(tmp_path / "ada", kill=KillAt("mask", 3))
    folder = tmp_path / "ada" / "_mask" / "checkpoint-2"
    assert json.loads((folder / "mask_phase.json").read_text()) == {"adapter": "default"}
    (folder / "mask_phase.json").write_text('{"adapter": "language"}')
    with pytest.raises(FormatError, match=r"must name the adapter 'default', found 'language'"):
        run(tmp_path / "ada", resume=str(folder))
    with pytest.raises(FormatError, match=r"holds none of mask_phase.json \(mask phase\)"):
        run(tmp_path / "ada", resume=str(tmp_path))
    with pytest.raises(ValueError, match=r"nor in its folder _mask"):
        run(tmp_path / "nothing", resume=True)
    # A lottery ticket's checkpoints are of no use here.
    make_trainer(tmp_path / "lottery", model=make_adapted(), max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(FormatError, match=r"must hold scores, differences or both for every masked weight"):
        run(tmp_path / "ada", resume=str(tmp_path / "lottery" / "checkpoint-2"))
