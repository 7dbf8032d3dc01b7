"""Quantised layers of other libraries: whatever PEFT can dequantise is tuned, the rest refused by name."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.utils import quantization_utils
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn

import peft_sparse
from peft_sparse import ConfigError, RandConfig, iter_deltas
from peft_sparse.tuners.common import packed
from peft_sparse.tuners.common.targets import model_numel
from peft_sparse.tuners.sparse_ft.layers.quantized import QuantizedLinear


class Fifths(nn.Module):
    """A layer like HQQ's: no parameter named weight, two codes packed into one byte, a bias that is no parameter, and a
    dtype of its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.bias = bias
        codes = (weight * 5).round().clamp(-7, 8).to(torch.int64).add(7).view(-1, 2)
        self.W_q = nn.Parameter((codes[:, 0] * 16 + codes[:, 1]).to(torch.uint8), requires_grad=False)

    def dequantize(self) -> Tensor:
        codes = self.W_q.to(torch.int64)
        pairs = torch.stack([codes // 16, codes % 16], dim=1)
        return ((pairs - 7) / 5).to(self.compute_dtype).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.compute_dtype), self.dequantize(), self.bias).to(x.dtype)


class FifthsBackend(QuantizationBackend):
    """Stores a weight as HQQ's backend does: by a new base layer, without a bias."""

    supports_merge = True
    backend_name = "fifths"
    layer_type = "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer, weight_data):
        old = peft_layer.get_base_layer()
        peft_layer.base_layer = Fifths(weight_data, None, compute_dtype=old.compute_dtype)


class Sealed(nn.Linear):
    """Stands for a layer that only runs forwards."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Stubborn(Fifths):
    """A layer that its library cannot dequantise yet."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError("not yet")


@pytest.fixture
def backends(monkeypatch):
    own = quantization_utils.resolve_quantization_backend

    def resolve(module, **kwargs):
        if isinstance(module, Fifths):
            return FifthsBackend()
        if isinstance(module, Sealed):
            return ForwardOnlyQuantizationBackend("gptq")
        return own(module, **kwargs)

    monkeypatch.setattr(packed, "resolve_quantization_backend", resolve)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x).relu())


def fifths(**settings):
    torch.manual_seed(0)
    return Net(Fifths(torch.randn(10, 16), torch.randn(10), **settings))


def tune(net, **changes):
    request = {"density": 0.25, "target_modules": ["layer"], "init_weights": False, **changes}
    torch.manual_seed(1)
    return get_peft_model(net, RandConfig(**request))


def adapted(model) -> QuantizedLinear:
    return model.base_model.model.layer


X = torch.linspace(-2, 2, 36).view(3, 12)


@pytest.mark.parametrize("changes", [{}, {"target_modules": "all"}, {"target_parameters": ["layer.weight"]}])
def test_any_backend_that_dequantises_is_tuned(backends, changes):
    model = tune(fifths(), **changes)
    layer = adapted(model)
    assert isinstance(layer, QuantizedLinear)
    assert layer.quantization_backend.backend_name == "fifths"
    counts = model.peft_config["default"].counts
    assert counts["layer.weight"] == 40
    assert model_numel(model) == 12 * 16 + 16 + 10 * 16
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    (delta,) = [d for name, _, _, d in iter_deltas(model) if name == "layer.weight"]
    weight = layer.get_base_layer().dequantize().clone()
    weight.view(-1)[delta.indices.long()] += delta.values.detach()
    hidden = model.base_model.model.first(X).relu().detach()
    torch.testing.assert_close(model(X), hidden @ weight.t() + layer.get_base_layer().bias)
    expected = hidden.sum(0).expand(10, 16).reshape(-1)[delta.indices.long()]
    torch.testing.assert_close(delta.values.grad, expected)


def test_a_compute_dtype_of_its_own(backends):
    model = tune(fifths(compute_dtype=torch.bfloat16))
    y = model(X)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())


def test_merging_exchanges_the_base_layer_and_puts_it_back(backends):
    model = tune(fifths())
    layer = adapted(model)
    base, before = layer.get_base_layer(), model(X)
    codes = base.W_q.clone()
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter()
    merged = layer.get_base_layer()
    assert merged is not base
    assert merged.bias is base.bias
    assert not torch.equal(merged.W_q, codes)
    assert 0 < layer.merge_error.tuned < 0.5
    asked = layer.make_weight(["default"])
    torch.testing.assert_close(
        layer.merge_error.whole, float((merged.dequantize() - asked).norm() / asked.norm()), rtol=1e-5, atol=0
    )
    model.unmerge_adapter()
    assert layer.get_base_layer() is base
    assert torch.equal(base.W_q, codes)
    assert torch.equal(model(X), before)


