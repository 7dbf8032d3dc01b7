"""Supports of which a part is drawn at random and the rest chosen by gradients, each part at a rate that fits it."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import (
    ConfigError,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    iter_deltas,
    rate_scales,
    select_by_gradients,
)
from peft_sparse.selection.output_energy import step_scale
from peft_sparse.training.fitted_rate import iter_rate_fits
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
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        OneShotConfig(**{**HALVES, **fields})


# ---- how fast ------------------------------------------------------------------------------------------


def test_each_part_has_the_rate_that_fits_it():
    torch.manual_seed(0)
    plain, fitted = make(), make(fitted_rate=True)
    for model in (plain, fitted):
        select(model)
        step(model, BATCHES[0], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    drawn, seen = _drawn(make()), []
    (fit,) = iter_rate_fits(fitted)
    for (name, _, _, with_one), (_, _, _, with_two) in zip(iter_deltas(plain), iter_deltas(fitted), strict=True):
        indices = with_one.indices.long()
        mask = torch.isin(indices, drawn[name])
        scales = [step_scale(fit.energies[name], indices[part], with_one.shape) for part in (mask, ~mask)]
        expected = with_one.values * torch.where(mask, *scales)
        torch.testing.assert_close(with_two.values, expected, rtol=1e-5, atol=1e-9)
        assert rate_scales(fitted)[name] == pytest.approx(float(torch.where(mask, *scales).mean()))
        seen.append(scales[0] - scales[1])
    assert all(abs(difference) > 1e-4 for difference in seen)


def run(folder, model, **changes):
    args = make_args(folder, max_steps=6, save_strategy="steps", save_steps=2, **changes)
    return SparseTrainer(model=model, args=args, train_dataset=ROWS)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_run_goes_on_from_any_checkpoint(tmp_path, share):
    model = make(fitted_rate=True, random_share=share)
    run(tmp_path / "whole", model).train()
    for i, point in enumerate(["checkpoint-2", "checkpoint-4", "_dense/selection"]):
        shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        resumed = make(fitted_rate=True, random_share=share)
        run(tmp_path / str(i), resumed).train(resume_from_checkpoint=str(tmp_path / str(i) / point))
        assert_same_tensors(deltas(resumed), deltas(model))


def test_an_adapter_from_a_file_has_both_rates_again(tmp_path, caplog):
    model = make(fitted_rate=True)
    run(tmp_path, model).train()
    model.save_pretrained(tmp_path / "saved")
    scales = []
    for name in ("default", "renamed"):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            loaded = PeftModel.from_pretrained(
                make_bert(dropout=0.0), str(tmp_path / "saved"), adapter_name=name, is_trainable=True
            )
            config = loaded.peft_config[name]
            assert (config.random_share, config.seed) == (0.5, 0)
            step(loaded, BATCHES[0], torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.0))
        is_told = "which of its weights were drawn at random is not known" in caplog.text
        assert is_told == (name == "renamed")
        (fit,) = iter_rate_fits(loaded)
        parts = [
            scale for scale in (fit._scale(*pair) for pair in fit._deltas.items()) if isinstance(scale, torch.Tensor)
        ]
        scales.append(parts)
    assert len(scales[0]) == 13 > len(scales[1])


def test_other_methods_have_no_such_part():
    model = get_peft_model(make_bert(dropout=0.0), RandConfig(density=0.1, fitted_rate=True))
    step(model, BATCHES[0], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    (fit,) = iter_rate_fits(model)
    assert all(isinstance(fit._scale(*pair), float) for pair in fit._deltas.items())
