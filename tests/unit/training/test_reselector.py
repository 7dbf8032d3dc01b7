"""SpIEL in every loop: it drives itself, keeps its invariants, resumes bit for bit, and leaves when told."""

from __future__ import annotations

import copy
import functools
import gc
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer

from peft_sparse import SM3, ConfigError, SpielAGConfig, iter_deltas, resident
from peft_sparse.optim.sparse_adamw import SparseAdamW
from peft_sparse.training.spiel import callback, gradient_tap, reselector
from peft_sparse.training.spiel.gradient_tap import GradientTap
from peft_sparse.training.spiel.reselector import iter_reselectors
from tests.support.reselection import METHODS, QUICK, batch, driver, make, optimizer_of, train
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, SparseAdamW, torch.optim.SGD])
def test_a_plain_loop_reselects_on_the_thesis_calendar(cls, optimizer):
    model = make(cls)
    start = deltas(model)
    train(model, optimizer_of(model, optimizer), range(20))
    history = driver(model).history
    assert [r.update for r in history] == [2, 6, 10, 14, 18]
    assert history[0].share_replaced > 0.7
    shares = [r.share_replaced for r in history[1:]]
    assert shares[0] > 0
    assert all(share <= 0.2 * (1 - r.update / 20) for share, r in zip(shares, history[1:], strict=True))
    for name, (indices, values) in deltas(model).items():
        assert indices.numel() == start[name][0].numel() == values.numel()
        assert (indices[1:] > indices[:-1]).all()
    assert sum(model.peft_config["default"].counts.values()) == sum(i.numel() for i, _ in start.values())


