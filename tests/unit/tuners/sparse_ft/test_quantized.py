"""Sparse adapters on quantised models: which weights, every verb, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model, prepare_model_for_kbit_training

from peft_sparse import ConfigError, LotteryTicketConfig, SpielAGConfig, SpielMAConfig, iter_deltas, start_dense_phase
from peft_sparse.tuners.common import packed
from peft_sparse.tuners.common.targets import model_numel
from peft_sparse.tuners.sparse_ft.layers.quantized import QuantizedLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the models of these tests")
pytest.importorskip("accelerate", reason="transformers loads quantised models with accelerate")

from tests.support.quantized import (  # noqa: E402
    BF16,
    F32,
    IDS,
    LINEARS,
    adapt,
    assert_same_bytes,
    close,
    dense,
    kinds,
    load,
    logits,
    packed_bytes,
    plain,
    q_proj,
    request_for,
    shrink,
    tuned,
    twin,
)

# ---- how many, which -----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "request_",
    [
        {"density": 0.1},
        {"density": 0.01, "density_of": "model"},
        {"density": None, "equivalent_rank": 2},
        {"density": None, "num_weights": 1234},
        {"density": 0.1, "budget": "global"},
        {"density": 0.05, "target_modules": None},
        {"density": 0.1, "target_modules": None, "target_parameters": ["q_proj.weight"]},
        {"density": 0.05, "target_modules": "all"},
    ],
)
def test_the_same_weights_as_on_the_unquantised_model(kind, request_):
    config = request_for(init_weights=True, **request_)
    model, ordinary = get_peft_model(load(kind), config), get_peft_model(plain(), config)
    assert model.peft_config["default"].counts == ordinary.peft_config["default"].counts
    assert model_numel(model) == model_numel(ordinary) == sum(p.numel() for p in plain().parameters())
    expected = {name: delta for name, _, _, delta in iter_deltas(ordinary)}
    for name, _, _, delta in iter_deltas(model):
        assert delta.shape == expected[name].shape
        assert torch.equal(delta.indices, expected[name].indices)


@kinds
def test_peft_sees_the_backend(kind):
    model = tuned(load(kind))
    name = "bnb 8bit" if kind == "8 bit" else "bnb 4bit"
    assert all(status.quantization_backend == name for status in get_layer_status(model))
    assert get_model_status(model).quantization_backend == name
    assert isinstance(q_proj(model), QuantizedLinear)
    assert f"quantization_backend='{name}'" in repr(q_proj(model))
    assert (q_proj(model).in_features, q_proj(model).out_features) == (64, 64)
    assert q_proj(model).get_delta_weight("default").shape == (64, 64)


# ---- verbs ---------------------------------------------------------------------------------------


def start(kind, folder):
    """A fresh adapter is the identity; 4-bit layers dequantise in one way only."""
    for dtype in (F32, BF16):
        base = load(kind, dtype=dtype, compute=dtype)
        own = logits(base)
        fresh = logits(tuned(base, init_weights=True))
        if kind == "8 bit":
            assert float((fresh - own).norm() / own.norm()) < 4 * torch.finfo(dtype).eps
        else:
            assert torch.equal(fresh, own)


def train(kind, folder):
    model = tuned(load(kind), init_weights=True)
    before = packed_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    assert_same_bytes(packed_bytes(model), before)
    assert all(delta.values.dtype == F32 for _, _, _, delta in iter_deltas(model))
    close(logits(model), logits(twin(model, dense(model))))


def reselect(kind, folder):
    """SpIEL sees the gradient of a quantised weight as it sees that of the ordinary one."""
    request = {"density": 0.05, "target_modules": LINEARS, "reselection_steps": 4, "estimation_steps": 2}
    for make in (SpielAGConfig, SpielMAConfig):
        model = get_peft_model(load(kind), make(**request, total_steps=8))
        ordinary = get_peft_model(twin(model), make(**request, total_steps=8))
        before = [delta.indices.clone() for _, _, _, delta in iter_deltas(model)]
        for one in (model, ordinary):
            optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(8):
                one(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        pairs = zip(iter_deltas(model), iter_deltas(ordinary), before, strict=True)
        for (name, _, _, delta), (_, _, _, expected), old in pairs:
            assert not torch.equal(delta.indices, old), name
            same = torch.isin(delta.indices, expected.indices)
            assert float(same.float().mean()) > 0.9, name


def save_and_reload(kind, folder):
    model = tuned(load(kind))
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(load(kind), folder).train()
    assert torch.equal(logits(again), logits(model))
    lean = PeftModel.from_pretrained(load(kind), folder, low_cpu_mem_usage=True).train()
    assert torch.equal(logits(lean), logits(model))
    by_transformers = load(kind)
    by_transformers.load_adapter(str(folder))
    assert torch.equal(logits(by_transformers.train()), logits(model))
    ordinary = tuned(plain())
    for (_, _, _, one), (_, _, _, other) in zip(iter_deltas(ordinary), iter_deltas(model), strict=True):
        one.set_support(other.indices, other.values)
    ordinary.save_pretrained(folder / "ordinary")
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (folder / "ordinary" / weights).read_bytes()
    # What was trained on a quantised model serves the unquantised one.
    moved = PeftModel.from_pretrained(plain(), folder)
    for name, _, _, delta in iter_deltas(moved):
        assert torch.equal(delta.delta.to_dense(), dense(model)[name])


def disable(kind, folder):
    base = load(kind)
    own = logits(base)
    model = tuned(base)
    before = logits(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), own)
        assert torch.equal(logits(model), before)
    assert not torch.equal(before, own)


def switch_and_add_up(kind, folder):
    model = tuned(load(kind), "x", "b")
    a, b = dense(model, "x"), dense(model, "b")
    close(logits(model), logits(twin(model, a)))
    model.set_adapter("b")
    close(logits(model), logits(twin(model, b)))
    model.base_model.set_adapter(["b", "x"])
    close(logits(model), logits(twin(model, a, b)))


def compose(kind, folder):
    model = tuned(load(kind), "x", "b")
    model.base_model.add_weighted_adapter(["x", "b"], [0.5, -1.0], "both")
    model.set_adapter("both")
    expected = {name: 0.5 * tensor - dense(model, "b")[name] for name, tensor in dense(model, "x").items()}
    close(logits(model), logits(twin(model, expected)))


def delete(kind, folder):
    model = tuned(load(kind), "x", "b")
    a = dense(model, "x")
    model.delete_adapter("b")
    close(logits(model), logits(twin(model, a)))
    assert list(model.peft_config) == ["x"]


def frozen_beside_training(kind, folder):
    model = tuned(load(kind), "language", "task")
    model.base_model.set_adapter(["language", "task"])
    model.set_requires_grad("language", requires_grad=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    ordinary = twin(model, dense(model, "language"), dense(model, "task"))
    ordinary(input_ids=IDS, labels=IDS).loss.backward()
    assert all(delta.values.grad is None for _, _, _, delta in iter_deltas(model, "language"))
    for name, _, _, delta in iter_deltas(model, "task"):
        expected = ordinary.get_parameter(name).grad.view(-1)[delta.indices.long()]
        torch.testing.assert_close(delta.values.grad, expected, rtol=2e-3, atol=1e-7)


def copies(kind, folder):
    model = tuned(load(kind))
    before = logits(model)
    twin_ = copy.deepcopy(model)
    shrink(twin_, factor=0.0)
    assert torch.equal(logits(model), before)
    close(logits(twin_), logits(twin(model)))


def prepared(kind, folder):
    base = prepare_model_for_kbit_training(load(kind, dtype=BF16, compute=BF16), use_gradient_checkpointing=True)
    model = tuned(base)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.dtype == F32
    for _, _, _, delta in iter_deltas(model):
        assert torch.isfinite(delta.values.grad).all()
        assert float(delta.values.grad.abs().max()) > 0
    close_to = logits(twin(model, dense(model)))
    assert float((logits(model) - close_to).norm() / close_to.norm()) < 0.02


def unload(kind, folder):
    base = load(kind)
    own, before = logits(base), packed_bytes(base)
    back = tuned(base).base_model.unload()
    assert torch.equal(logits(back), own)
    assert_same_bytes(packed_bytes(back), before)
    for module in back.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            assert module.support_avx512bf16_for_cpu == has_avx512bf16()


VERBS = [
    start,
    train,
    reselect,
    save_and_reload,
    disable,
    switch_and_add_up,
    compose,
    delete,
    frozen_beside_training,
    copies,
    prepared,
    unload,
]


@kinds
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_verb(verb, kind, tmp_path):
    verb(kind, tmp_path)


# ---- what is refused -----------------------------------------------------------------------------


def test_8_bit_products_over_16_bit_weights():
    with pytest.raises(ConfigError, match=r"layer has 8-bit products .* llm_int8_has_fp16_weight=False"):
        adapt(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True))


@pytest.mark.parametrize("make", [bnb.nn.Embedding4bit, bnb.nn.Embedding8bit])
def test_quantised_embeddings(make):
    with pytest.raises(ConfigError, match=r"target module layer of type Embedding.bit is not supported"):
        adapt(make(64, 64).to("cpu"))


@pytest.mark.parametrize("make", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_a_weight_that_is_not_quantised_yet(make):
    arguments = {} if make is bnb.nn.Linear4bit else {"has_fp16_weights": False}
    layer = make(64, 32, **arguments)
    with pytest.raises(ConfigError, match=r"is not quantised yet.*model.to\(\"cuda\"\)"):
        packed.dequantize(layer, packed.find_backend(layer))
    model = adapt(layer)
    (shape,) = [delta.shape for name, _, _, delta in iter_deltas(model) if name.endswith("weight")]
    assert shape == (32, 64)
    assert model.to("cpu")(torch.randn(2, 64)).shape == (2, 32)


def test_a_dense_phase():
    model = get_peft_model(load("nf4"), LotteryTicketConfig(density=0.1, target_modules=LINEARS))
    with pytest.raises(ConfigError, match="is quantised, and a dense phase trains the base weights themselves"):
        start_dense_phase(model)
