"""Supports of which a part is drawn at random and the rest chosen by gradients and takes smaller steps."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import (
    ConfigError,
    OneShotConfig,
    SparseTrainer,
    iter_deltas,
    select_by_gradients,
)
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert

ROWS = Labelled(16)
BATCHES = [
    {key: torch.stack([ROWS[i][key] for i in range(start, start + 4)]) for key in ROWS[0]} for start in (0, 4, 8, 12)
]
HALVES = {"density": 0.1, "criterion": "gradient", "selection_batches": 4, "random_share": 0.5}
HALVES["target_modules"] = ["query", "key", "value", "dense"]


def make(*, name="default", **fields):
    return get_peft_model(make_bert(dropout=0.0), OneShotConfig(**{**HALVES, **fields}), adapter_name=name)


def select(model, name="default"):
    return {key: found.long() for key, found in select_by_gradients(model, BATCHES, adapter_name=name).items()}


def mean_gradients(names):
    """{parameter: [numel] float64 |mean gradient|} of the base model, by torch alone."""
    base = make_bert(dropout=0.0).double()
    for batch in BATCHES:
        (base(**batch).loss / len(BATCHES)).backward()
    return {name: base.get_parameter(name).grad.abs().flatten() for name in names}


def step(model, batch, optimizer):
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


# ---- which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["uniform", "global", {"query|key": 0.25, "value|dense": 0.75}])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_rest_is_the_best_of_those_that_were_not_drawn(budget, share):
    model = make(budget=budget, random_share=share)
    drawn = _drawn(model)
    found = select(model)
    scores = mean_gradients(found)
    groups = [[n] for n in found] if budget == "uniform" else [list(found)]
    if isinstance(budget, dict):
        groups = [[n for n in found if any(word in n for word in key.split("|"))] for key in budget]
    for members in groups:
        count = sum(found[n].numel() for n in members)
        assert sum(drawn[n].numel() for n in members) == int(share * count)
        for name in members:
            assert torch.isin(drawn[name], found[name]).all()
            scores[name][drawn[name]] = -1
        joint = torch.cat([scores[n] for n in members])
        best = joint.topk(count - sum(drawn[n].numel() for n in members)).indices
        chosen, start = torch.zeros(joint.numel(), dtype=torch.bool), 0
        chosen[best] = True
        for name in members:
            own = chosen[start : start + scores[name].numel()].nonzero().squeeze(1)
            start += scores[name].numel()
            assert torch.equal(torch.cat([own, drawn[name]]).sort().values, found[name])
    total = sum(scores[name].numel() for name in found)
    assert sum(positions.numel() for positions in found.values()) == round(0.1 * total)
    assert model.peft_config["default"].counts == {name: positions.numel() for name, positions in found.items()}


def _drawn(model, name="default"):
    """{parameter: positions} that are drawn, by what is the same whatever the gradients."""
    config = model.peft_config[name]
    rest = OneShotConfig(**{**HALVES, **{f: getattr(config, f) for f in ("random_share", "seed", "budget")}})
    rest.criterion = lambda weight, gradients: 1 / (gradients.mean.abs() + 1e-9)
    other = get_peft_model(make_bert(dropout=0.0), rest, adapter_name=name)
    best, least = select(other, name), select(make_like(config, name), name)
    return {key: found[torch.isin(found, least[key])] for key, found in best.items()}


def make_like(config, name):
    fields = {f: getattr(config, f) for f in ("random_share", "seed", "budget")}
    return make(name=name, **fields)


def test_the_drawn_part_depends_on_seed_and_name():
    first = _drawn(make())
    for other, name in ((make(seed=1), "default"), (make(name="other"), "other")):
        drawn = _drawn(other, name)
        same = sum(int(torch.isin(drawn[key], found).sum()) for key, found in first.items())
        assert same < 0.3 * sum(found.numel() for found in first.values())


def test_the_result_does_not_depend_on_the_passes():
    assert_same_tensors(select(make(selection_passes=1)), select(make(selection_passes=5)))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"random_share": 1}, r"random_share must be a share of the weights in \[0, 1\), got 1"),
        ({"random_share": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"random_share": "half"}, "got 'half'"),
        ({"random_share": float("nan")}, "got nan"),
        ({"criterion": "largest_weight"}, "'largest_weight' looks at the weights alone"),
        ({"support_rows": 0.5}, "draws from all rows, and support_rows=0.5 confines"),
        ({"fitted_rate": True}, "fitted_rate=True would scale all of a tensor's by one number"),
        ({"chosen_rate": 0}, r"chosen_rate must be a share of each step in \(0, 1\], got 0"),
        ({"chosen_rate": True}, "got True"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        OneShotConfig(**{**HALVES, **fields})


# ---- how fast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_chosen_weights_take_a_share_of_each_step(optimizer):
    whole, shared = make(chosen_rate=1.0), make(chosen_rate=0.25)
    for model in (whole, shared):
        select(model)
        step(model, BATCHES[0], optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1))
    drawn = _drawn(make())
    for (name, _, _, one), (_, _, _, two) in zip(iter_deltas(whole), iter_deltas(shared), strict=True):
        share = torch.where(torch.isin(one.indices.long(), drawn[name]), 1.0, 0.25)
        torch.testing.assert_close(two.values, one.values * share, rtol=1e-6, atol=0)
        assert one.values.all()


def test_an_eighth_by_default():
    assert OneShotConfig(**HALVES).chosen_rate == 0.125


def run(folder, model, **changes):
    args = make_args(folder, max_steps=6, save_strategy="steps", save_steps=2, **changes)
    return SparseTrainer(model=model, args=args, train_dataset=ROWS)


@pytest.mark.parametrize("fields", [{}, {"random_share": 0.0, "fitted_rate": True}], ids=["halves", "fitted"])
def test_a_run_goes_on_from_any_checkpoint(tmp_path, fields):
    model = make(**fields)
    run(tmp_path / "whole", model).train()
    for i, point in enumerate(["checkpoint-2", "checkpoint-4", "_dense/selection"]):
        shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        resumed = make(**fields)
        run(tmp_path / str(i), resumed).train(resume_from_checkpoint=str(tmp_path / str(i) / point))
        assert_same_tensors(deltas(resumed), deltas(model))


@pytest.mark.parametrize("name", ["default", "renamed"])
def test_an_adapter_from_a_file_trains_on_as_the_one_that_it_was(tmp_path, name):
    model = make()
    run(tmp_path, model).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(
        make_bert(dropout=0.0), str(tmp_path / "saved"), adapter_name=name, is_trainable=True
    )
    for one in (model, loaded):
        step(one, BATCHES[0], torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1))
    assert_same_tensors(deltas(loaded, name), deltas(model))


def test_the_rates_follow_a_support_that_is_loaded(tmp_path):
    other, model = make(criterion="fisher"), make()
    for one in (other, model):
        select(one)
    other.save_pretrained(tmp_path)
    step(model, BATCHES[0], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    for one in (other, model):
        step(one, BATCHES[1], torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1))
    assert_same_tensors(deltas(model), deltas(other))


def test_a_copy_trains_as_the_model_does():
    model = make()
    select(model)
    other = copy.deepcopy(model)
    for one in (model, other):
        step(one, BATCHES[0], torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1))
    assert_same_tensors(deltas(other), deltas(model))


def test_one_config_draws_anew_for_each_adapter():
    config = OneShotConfig(**HALVES)
    model = get_peft_model(make_bert(dropout=0.0), config)
    model.add_adapter("other", config)
    assert config.drawn_for is None
    first, second = (model.peft_config[name].drawn_for for name in ("default", "other"))
    assert first != second


def test_values_of_another_draw_are_refused(tmp_path):
    other = make(seed=5)
    select(other)
    other.save_pretrained(tmp_path)
    model = make()
    select(model)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)  # PEFT keeps the config that was there
    with pytest.raises(ConfigError, match=r"does not tune all weights of .* that its config draws at random"):
        step(model, BATCHES[0], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