def test_only_the_first_micro_batch_of_a_window_forms_a_dense_gradient(monkeypatch):
    model = make()
    asked = []
    wanted = GradientTap.wanted

    def record(self):
        result = wanted(self)
        asked.append((driver(model).update + 1, result is None))
        return result

    monkeypatch.setattr(GradientTap, "wanted", record)
    train(model, optimizer_of(model), range(11), accumulate=3)
    tensors = len(list(iter_deltas(model)))
    dense = [update for update, is_dense in asked if is_dense]
    # Asked once more right after nominating, for the positions to gather.
    assert {update: dense.count(update) // tensors for update in set(dense)} == {1: 1, 5: 1, 9: 1}
    assert {update for update, _ in asked} == {1, 2, 5, 6, 9, 10}


def test_windows_have_exactly_gamma_updates_and_count_updates_not_micro_batches():
    model = make()
    seen = []
    close = reselector.Reselector._close_window

    def record(self):
        seen.extend({tap.estimate.updates for tap in self._taps.values()})
        close(self)

    reselector.Reselector._close_window = record
    try:
        train(model, optimizer_of(model), range(11), accumulate=3)
    finally:
        reselector.Reselector._close_window = close
    assert seen == [2, 2, 2]


def test_seeds_are_what_the_optimizer_sees_under_accumulation_and_clipping():
    """The mean gradient of a window, against the dense gradients of the same updates, clipped as the optimizer's."""
    model = make(reselection_steps=10, estimation_steps=3)
    watched = next(d for name, _, _, d in iter_deltas(model) if "query" in name)
    layer = next(layer for name, layer, _, d in iter_deltas(model) if d is watched)
    dense = torch.zeros(watched.shape)
    optimizer = optimizer_of(model)
    for step in range(2):
        layer_dense = torch.zeros(watched.shape)
        for micro in range(2):

            def watch(_, args, out, total=layer_dense):
                x = args[0].detach().reshape(-1, args[0].shape[-1])

                def add(gradient):
                    total.add_(gradient.reshape(-1, gradient.shape[-1]).t() @ x)

                out.register_hook(add)

            handle = layer.register_forward_hook(watch)
            (model(**batch(10 * step + micro)).loss / 2).backward()
            handle.remove()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        dense += layer_dense * min(1.0, 0.05 / (float(norm) + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    estimate = watched.observer.estimate
    assert estimate.updates == 2
    torch.testing.assert_close(estimate.mean, dense.view(-1)[estimate.indices.long()] / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_update_leaves_no_trace(set_to_none):
    plain, skipping = make(), make()
    for model in (plain, skipping):
        optimizer = optimizer_of(model)
        for step in range(7):
            if model is skipping and step in (1, 5):
                # What a loss scaler does on an overflow: gradients are there, the step is not taken.
                model(**batch(999)).loss.mul(3.0).backward()
                optimizer.zero_grad(set_to_none=set_to_none)
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    # Only the nominating micro-batch may differ, and here none was skipped.
    assert_same_tensors(deltas(plain), deltas(skipping))
    assert driver(skipping).update == 7


def test_an_overflow_in_the_nominating_micro_batch_is_not_nominated_from():
    model = make()
    optimizer = optimizer_of(model)
    (model(**batch(0)).loss * float("inf")).backward()
    optimizer.zero_grad()
    assert all(d.observer.estimate is None for _, _, _, d in iter_deltas(model))
    train(model, optimizer, range(3))
    assert [r.update for r in driver(model).history] == [2]


@functools.cache
def uninterrupted(cls, steps, **fields):
    """(losses, adapter, history) of a run that nothing reads but to compare with it."""
    model = make(cls, **fields)
    losses = train(model, optimizer_of(model), range(steps))
    return losses, deltas(model), driver(model).history


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_a_hand_written_loop_resumes_bit_for_bit(cls, stop):
    losses, whole, _ = uninterrupted(cls, 12)

    first = make(cls)
    optimizer = optimizer_of(first)
    head = train(first, optimizer, range(stop))
    saved = copy.deepcopy((get_peft_model_state_dict(first), optimizer.state_dict(), driver(first).state_dict()))

    second = make(cls, seed=5)
    set_peft_model_state_dict(second, saved[0])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(saved[1])
    driver(second).load_state_dict(saved[2])
    tail = train(second, optimizer, range(stop, 12))
    assert head + tail == losses
    assert_same_tensors(deltas(second), whole)


def sm3_of(model):
    return SM3([p for p in model.parameters() if p.requires_grad], 1e-2, deltas=[d for *_, d in iter_deltas(model)])


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("fields", [{}, {"target_biases": True, "target_modules": ["query"]}])
def test_sm3_tells_of_updates_that_the_reselection_does_not_know(cls, fields):
    """It counts none, but its accumulators hold more than the gradients of one update."""
    first = make(cls, **fields)
    optimizer = sm3_of(first)
    train(first, optimizer, range(3))
    saved = copy.deepcopy((get_peft_model_state_dict(first), optimizer.state_dict()))

    def restored():
        model = make(cls, **fields)
        set_peft_model_state_dict(model, saved[0])
        optimizer = sm3_of(model)
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        return model, optimizer

    with pytest.raises(ConfigError, match=r"the optimizer has made updates of adapter 'default' before.*skip_to\("):
        train(*restored(), range(3, 4))
    second, optimizer = restored()
    driver(second).skip_to(3)
    train(second, optimizer, range(3, 8))
    assert driver(second).update == 8


def plain_trainer(folder, cls, save_at):
    args = make_args(folder, max_steps=10, save_strategy="steps", save_steps=save_at, gradient_accumulation_steps=2)
    return Trainer(model=make(cls, total_steps=None), args=args, train_dataset=Labelled())


@pytest.fixture(scope="module", params=METHODS)
def trained_whole(request, tmp_path_factory):
    """(method, a trainer that went through, with a checkpoint of every update)."""
    trainer = plain_trainer(tmp_path_factory.mktemp("whole"), request.param, 1)
    trainer.train()
    return request.param, trainer


@pytest.mark.parametrize("save_at", [1, 5, 6])
def test_a_plain_trainer_resumes_bit_for_bit(trained_whole, save_at):
    cls, whole = trained_whole
    checkpoint = Path(whole.args.output_dir, f"checkpoint-{save_at}")
    # It looks for the state beside the checkpoints of its own folder.
    resumed = plain_trainer(whole.args.output_dir, cls, 100)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert driver(whole.model).total_steps == driver(resumed.model).total_steps == 10
    assert_same_tensors(deltas(whole.model), deltas(resumed.model))
    assert [r.update for r in driver(whole.model).history] == [2, 6]
    state = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    for key, entry in state[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[1][key][k])) for k, v in entry.items())
    assert (checkpoint / callback.STATE_FILE).is_file()


def test_what_only_training_needs_stays_out_of_the_adapter_file(tmp_path):
    from safetensors import safe_open

    model = make()
    train(model, optimizer_of(model), range(1))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        kinds = {key.rpartition(".")[2] for key in file.keys()}  # noqa: SIM118
    assert kinds == {"values", "_extra_state", "sparse_ft_digest"}


def test_resuming_without_the_state_file_says_so_and_replaces_no_second_time(tmp_path, caplog):
    args = make_args(tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
    Trainer(model=make(total_steps=None), args=args, train_dataset=Labelled()).train()
    (tmp_path / "checkpoint-4" / callback.STATE_FILE).unlink()
    trainer = Trainer(model=make(total_steps=None), args=args, train_dataset=Labelled())
    with caplog.at_level("WARNING", logger="peft_sparse"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "was not found in" in caplog.text
    assert all(r.share_replaced < 0.2 for r in driver(trainer.model).history)


def test_training_a_loaded_adapter_further_does_not_throw_its_weights_away(tmp_path):
    model = make()
    train(model, optimizer_of(model), range(20))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_bert(dropout=0.0), tmp_path, is_trainable=True)
    train(again, optimizer_of(again), range(4))
    (first,) = driver(again).history
    assert first.share_replaced <= 0.2


def test_a_second_run_of_a_trainer_goes_on_from_the_first(tmp_path):
    trainer = Trainer(model=make(total_steps=None), args=make_args(tmp_path, max_steps=8), train_dataset=Labelled())
    trainer.train()
    trainer.train()
    history = driver(trainer.model).history
    assert [r.update for r in history] == [2, 6, 2, 6]
    assert [r.share_replaced > 0.5 for r in history] == [True, False, False, False]
    # No weight gets younger with the second run, but for those that it grows.
    assert history[3].mean_age > history[2].mean_age > history[1].mean_age > 0


def in_place(delta, entries):
    """Something with one entry per weight, where the weights are."""
    return torch.zeros(delta.numel).scatter(0, delta.indices.long(), entries.float())


@pytest.mark.parametrize("is_restored", [False, True])
@pytest.mark.parametrize("cls", METHODS)
def test_an_earlier_state_of_the_adapter_does_not_get_the_moments_of_other_weights(cls, is_restored):
    model = make(cls)
    optimizer = optimizer_of(model, SparseAdamW)
    train(model, optimizer, range(3))
    earlier = copy.deepcopy((get_peft_model_state_dict(model), optimizer.state_dict()))
    train(model, optimizer, range(3, 7))
    _, _, _, delta = next(iter_deltas(model))
    support = delta.indices.clone()

    def moments_and_ages():
        state = optimizer.state[delta.values]
        return in_place(delta, state["exp_avg"]), in_place(delta, state["age"].expand(delta.count))

    moments, ages = moments_and_ages()
    set_peft_model_state_dict(model, earlier[0])
    if is_restored:
        optimizer.load_state_dict(earlier[1])
        moments, ages = moments_and_ages()
    model(**batch(700)).loss.backward()
    gradient, tuned = (in_place(delta, entries) for entries in (delta.values.grad, torch.ones(delta.count)))
    optimizer.step()

    assert 0 < torch.isin(delta.indices, support).sum() < delta.count, "the second reselection replaced some"
    now, older = moments_and_ages()
    torch.testing.assert_close(now, (0.9 * moments + 0.1 * gradient) * tuned)
    assert torch.equal(older, (ages + 1) * tuned)
    assert not any(grown.any() for grown in driver(model).grown_at().values())


def test_an_adapter_for_inference_is_not_driven(tmp_path):
    make().save_pretrained(tmp_path)
    assert list(iter_reselectors(PeftModel.from_pretrained(make_bert(), tmp_path))) == []


def test_unknown_length_warns_once_and_keeps_the_rate(caplog):
    model = make(total_steps=None)
    with caplog.at_level("WARNING", logger="peft_sparse"):
        train(model, optimizer_of(model), range(12))
    assert caplog.text.count("the length of the training is not known") == 1
    counts = [r.share_replaced for r in driver(model).history]
    assert len(counts) == 3


def test_the_last_update_is_not_followed_by_a_reselection():
    model = make(total_steps=6)
    train(model, optimizer_of(model), range(6))
    assert [r.update for r in driver(model).history] == [2]


def test_other_optimizers_and_evaluation_do_not_count():
    model = make()
    other = torch.nn.Linear(2, 2)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    stranger.step()
    with torch.no_grad():
        model(**batch(0))
    assert driver(model).update == 0


@pytest.mark.parametrize("leave", ["unload", "delete", "merge_and_unload"])
def test_leaving_removes_hooks_and_observers(leave):
    gc.collect()
    before = len(reselector.stepped)
    model = make()
    deltas = [d for _, _, _, d in iter_deltas(model)]
    assert len(reselector.stepped) == before + 1
    assert all(d.observer is not None for d in deltas)
    if leave == "delete":
        model.add_adapter("other", SpielAGConfig(**QUICK))
        model.delete_adapter("default")
        assert [r.adapter_name for r in iter_reselectors(model)] == ["other"]
        model.delete_adapter("other")
    else:
        getattr(model, leave)()
    assert len(reselector.stepped) == before
    assert all(d.observer is None for d in deltas)


def test_a_dropped_model_takes_its_reselector_along():
    gc.collect()
    before = len(reselector.stepped)
    model = make()
    del model
    gc.collect()
    assert len(reselector.stepped) == before


def test_global_budget_moves_weights_between_tensors():
    model = make(budget="global", total_steps=40)
    before = {name: d.count for name, _, _, d in iter_deltas(model)}
    train(model, optimizer_of(model), range(12))
    after = {name: d.count for name, _, _, d in iter_deltas(model)}
    assert sum(after.values()) == sum(before.values())
    assert after != before
    assert model.peft_config["default"].counts == after


@pytest.mark.parametrize("cls", METHODS)
def test_resident_mode_and_checkpointing_change_nothing(cls):
    results = []
    for mode in ("plain", "resident", "checkpointing"):
        model = make(cls)
        if mode == "checkpointing":
            model.gradient_checkpointing_enable()
        optimizer = optimizer_of(model)
        if mode == "resident":
            with resident(model):
                train(model, optimizer, range(9))
        else:
            train(model, optimizer, range(9))
        results.append(deltas(model))
    assert_same_tensors(results[0], results[1])
    assert_same_tensors(results[0], results[2])


@pytest.mark.parametrize("target", ["all", ["word_embeddings", "LayerNorm", "query"]])
@pytest.mark.parametrize("cls", METHODS)
def test_embeddings_norms_and_biases_can_be_targets(cls, target):
    model = make(cls, target_modules=target)
    train(model, optimizer_of(model), range(7))
    grown = driver(model).grown_at()
    assert (grown["bert.embeddings.word_embeddings.weight"] > 0).any()


def test_drop_by_change_since_reselection_differs():
    results = []
    for drop_by in ("delta", "change_since_reselection"):
        model = make(drop_by=drop_by)
        train(model, optimizer_of(model), range(16))
        results.append(deltas(model))
    assert any(not torch.equal(results[0][name][0], results[1][name][0]) for name in results[0])


def test_a_window_goes_on_until_the_cut_is_clear(monkeypatch):
    def selections(share):
        model = make(candidates_per_weight=2.0, reselection_steps=8, estimation_steps=2, uncertain_share=share)
        train(model, optimizer_of(model), range(16))
        return [r.update for r in driver(model).history]

    assert selections(None) == [2, 10]
    # Never clear enough: every window goes on until the next one has to begin.
    assert selections(1e-9) == [8, 16]
    # Clear as soon as three updates are in the estimate.
    monkeypatch.setattr(gradient_tap, "count_uncertain", lambda *_, samples, **__: 0 if samples == 3 else 10**6)
    assert selections(0.5) == [3, 11]


@pytest.mark.parametrize("stop", [3, 5, 7, 11])
def test_a_window_that_goes_on_resumes_bit_for_bit(stop):
    fields = {"candidates_per_weight": 2.0, "reselection_steps": 8, "estimation_steps": 2, "uncertain_share": 0.3}
    _, whole, history = uninterrupted(SpielAGConfig, 14, **fields)
    first = make(**fields)
    optimizer = optimizer_of(first)
    train(first, optimizer, range(stop))
    saved = copy.deepcopy((get_peft_model_state_dict(first), optimizer.state_dict(), driver(first).state_dict()))
    second = make(**fields)
    set_peft_model_state_dict(second, saved[0])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(saved[1])
    driver(second).load_state_dict(saved[2])
    train(second, optimizer, range(stop, 14))
    assert_same_tensors(deltas(second), whole)
    assert driver(second).history == [r for r in history if r.update > stop]
