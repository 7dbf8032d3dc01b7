"""The language that a MAD-G config starts with, before any forward."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tests.support.adapters import adapted
from tests.support.models import IDS, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")


def test_its_vector_is_saved_though_nothing_was_computed(tmp_path):
    model = adapted("MAD_G", llama())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), expected)


def test_a_first_forward_inside_of_a_transform():
    model = adapted("MAD_G", llama())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), {"input_ids": IDS}).logits.square().sum()

    found = torch.func.grad(loss)({name: parameter.detach() for name, parameter in trained.items()})
    model(input_ids=IDS).logits.square().sum().backward()
    assert all(torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-6) for name, p in trained.items())
    assert any(bool(p.grad.any()) for p in trained.values())
