"""Weights that are generated once for many forwards, and anew as soon as anything that they come from changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_sparse.tuners.madg import generator
from peft_sparse.tuners.madg.generator import SiteGenerator
from tests.support.exact import IDS, close, logits
from tests.support.madg import MadGCase, generator_parameters

REQUESTS = ("MAD-G", "MAD-G-LS")


@pytest.fixture
def generated(monkeypatch):
    """The languages that were generated, site by site."""
    seen = []
    own = SiteGenerator.generate

    def generate(self, languages):
        seen.append(tuple(languages))
        return own(self, languages)

    monkeypatch.setattr(SiteGenerator, "generate", generate)
    return seen


def kept(model: nn.Module) -> int:
    """At how many sites something is kept."""
    return sum(m._cache._kept is not None for m in model.modules() if isinstance(m, SiteGenerator))


@pytest.mark.parametrize("request_", REQUESTS)
def test_one_language_is_generated_once(request_, generated):
    case = MadGCase(request_)
    model = case.model(language="quy")
    first = logits(model)
    sites = len(generated)
    assert sites == kept(model) > 0
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model, language="quy"), first)
    assert len(generated) == sites
    close(first, case.expected(model, "quy"))
    model.set_language("ace")
    close(logits(model), case.expected(model, "ace"))
    assert generated[sites:] == [("ace",)] * sites
    close(logits(model, language=["ace", "quy", "ace"])[1:2], first[1:2])
    assert kept(model) == 0


def change_in_place(model, parameter):
    with torch.no_grad():
        parameter.mul_(1.5)


def change_data(model, parameter):
    parameter.data = parameter.data * 1.5


def change_data_in_place(model, parameter):
    parameter.data.mul_(1.5)


def exchange(model, parameter):
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            if own is parameter:
                setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def load(model, parameter):
    state = {name: 1.5 * p if p is parameter else p for name, p in model.named_parameters()}
    model.load_state_dict(state, strict=False)


def step(model, parameter):
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


@pytest.mark.parametrize("change", [change_in_place, change_data, change_data_in_place, exchange, load, step])
@pytest.mark.parametrize("request_", REQUESTS)
def test_any_change_of_any_parameter_is_seen(request_, change):
    case = MadGCase(request_)
    for number in range(len(generator_parameters(case.model()))):
        model = case.model(language="quy")
        before = logits(model)
        name, parameter = generator_parameters(model)[number]
        change(model, parameter)
        after = logits(model)
        close(after, case.expected(model, "quy"))
        assert not torch.allclose(after, before), name


def test_nothing_is_kept_where_gradients_flow_or_in_training():
    model = MadGCase("MAD-G-LS").model(language="quy")
    logits(model)
    assert kept(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not kept(model)
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in generator_parameters(model))
    logits(model)
    assert kept(model)
    model.train()
    assert not kept(model)
    logits(model)
    assert not kept(model)
    model.eval()
    before = logits(model)
    model.to(torch.float32)
    assert not kept(model)
    torch.testing.assert_close(logits(model), before.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_files_have_nothing_of_it(copied):
    case = MadGCase("MAD-G")
    model = case.model(language="quy")
    names, size = list(model.state_dict()), len(pickle.dumps(model))
    first = logits(model)
    assert list(model.state_dict()) == names
    assert len(pickle.dumps(model)) <= size + 4096
    other = copied(model)
    assert not kept(other)
    assert torch.equal(logits(other), first)
    with torch.no_grad():
        generator_parameters(other)[0][1].zero_()
    assert not torch.equal(logits(other), first)
    assert torch.equal(logits(model), first)


def test_under_autocast_and_in_inference_mode():
    model = MadGCase("MAD-G").model(language="quy").float()
    plain = logits(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(logits(model).float(), plain)
        assert kept(model)
    assert torch.equal(logits(model), plain)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.requires_grad_(True)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    with torch.inference_mode():
        born_there = copy.deepcopy(model).eval()
        assert torch.equal(born_there(input_ids=IDS).logits, plain)
        assert not kept(born_there)


def test_nothing_is_kept_in_several_processes(monkeypatch):
    """FSDP fills the same tensors with other values."""
    monkeypatch.setattr(generator, "in_several_processes", lambda: True)
    model = MadGCase("MAD-G").model(language="quy")
    logits(model)
    assert not kept(model)
