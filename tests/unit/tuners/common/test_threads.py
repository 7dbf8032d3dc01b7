"""Several threads compute with one model: each gets what it would get alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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
