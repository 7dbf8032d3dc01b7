"""MAD-G against the thesis' formulas in float64: outputs, and the gradients of V, W and the layer embeddings."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_sparse.tuners.madg.model import iter_sites
from tests.support.exact import IDS, close, logits
from tests.support.madg import REQUESTS, VECTORS, MadGCase, generator_parameters, gradients, plain

CASES = [MadGCase(request) for request in REQUESTS]
ROWS = ["quy", "mlt", "quy"]


def loss_of(model, **inputs):
    return model(input_ids=IDS, **inputs).logits.square().sum(-1).mean(-1)


def check_gradients(model, networks):
    expected = gradients(networks)
    found = dict(generator_parameters(model))
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.grad.abs().sum() > 0, name
        close(parameter.grad, expected[name])


@pytest.mark.parametrize("case", CASES, ids=list(REQUESTS))
def test_outputs_and_gradients_are_the_formulas(case):
    model = case.model()
    for language in ("quy", "mlt"):
        model.set_language(language)
        close(logits(model), case.expected(model, language))
    assert (case.expected(model, "quy") - case.expected(model, "mlt")).abs().max() > 1e-3
    network = plain(model)
    loss_of(case.twin(network, language="mlt")).sum().backward()
    loss_of(model.train()).sum().backward()
    check_gradients(model, network)
    untouched_base(model, case)


@pytest.mark.parametrize("case", CASES, ids=list(REQUESTS))
def test_a_mixed_batch_is_its_examples_one_by_one(case):
    model = case.model()
    rows = [case.expected(model, language)[i] for i, language in enumerate(ROWS)]
    close(logits(model, language=ROWS), torch.stack(rows))
    network = plain(model)
    sum(loss_of(case.twin(network, language=language))[i] for i, language in enumerate(ROWS)).backward()
    loss_of(model.train(), language=ROWS).sum().backward()
    check_gradients(model, network)


def test_gradients_where_one_layer_is_computed_again():
    case = MadGCase("MAD-G-LS")
    for number in (0, 1):
        model = case.model(language="quy").train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", None)]
        for i, layer in enumerate(layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)):
            layer.gradient_checkpointing = i == number
        network = plain(model)
        loss_of(case.twin(network, language="quy")).sum().backward()
        loss_of(model).sum().backward()
        check_gradients(model, network)


def test_a_gradient_can_be_differentiated():
    case = MadGCase("MAD-G-LS")
    model = case.model(language="quy").train()
    network = plain(model)
    paths, own = list(network["W"]), dict(generator_parameters(model))
    wanted = [network["W"][paths[0]], *network["e"].values()]
    given = [own[f"{paths[0]}.shared.generator"], *(own[f"{path}.layer_embedding"] for path in paths)]
    for one, tensors in ((case.twin(network, language="quy"), wanted), (model, given)):
        with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate the others twice
            found = torch.autograd.grad(loss_of(one).sum(), tensors, create_graph=True)
        sum(gradient.square().sum() for gradient in found).backward()
    check_gradients(model, network)


def test_gradients_under_autocast():
    case = MadGCase("MAD-G-LS")
    model = case.model(language="quy").train()
    network = plain(model)
    loss_of(case.twin(network, language="quy")).sum().backward()
    model.float()
    found = []
    for enabled_in_backward in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled_in_backward):
            loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in generator_parameters(model)})
        model.zero_grad()
    for name, wanted in gradients(network).items():
        assert (found[0][name] - wanted).norm() < 0.05 * wanted.norm(), name
        if name.endswith("generator"):
            torch.testing.assert_close(found[1][name], found[0][name])


def test_hypernetworks_stack_in_the_order_given():
    case = MadGCase("MAD-G")
    model = case.model("one", "two")
    model.base_model.set_adapter(["two", "one"])
    model.set_language("ace")
    close(logits(model), case.expected(model, "ace", "two", "one"))
    assert (case.expected(model, "ace", "one", "two") - case.expected(model, "ace", "two", "one")).abs().max() > 1e-4


@pytest.mark.parametrize("request_", ["MAD-G", "MAD-G-LS"])
def test_feature_importance_is_the_norm_of_the_columns_of_w_v(request_):
    case = MadGCase(request_)
    model = case.model()
    network = plain(model)
    products = [w[:, : len(network["V"])] @ network["V"] for w in network["W"].values()]
    found = model.feature_importance()
    close(found.by_site, torch.stack([product.norm(dim=0) for product in products]).detach())
    close(found.total, torch.cat(products).norm(dim=0).detach())
    assert found.sites == [path for path, _ in iter_sites(model)]
    order = [name for name, _ in found.top()]
    assert order == [str(i) for i in torch.cat(products).norm(dim=0).argsort(descending=True).tolist()]
    # Which is by how much the weights move where a feature is switched on.
    site = next(iter(dict(iter_sites(model)).values()))
    moved = {**VECTORS, "on": VECTORS["quy"].clone(), "off": VECTORS["quy"].clone()}
    moved["on"][2], moved["off"][2] = 1, 0
    other = case.model(typology=moved)
    first = next(iter(dict(iter_sites(other)).values()))
    first.load_state_dict(site.state_dict())
    on, off = first.generate(["on", "off"])
    change = torch.cat([(on.down_weight - off.down_weight).flatten(), (on.up_weight - off.up_weight).flatten()])
    close(found.by_site[0, 2], change.norm().detach())


def untouched_base(model, case):
    base = dict(case.base().named_parameters())
    found = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): parameter
        for name, parameter in model.named_parameters()
        if ".mad_g_generators." not in name
    }
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    assert all(parameter.grad is None for parameter in found.values())
