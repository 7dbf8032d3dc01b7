from __future__ import annotations

import logging
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_sparse import RandConfig, SelectionError, iter_deltas
from peft_sparse.training.trainer.trainer import SparseTrainer
from tests.support.training import (
    Labelled,
    assert_same_tensors,
    base_weights,
    deltas,
    head,
    make_adapted,
    make_args,
    make_bert,
    make_trainer,
)


class Recorder(TrainerCallback):
    """What each phase began and stepped with."""

    def __init__(self):
        self.begins = []
        self.rates = []
        self.heads = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        self.begins.append({"steps": state.max_steps, "trainable": trainable, "optimizer": optimizer, "args": args})
        self.heads.append(head(model))
        assert not getattr(optimizer, "optimizer", optimizer).state

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


def test_two_phases_each_with_its_own_length_rate_optimizer_and_start(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        learning_rate=1e-2,
        dense_args={"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        callbacks=[recorder],
    )
    before = base_weights(trainer.model)
    output = trainer.train()
    dense, sparse = recorder.begins
    assert (dense["steps"], sparse["steps"]) == (4, 6)
    assert recorder.rates[:4] == [1e-3] * 4
    assert recorder.rates[4:] == pytest.approx([1e-2 * left / 6 for left in (5, 4, 3, 2, 1, 0)])
    assert dense["optimizer"] is not sparse["optimizer"]
    assert dense["args"].weight_decay == 0.0
    assert {n for n in dense["trainable"] if "base_layer" in n}
    assert all("sparse_ft_weight" in n or "modules_to_save" in n for n in sparse["trainable"])
    assert_same_tensors(recorder.heads[0], recorder.heads[1])
    after = base_weights(trainer.model)
    assert_same_tensors(
        {n: after[n] for n in after if "modules_to_save" not in n},
        {n: before[n] for n in before if "modules_to_save" not in n},
    )
    assert sum(values.numel() for _, values in deltas(trainer.model).values()) == 200
    assert sum(trainer.model.peft_config["default"].counts.values()) == 200
    assert all((values != 0).all() for _, values in deltas(trainer.model).values())
    assert output.global_step == 6
    assert (trainer.dense_state.global_step, trainer.dense_output.global_step) == (4, 4)
    assert trainer.args is sparse["args"]


def test_the_support_is_what_a_dense_run_would_move_most(tmp_path):
    model = make_adapted(target_modules="all")
    before = base_weights(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=2, dense_args={"max_steps": 5, "learning_rate": 3e-3})
    trainer.train()

    # The same phase by hand: an ordinary trainer on the ordinary model, only the targets and the head trainable.
    plain = make_bert()
    targets = {name for name, _, _, _ in iter_deltas(model)}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in targets or name.startswith("classifier"))
    args = make_args(tmp_path / "plain", max_steps=5, learning_rate=3e-3, weight_decay=0.0)
    Trainer(model=plain, args=args, train_dataset=Labelled()).train()
    moved = {}
    for name in targets:
        module, _, which = name.rpartition(".")
        original = before[f"base_model.model.{module}.base_layer.{which}"]
        moved[name] = (plain.get_parameter(name).detach() - original).abs().flatten()
    threshold = torch.cat(list(moved.values())).topk(200).values.min()
    for name, (indices, _) in deltas(model).items():
        assert set(indices.tolist()) == set((moved[name] >= threshold).nonzero().squeeze(1).tolist()), name