def test_dequantising(backends):
    model = tune(fifths())
    before = model(X)
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.layer) is nn.Linear
    assert torch.equal(merged(X), before)


def test_forward_only_backends_are_refused_before_anything_changes(backends):
    net = Net(Sealed(16, 10))
    with pytest.raises(
        ConfigError,
        match=r"layer is quantised by gptq \(Sealed\).*dequantise.*bitsandbytes.*exclude_modules=\['layer'\]",
    ):
        tune(net)
    assert type(net.layer) is Sealed
    model = tune(net, target_modules=["first"])
    with pytest.raises(ConfigError, match="dequantize=True: layer is quantised by gptq"):
        model.merge_and_unload(dequantize=True)
    assert type(model.merge_and_unload().layer) is Sealed


def test_a_weight_that_cannot_be_dequantised_yet(backends):
    torch.manual_seed(0)
    model = tune(Net(Stubborn(torch.randn(10, 16), None)))
    with pytest.raises(ConfigError, match="weight of a Stubborn cannot be dequantised by fifths: not yet"):
        model(X)


def four_bit():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the weights of these tests")
    return bnb, nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")


def test_an_old_bitsandbytes_is_told_of_once(monkeypatch):
    bnb, net = four_bit()
    monkeypatch.setattr(bnb, "__version__", "0.49.2")
    packed.warn_of_old_bitsandbytes.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(net, RandConfig(density=0.1, target_modules=["0"]))
        model.add_adapter("other", RandConfig(density=0.1, seed=1, target_modules=["0"]))
    packed.warn_of_old_bitsandbytes.cache_clear()
    said = [str(w.message) for w in caught if "bitsandbytes" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("bitsandbytes 0.49.2 is older than 0.50, ")
    assert 'pip install "bitsandbytes>=0.50"' in said[0]


def test_nothing_is_said_of_the_oldest_declared_bitsandbytes():
    declared = (Path(peft_sparse.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"bitsandbytes>=([\d.]+)"', declared)[1]
    assert oldest == packed.OLDEST_BITSANDBYTES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed.warn_of_old_bitsandbytes(oldest)
        packed.warn_of_old_bitsandbytes("0.51.0.dev0")


def test_hqq():
    hqq = pytest.importorskip("hqq.core.quantize", reason="needs hqq: pip install hqq")
    torch.manual_seed(0)
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    linear = hqq.HQQLinear(nn.Linear(128, 64), settings, compute_dtype=torch.float32, device="cpu")
    net = nn.Sequential(nn.Linear(12, 128), linear).requires_grad_(False)
    model = get_peft_model(net, RandConfig(density=0.05, target_modules=["1"], init_weights=False))
    check_library(model, "1", numel=12 * 128 + 128 + 64 * 128)


def test_torchao():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 128), nn.Linear(128, 64)).requires_grad_(False)
    torchao.quantize_(net[1], torchao.Int8WeightOnlyConfig())
    model = get_peft_model(net, RandConfig(density=0.05, target_modules=["1"], init_weights=False))
    layer = model.base_model.model[1]
    with pytest.raises(ConfigError, match="does not say how its torchao weights were quantised"):
        model.merge_adapter()
    assert not layer.merged
    layer.quantization_backend.get_apply_tensor_subclass = torchao.Int8WeightOnlyConfig
    check_library(model, "1", numel=12 * 128 + 128 + 64 * 128 + 64)


def check_library(model, name, *, numel):
    layer = model.base_model.model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    assert layer.get_delta_weight("default").shape == (64, 128)
    assert model_numel(model) == numel
    for _, _, _, delta in iter_deltas(model):
        delta.values.data *= 0.02
    x = X.clone().requires_grad_()
    before = model(x)
    before.sum().backward()
    assert float(x.grad.norm()) > 0
    weight = layer.dequantized()
    hidden = model.base_model.model[0](X).detach()
    expected = torch.nn.functional.linear(
        hidden, weight + layer.get_delta_weight("default"), layer.get_base_layer().bias
    )
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter()
    assert 0 < layer.merge_error.tuned < 0.3
    merged = model(X)
    assert float((merged - before).norm() / before.norm()) < 0.3
    model.unmerge_adapter()
    assert torch.equal(layer.dequantized(), weight)
    assert torch.equal(model(X), before)
    ordinary = model.merge_and_unload(dequantize=True)
    assert type(ordinary[1]) is nn.Linear
    assert torch.equal(ordinary(X), before)
