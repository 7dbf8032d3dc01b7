"""Ada-SFT against a slow float64 reference written from the paper's two formulas (Sharma and Chauhan, section 3.4)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import BertForSequenceClassification

from peft_sparse import AdaSftConfig, start_weight_phase
from peft_sparse.core.masked import MaskedPart, masked_linear
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from tests.support.models import bert, gpt2
from tests.support.oracle import relative_error

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0),
}


def make_bert():
    rates = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return bert(BertForSequenceClassification, vocab_size=30, num_labels=3, **rates).double().train()


def make_gpt2():
    return gpt2(vocab_size=30, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).double().train()


def batches(kind):
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        ids = torch.randint(0, 30, (4, 6), generator=generator)
        yield {"input_ids": ids, "labels": ids[:, 0] % 3 if kind == "bert" else ids}


def reference(model, names, kind, make_optimizer, initial_mask, from_identity):
    """The two-step procedure: W fixed, M = sigmoid(S) learnt; then M fixed, W learnt. Acts is W * M (or W/m * M)."""
    plain = {name: parameter.detach() for name, parameter in model.named_parameters()}
    factor = 1 / initial_mask if from_identity else 1.0
    start = torch.logit(torch.tensor(initial_mask, dtype=torch.float64))
    scores = {name: torch.full_like(plain[name], float(start)).requires_grad_() for name in names}
    weights = {name: plain[name].clone() for name in names}
    records = []

    def fine_tune(leaves):
        optimizer = make_optimizer(list(leaves.values()))
        for batch in batches(kind):
            masked = {n: factor * weights[n] * torch.sigmoid(scores[n]) for n in names}
            loss = functional_call(model, {**plain, **masked}, kwargs=batch).loss
            loss.backward()
            records.append((loss.item(), {n: leaf.grad.clone() for n, leaf in leaves.items()}))
            optimizer.step()
            optimizer.zero_grad()

    fine_tune(scores)
    scores = {name: s.detach() for name, s in scores.items()}
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    fine_tune(weights)
    masked = {n: factor * weights[n] * torch.sigmoid(scores[n]) for n in names}
    return records, {n: s - start for n, s in scores.items()}, {n: weights[n] - plain[n] for n in names}, masked


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("config", [{}, {"from_identity": False, "initial_mask": 0.99}, {"initial_mask": 0.5}])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_both_phases_step_by_step(kind, config, optimizer):
    base = {"bert": make_bert, "gpt2": make_gpt2}[kind]()
    model = get_peft_model(copy.deepcopy(base), AdaSftConfig(**config)).double()
    names = [name for name, _, _ in iter_masked(model)]
    assert len(names) == {"bert": 14, "gpt2": 8}[kind]
    settings = model.peft_config["default"]
    expected, scores, differences, masked = reference(
        base, names, kind, OPTIMIZERS[optimizer], settings.initial_mask, settings.from_identity
    )
    found = []
    for phase in ("mask", "weights"):
        if phase == "weights":
            assert start_weight_phase(model) == sum(base.get_parameter(n).numel() for n in names)
            model.double()
        own = {name: part.trained for name, _, part in iter_masked(model)}
        assert {id(p) for p in own.values()} == {id(p) for p in model.parameters() if p.requires_grad}
        steps = OPTIMIZERS[optimizer](list(own.values()))
        for batch in batches(kind):
            loss = model(**batch).loss
            loss.backward()
            found.append((loss.item(), {n: p.grad.clone() for n, p in own.items()}))
            steps.step()
            steps.zero_grad()
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-9)
    for (_, gradients), (_, references) in zip(found, expected, strict=True):
        for name in names:
            torch.testing.assert_close(gradients[name], references[name], rtol=1e-6, atol=1e-11)
    for name, layer, part in iter_masked(model):
        torch.testing.assert_close(part.scores, scores[name], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part.difference, differences[name], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.merged_weight(["default"]), masked[name].detach(), rtol=1e-6, atol=1e-8)
    assert max(float(difference.abs().max()) for difference in differences.values()) > 1e-3


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("holds", ["scores", "scores and difference", "difference", "two adapters"])
def test_a_layer_in_every_precision(holds, how, fan_in_fan_out):
    """Outputs and gradients are at most twice as far from float64 as those of the formula in plain torch."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    x, bias, into = draw(5, 7, 24, dtype=dtype), draw(16, dtype=dtype), draw(5, 7, 16)
    weight = draw(24, 16, dtype=dtype) if fan_in_fan_out else draw(16, 24, dtype=dtype)
    leaves = [draw(*weight.shape) for _ in range(3)]

    def parts_of(scores, difference, second):
        first = {
            "scores": (scores, None),
            "scores and difference": (scores, difference),
            "difference": (None, difference),
        }.get(holds, (scores, difference))
        more = [MaskedPart(second, None, 0.5, False)] if holds == "two adapters" else []
        return [MaskedPart(*first, 0.9, True), *more]

    def by_hand(x, weight, bias, tensors):
        changes = []
        for part in parts_of(*tensors):
            tuned = weight.to(tensors[0].dtype) + (0 if part.difference is None else part.difference)
            if part.scores is not None:
                start = torch.logit(torch.tensor(part.initial_mask, dtype=tuned.dtype))
                tuned = tuned * torch.sigmoid(part.scores + start) / (0.9 if part.from_identity else 1.0)
            changes.append(tuned - weight.to(tuned.dtype))
        total = (weight.to(changes[0].dtype) + sum(changes)).to(weight.dtype)
        return F.linear(x, total.t() if fan_in_fan_out else total, bias)

    def run(function, wide):
        def cast(t):
            return (t.double() if wide else t).clone().requires_grad_()

        inputs, own_bias, tensors = cast(x), cast(bias), [cast(t) for t in leaves]
        fixed = weight.double() if wide else weight
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast" and not wide):
            y = function(inputs, fixed, own_bias, tensors)
        y.backward(into.to(y.dtype))
        return y.detach(), [t.grad for t in (inputs, own_bias, *tensors)]

    def ours(x, weight, bias, tensors):
        return masked_linear(x, weight, bias, parts_of(*tensors), fan_in_fan_out=fan_in_fan_out)

    exact, exact_grads = run(by_hand, True)
    dense, dense_grads = run(by_hand, False)
    found, grads = run(ours, False)
    assert found.dtype is dense.dtype
    assert relative_error(found, exact) <= 2 * relative_error(dense, exact) + 1e-7
    assert sum(grad is not None for grad in grads) == 2 + {"two adapters": 3, "scores and difference": 2}.get(holds, 1)
    for gradient, expected, reference_gradient in zip(grads, exact_grads, dense_grads, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            assert gradient.dtype is reference_gradient.dtype
            bound = 2 * relative_error(reference_gradient, expected) + 1e-6
            assert relative_error(gradient, expected) <= bound


def test_the_compiled_path_and_a_trainable_base_are_the_same_formula(monkeypatch):
    weight, x = torch.randn(6, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    scores = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    part = [MaskedPart(scores, None, 0.9, True)]
    outputs = []
    for compiling, trainable in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
        base = nn.Parameter(weight.clone(), requires_grad=trainable)
        y = masked_linear(x, base, None, part)
        (gradient,) = torch.autograd.grad(y.square().sum(), scores, retain_graph=trainable)
        outputs.append((y, gradient))
        if trainable:
            (own,) = torch.autograd.grad(y.square().sum(), base)
            mask = torch.sigmoid(scores.detach() + torch.logit(torch.tensor(0.9, dtype=torch.float64))) / 0.9
            expected = 2 * (x @ (weight * mask).t()).t() @ x * mask
            torch.testing.assert_close(own, expected)
    for y, gradient in outputs[1:]:
        torch.testing.assert_close(y, outputs[0][0], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(gradient, outputs[0][1], rtol=1e-12, atol=1e-12)