def test_logs_and_progress_bar_name_the_phase(tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        trainer = make_trainer(
            tmp_path, max_steps=2, dense_args={"max_steps": 3}, disable_tqdm=False, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
    dense = [entry["phase"] for entry in trainer.dense_state.log_history]
    sparse = [entry["phase"] for entry in trainer.state.log_history]
    assert set(dense) == {"dense"}
    assert set(sparse) == {"sparse"}
    assert sum("loss" in entry for entry in trainer.dense_state.log_history) == 3
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    bars = capsys.readouterr().err
    assert "dense phase:" in bars
    assert "sparse phase:" in bars
    assert "dense phase begins" in caplog.text
    assert "selected 200 of" in caplog.text
    # Outside of training, nothing is named; metrics stay numbers everywhere.
    metrics = trainer.evaluate()
    assert "phase" not in metrics
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert "phase" not in trainer.state.log_history[-1]


def test_evaluate_predict_and_metrics_work(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, dense_args={"max_steps": 2}, eval_strategy="epoch")
    trainer.compute_metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    trainer.train()
    result = trainer.predict(Labelled(8, seed=2))
    assert result.predictions.shape == (8, 3)
    assert result.metrics["test_accuracy"] == trainer.evaluate()["eval_accuracy"]
    assert any("eval_accuracy" in entry for entry in trainer.dense_state.log_history)


def test_checkpoints_of_the_phases_lie_apart(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=6, dense_args={"max_steps": 4}, save_strategy="steps", save_steps=2, save_total_limit=1
    )
    trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["_dense", "checkpoint-6"]
    assert sorted(os.listdir(tmp_path / "_dense")) == ["checkpoint-4", "selection"]
    dense, sparse = os.listdir(tmp_path / "_dense" / "checkpoint-4"), os.listdir(tmp_path / "checkpoint-6")
    assert {"dense_phase.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
        dense
    )
    assert "dense_phase.safetensors" not in sparse
    assert "adapter_model.safetensors" in sparse
    assert not [name for name in dense if name.endswith(".tmp")]
    reloaded = PeftModel.from_pretrained(make_bert(), tmp_path / "checkpoint-6")
    assert_same_tensors(deltas(reloaded), deltas(trainer.model))
    assert_same_tensors(head(reloaded), head(trainer.model))


def test_nothing_is_written_when_nothing_is_to_be_saved(tmp_path):
    make_trainer(tmp_path, max_steps=1, dense_args={"max_steps": 2}).train()
    assert os.listdir(tmp_path) == []


def test_best_model_of_each_phase(tmp_path):
    """The best dense weights are what the selection looks at; the best sparse values are what stays."""
    seen = {}

    class Spy(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            name = "dense" if state is not trainer.state or trainer._phase is not None else "sparse"
            state_now = (
                {t.name: t.parameter.detach().clone() for t in trainer._phase.targets}
                if name == "dense"
                else deltas(model)
            )
            seen[name, state.global_step] = state_now, head(model)

    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        learning_rate=5e-2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        dense_args={"max_steps": 5, "learning_rate": 5e-2},
        callbacks=[Spy()],
    )
    # Losses that are best in the middle, so that neither the first nor the last state is it.
    worst_to_best = {"dense": [5, 4, 1, 3, 2], "sparse": [6, 1, 5, 4, 3, 2]}
    evaluate = trainer.evaluate

    def ranked(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        name = "dense" if trainer._phase is not None else "sparse"
        metrics["eval_loss"] = float(worst_to_best[name][trainer.state.global_step - 1])
        return metrics

    trainer.evaluate = ranked
    originals = {}
    select = type(trainer)._save_selection

    def keep(self, *arguments):
        originals.update(deltas(self.model))
        select(self, *arguments)

    type(trainer)._save_selection = keep
    try:
        trainer.train()
    finally:
        type(trainer)._save_selection = select
    assert trainer.dense_state.best_model_checkpoint == str(tmp_path / "_dense" / "checkpoint-3")
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best, best_head = seen["sparse", 2]
    assert_same_tensors(deltas(trainer.model), best)
    assert_same_tensors(head(trainer.model), best_head)
    assert not torch.equal(
        head(trainer.model)["base_model.model.classifier.modules_to_save.default.weight"],
        seen["sparse", 6][1]["base_model.model.classifier.modules_to_save.default.weight"],
    )
    # The support belongs to step 3 of the dense phase and to no other.
    start = base_weights(trainer.model)
    for step in range(1, 6):
        weights, _ = seen["dense", step]
        scores = {}
        for name in weights:
            module, _, which = name.rpartition(".")
            scores[name] = (weights[name] - start[f"base_model.model.{module}.base_layer.{which}"]).abs().flatten()
        threshold = torch.cat(list(scores.values())).topk(200).values.min()
        fits = all(
            set(indices.tolist()) == set((scores[name] >= threshold).nonzero().squeeze(1).tolist())
            for name, (indices, _) in deltas(trainer.model).items()
        )
        assert fits == (step == 3)
    # And it trains on.
    assert all(d.values.requires_grad for _, _, _, d in iter_deltas(trainer.model))


def test_accumulation_clipping_and_autocast(tmp_path):
    """One step over two micro-batches of 2 is one step over a batch of 4, in both phases."""
    models = []
    for folder, batch, accumulation in (("a", 4, 1), ("b", 2, 2)):
        model = make_adapted(dropout=0.0)
        trainer = make_trainer(
            tmp_path / folder,
            model=model,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.01,
            optim="sgd",
            learning_rate=10.0,
        )
        trainer.train()
        models.append(deltas(model))
    assert [i.tolist() for i, _ in models[0].values()] == [i.tolist() for i, _ in models[1].values()]
    torch.testing.assert_close(
        [v for _, v in models[0].values()], [v for _, v in models[1].values()], rtol=1e-3, atol=1e-6
    )

    model = make_adapted(dropout=0.0)
    before = base_weights(model)
    trainer = make_trainer(tmp_path / "c", model=model, max_steps=3, bf16=True)
    dtypes = set()
    model.base_model.model.classifier.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert all(v.dtype == torch.float32 for _, v in deltas(model).values())
    assert sum(v.numel() for _, v in deltas(model).values()) == 200
    after = base_weights(model)
    assert all(torch.equal(after[n], before[n]) for n in after if "modules_to_save" not in n)


def test_weight_decay_of_the_sparse_phase_stays_out_of_the_dense_phase(tmp_path):
    supports = []
    for decay in (0.0, 0.5):
        trainer = make_trainer(tmp_path, weight_decay=decay, max_steps=3)
        trainer.train()
        supports.append(deltas(trainer.model))
        base = base_weights(trainer.model)
    assert [i.tolist() for i, _ in supports[0].values()] == [i.tolist() for i, _ in supports[1].values()]
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(supports[0].values(), supports[1].values(), strict=True))
    fresh = base_weights(make_adapted())
    assert all(torch.equal(base[n], fresh[n]) for n in fresh if "modules_to_save" not in n)


def test_an_interrupted_dense_phase_leaves_the_model_as_it_was(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, callbacks=[Stop()], dense_args={"learning_rate": 0.5})
    before, args = base_weights(trainer.model), trainer.args
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_tensors(base_weights(trainer.model), before)
    assert trainer.args is args
    assert trainer.optimizer is None
    # The same trainer may start again.
    trainer.remove_callback(Stop)
    trainer.train()
    assert sum(trainer.model.peft_config["default"].counts.values()) == 200


def test_too_few_moved_weights(tmp_path):
    trainer = make_trainer(tmp_path, dense_args={"learning_rate": 0.0, "max_steps": 1})
    with pytest.raises(SelectionError, match=r"200 weights are asked .* only 0 of \d+ moved"):
        trainer.train()


def test_other_models_train_as_ever(tmp_path):
    """Rand-SFT, a selected ticket, LoRA and a plain model go through one ordinary phase, with ordinary results."""

    def by(trainer_class, model):
        args = make_args(tmp_path, max_steps=3)
        trainer = trainer_class(model=model, args=args, train_dataset=Labelled())
        trainer.train()
        assert all("phase" not in entry for entry in trainer.state.log_history)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], base_weights(trainer.model)

    def selected():
        model = make_adapted()
        make_trainer(tmp_path, model=model, max_steps=1).train()
        return model

    def adapted(config):
        return get_peft_model(make_bert(), config)

    for make in (
        lambda: adapted(RandConfig(density=0.1, modules_to_save=["classifier"])),
        lambda: adapted(LoraConfig(target_modules=["query"])),
        selected,
        make_bert,
    ):
        (losses, weights), (expected, expected_weights) = by(SparseTrainer, make()), by(Trainer, make())
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)


