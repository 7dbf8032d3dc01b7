"""Several threads compute with one model: each gets what it would get alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import RandConfig, SpielAGConfig, iter_deltas, resident
from peft_sparse.core import observer
from tests.support.adapters import TYPES, adapted, tuned
from tests.support.madg import MadGCase
from tests.support.models import llama

REQUESTS = [torch.randint(1, 19, (2, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(serve, num=80):
    """What requests give in four threads, by their number."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(serve, range(num)))


@pytest.mark.parametrize("kind", ["all", "ada", "bottleneck"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_outputs(kind, with_gradients):
    model = tuned(kind, llama(tie_word_embeddings=True)) if kind == "all" else tuned(kind)

    def serve(i):
        with torch.set_grad_enabled(with_gradients):
            return model(input_ids=REQUESTS[i % 4]).logits.detach()

    want = [serve(i) for i in range(4)]
    assert all(torch.equal(found, want[i % 4]) for i, found in enumerate(in_threads(serve)))


def test_tuned_norms_alone():
    model = tuned("sparse", target_modules=[], target_norms=True)

    @torch.no_grad()
    def serve(i):
        return model(input_ids=REQUESTS[i % 4]).logits

    want = [serve(i) for i in range(4)]
    assert all(torch.equal(found, want[i % 4]) for i, found in enumerate(in_threads(serve, 200)))


def test_supports_of_different_adapters():
    """Layers keep the union of the supports that were asked for last."""
    model = tuned()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.add_adapter("other", type(model.peft_config["default"])(density=0.3, target_modules="all-linear", seed=9))
    names = [["default"], ["other"], ["default", "other"]]
    want = [layer.overlay("weight", each)[1].indices for each in names]

    def serve(i):
        return layer.overlay("weight", names[i % 3])[1].indices

    assert all(torch.equal(found, want[i % 3]) for i, found in enumerate(in_threads(serve, 300)))


@pytest.mark.parametrize("request_", ["MAD-G", "MAD-G-LS"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_every_thread_has_its_language(request_, with_gradients):
    model = MadGCase(request_).model()
    languages = ["eng", "quy", "ace", "bxr"]

    def serve(i):
        with torch.set_grad_enabled(with_gradients):
            return model(input_ids=REQUESTS[i % 4] % 8, language=languages[i % 3])[0].detach()

    want = [serve(i) for i in range(12)]
    assert all(torch.equal(found, want[i % 12]) for i, found in enumerate(in_threads(serve)))


@pytest.mark.parametrize("kind", TYPES)
def test_every_thread_has_its_adapter_names(kind):
    beside = {"target_modules": ["q_proj", "up_proj"]} if kind in ("SPARSE_FT", "ADA_SFT") else {}
    model = adapted(kind, llama(), "a", "b", modules_to_save=["lm_head"], **beside)
    requests = [{"adapter_names": names} for names in (["a", "a"], ["b", "b"], ["b", "__base__"])] + [{}]

    @torch.no_grad()
    def serve(i):
        return model(input_ids=REQUESTS[0], **requests[i % 4]).logits

    want = [serve(i) for i in range(4)]
    torch.testing.assert_close(want[3], want[0])  # "a" is the active one
    assert not any(torch.allclose(want[i], want[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert all(torch.equal(found, want[i % 4]) for i, found in enumerate(in_threads(serve, 120)))


def two_adapters():
    """ "a" on all linear weights, which is active, and "b" on few of them."""
    model = adapted("SPARSE_FT", llama(), "a")
    model.add_adapter("b", RandConfig(density=0.2, target_modules=["q_proj"], init_weights=False))
    for _, _, _, delta in iter_deltas(model, "b"):
        delta.values.data += 0.3
    return model


@pytest.mark.parametrize("active", ["a", "b"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_adapter_names_beside_resident_blocks(with_gradients, active):
    model = two_adapters()
    model.set_adapter(active)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requests = [["a", "b"], ["b", "__base__"], ["__base__", "a"], None]

    def serve(i):
        names = requests[i % 4]
        with torch.set_grad_enabled(with_gradients):
            if names is not None:
                return model(input_ids=REQUESTS[0], adapter_names=names).logits.detach()
            with resident(model):
                return model(input_ids=REQUESTS[0]).logits.detach()

    want = [serve(i) for i in range(4)]
    assert not any(torch.allclose(want[i], want[j], atol=1e-2) for i in range(4) for j in range(i))
    for i, found in enumerate(in_threads(serve, 200)):
        torch.testing.assert_close(found, want[i % 4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "request_",
    [{"adapter_names": ["b", "b"]}, {"adapter_names": ["b", "__base__"]}, None],
    ids=["b", "base", "disabled"],
)
@pytest.mark.parametrize("in_block", [True, False])
def test_gradients_beside_a_resident_block(request_, in_block):
    """What the base weights alone computed needs them in its backward, after other forwards wrote into them."""
    model = two_adapters().double()
    for _, _, _, delta in iter_deltas(model, "b"):
        delta.values.requires_grad_(True)
    embedded = model.get_input_embeddings()(REQUESTS[0]).detach().requires_grad_(True)

    def forward():
        with model.disable_adapter() if request_ is None else nullcontext():
            return model(inputs_embeds=embedded, **(request_ or {})).logits.square().sum()

    def gradients(block):
        held = [embedded, *(delta.values for *_, delta in iter_deltas(model, "a"))]
        first = None if in_block else forward()
        with block:
            first = forward() if first is None else first
            loss = first + model(input_ids=REQUESTS[1]).logits.square().sum()
            return torch.autograd.grad(loss, held)

    for found, want in zip(gradients(resident(model)), gradients(nullcontext()), strict=True):
        torch.testing.assert_close(found, want)


def test_models_are_made_while_others_train():
    """Whatever is told of optimizer steps, and what is remembered of supports, is shared by all models."""

    def serve(i):
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), SpielAGConfig(num_weights=8, target_modules=["0"], seed=i)
        )
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        return [delta.count for *_, delta in iter_deltas(model)]

    assert in_threads(serve, 150) == [[8]] * 150


def test_an_outer_pass_may_be_forgotten_by_another_thread(monkeypatch):
    class Emptied(dict):
        """As if another thread emptied it right after somebody looked."""

        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    monkeypatch.setattr(observer, "_outer", Emptied({5: 3}))
    monkeypatch.setattr(observer, "_running", lambda: 5)
    assert observer.current_pass() == 3


@torch.no_grad()
def test_what_another_thread_writes_before_the_product_is_seen(monkeypatch):
    """Of a layer wide enough for the kernels, which take no lock."""
    config = RandConfig(density=0.01, target_modules=["0"], init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(512, 512, bias=False)), config, adapter_name="a").base_model.model[0]
    x, names = torch.randn(2, 512), ["a", "__base__"]
    want = layer(x, adapter_names=names)

    def restore_and_write(*args):
        monkeypatch.undo()
        layer.restore(*args)
        layer.write("weight", ["a"])

    monkeypatch.setattr(layer, "restore", restore_and_write)
    torch.testing.assert_close(layer(x, adapter_names=names), want)