def test_model_init_makes_one_model_for_both_phases(tmp_path):
    made = []

    def model_init():
        made.append(make_adapted())
        return made[-1]

    trainer = SparseTrainer(model_init=model_init, args=make_args(tmp_path, max_steps=2), train_dataset=Labelled())
    trainer.train()
    assert len(made) == 2  # one for the trainer's own making, one for train()
    assert trainer.model is made[1]
    assert sum(made[1].peft_config["default"].counts.values()) == 200
    trainer.train()
    assert len(made) == 3
    assert_same_tensors(deltas(made[2]), deltas(made[1]))


def test_two_adapters_the_task_over_a_frozen_language(tmp_path):
    model = make_adapted(num_weights=50)
    model.add_adapter("language", RandConfig(density=0.1, seed=3, init_weights=False))
    model.base_model.set_adapter(["language", "default"])
    model.set_requires_grad("language", requires_grad=False)
    language = deltas(model, "language")
    trainer = make_trainer(
        tmp_path,
        model=model,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=5e-2,
    )
    trainer.train()
    assert_same_tensors(deltas(model, "language"), language)
    assert sum(v.numel() for _, v in deltas(model).values()) == 50
    assert model.active_adapters == ["language", "default"]
    assert not any(d.values.requires_grad for _, _, _, d in iter_deltas(model, "language"))
