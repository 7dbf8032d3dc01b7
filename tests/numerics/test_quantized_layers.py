"""Quantised linear layers against a dense float64 oracle that is made from the dequantised weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sparse import RandConfig, iter_deltas, resident
from peft_sparse.core.overlay import Overlay
from peft_sparse.tuners.common.packed import dequantize, find_backend, hold_layouts, is_packed_for_cpu
from peft_sparse.tuners.sparse_ft.layers.quantized import QuantizedLinear
from tests.support.oracle import relative_error

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the weights of these tests")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS, COLUMNS = 96, 128


def four_bit(kind="nf4", *, compute=F32, double=False, stored=F32, bias=True):
    layer = bnb.nn.Linear4bit(
        COLUMNS, ROWS, bias=bias, compute_dtype=compute, quant_type=kind, compress_statistics=double
    )
    return layer.to(stored).to("cpu")


def eight_bit(*, stored=F32, used=False):
    layer = bnb.nn.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False, threshold=6.0)
    layer = layer.to("cpu")
    layer.bias.data = layer.bias.data.to(stored)
    assert layer.weight.SCB is not None
    if used:
        # The first forward moves the scales from the weight to the layer's state.
        layer(torch.zeros(1, COLUMNS, dtype=stored))
        assert layer.weight.SCB is None
    return layer


# (layer, dtype of the input, dtype of the product)
KINDS = {
    "nf4": (lambda: four_bit(), F32, F32),
    "nf4, double": (lambda: four_bit(double=True), F32, F32),
    "fp4": (lambda: four_bit("fp4"), F32, F32),
    "nf4, bfloat16 model": (lambda: four_bit(stored=BF16, compute=BF16, double=True), BF16, BF16),
    "nf4, float16 model": (lambda: four_bit(stored=F16, compute=F16), F16, F16),
    # prepare_model_for_kbit_training leaves float32 norms around layers that compute in bfloat16.
    "nf4, prepared": (lambda: four_bit(stored=BF16, compute=BF16), F32, BF16),
    "nf4, wider than its model": (lambda: four_bit(stored=BF16, compute=F32), BF16, F32),
    "nf4 that follows its input": (lambda: four_bit(compute=None), F32, F32),
    "nf4 without bias": (lambda: four_bit(bias=False), F32, F32),
    "8 bit": (lambda: eight_bit(), F32, F32),
    "8 bit, used": (lambda: eight_bit(used=True), F32, F32),
    "8 bit, bfloat16 model": (lambda: eight_bit(stored=BF16, used=True), BF16, BF16),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def config(seed: int, density: float = 0.1) -> RandConfig:
    return RandConfig(density=density, seed=seed, target_modules="all", init_weights=False)


def make(kind: str, *, adapters=("default",), density=0.1, device="cpu"):
    """(tuned model with random, active adapters; input; dtype of the product)."""
    torch.manual_seed(0)
    build, dtype, compute = KINDS[kind]
    model = get_peft_model(Net(build()).to(device), config(0, density))
    for seed, name in enumerate(adapters[1:], start=1):
        model.add_adapter(name, config(seed, density))
    model.base_model.set_adapter(list(adapters))
    # About the size of the weights, so that a delta matters and does not drown them.
    for name in adapters:
        for _, _, _, delta in iter_deltas(model, name):
            delta.values.data *= 0.05
    return model, torch.randn(5, 3, COLUMNS, dtype=dtype).to(device), compute


def tuned(model: nn.Module) -> QuantizedLinear:
    layer = model.base_model.model.layer
    assert isinstance(layer, QuantizedLinear)
    return layer


def read(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient of a fixed scalar function of the output."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    (y.double() * weights).sum().backward()
    return y.detach(), x.grad


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    return read(model(x), x)


def dense(model: nn.Module, x: torch.Tensor, adapters, dtype: torch.dtype):
    """The same by dense products in `dtype`: output, input gradient, {(adapter, parameter): dense gradient}."""
    base = tuned(model).get_base_layer()
    wide = torch.promote_types(dtype, F32)
    leaves = {
        (adapter, name): delta.delta.to_dense(dtype=wide).requires_grad_()
        for adapter in adapters
        for name, _, _, delta in iter_deltas(model, adapter)
    }
    weight = dequantize(base, find_backend(base)).to(wide)
    weight = weight + sum(leaf for (_, name), leaf in leaves.items() if name == "layer.weight")
    bias = None
    if base.bias is not None:
        bias = base.bias.detach().to(wide) + sum(leaf for (_, name), leaf in leaves.items() if name == "layer.bias")
        bias = bias.to(dtype)
    given = x.detach().double() if dtype == torch.float64 else x.detach().clone()
    given.requires_grad_()
    y = F.linear(given.to(dtype), weight.to(dtype), bias).to(given.dtype)
    y, x_grad = read(y, given)
    return y, x_grad, {key: leaf.grad for key, leaf in leaves.items()}


def assert_matches(model, x, compute, adapters=("default",), *, mode=run, trained=None):
    """Outputs and all gradients, within twice the error of dense products in the layer's own dtypes."""
    exact, own = dense(model, x, adapters, torch.float64), dense(model, x, adapters, compute)
    y, x_grad = mode(model, x)
    assert y.dtype == x_grad.dtype == x.dtype

    def check(actual, exact_part, own_part, what):
        floor = 4 * max(torch.finfo(actual.dtype).eps, torch.finfo(compute).eps) if actual.dtype != F32 else 1e-6
        allowed = max(2 * relative_error(own_part, exact_part), floor)
        assert relative_error(actual, exact_part) <= allowed, what

    check(y, exact[0], own[0], "output")
    check(x_grad, exact[1], own[1], "input gradient")
    for adapter in adapters if trained is None else trained:
        for name, _, _, delta in iter_deltas(model, adapter):
            if not delta.count:
                continue
            at = delta.indices.long()
            expected, approximate = (part[2][adapter, name].view(-1)[at] for part in (exact, own))
            check(delta.values.grad, expected, approximate, f"gradient of {adapter}/{name}")
            assert delta.values.grad.dtype == delta.values.dtype == F32


@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_dense_oracle(kind):
    assert_matches(*make(kind))


@pytest.mark.parametrize("density", [0.005, 0.5])
@pytest.mark.parametrize("kind", ["nf4", "nf4, bfloat16 model", "8 bit"])
def test_sampled_and_dense_gradients_match(kind, density):
    assert_matches(*make(kind, density=density))


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters_add_up(kind):
    adapters = ("default", "b", "c")
    assert_matches(*make(kind, adapters=adapters), adapters)


@pytest.mark.parametrize("kind", ["nf4, double", "nf4, prepared", "8 bit"])
def test_a_frozen_adapter_acts_but_gets_no_gradient(kind):
    adapters = ("default", "language")
    model, x, compute = make(kind, adapters=adapters)
    model.set_requires_grad("language", False)
    assert_matches(model, x, compute, adapters, trained=("default",))
    assert all(delta.values.grad is None for _, _, _, delta in iter_deltas(model, "language"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4, double", "nf4, prepared", "8 bit"])
def test_gradient_checkpointing(kind, reentrant):
    model, x, compute = make(kind)
    assert_matches(model, x, compute, mode=lambda m, x: run(lambda t: checkpoint(m, t, use_reentrant=reentrant), x))


@pytest.mark.parametrize("kind", ["nf4, prepared", "8 bit"])
def test_compiled(kind):
    adapters = ("default", "b")
    model, x, compute = make(kind, adapters=adapters)
    compiled = torch.compile(model, backend="aot_eager")
    assert_matches(model, x, compute, adapters, mode=lambda _, x: run(compiled, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["nf4", "nf4, wider than its model", "8 bit"])
def test_autocast_casts_as_it_does_for_an_ordinary_layer(kind):
    model, x, _ = make(kind)
    exact, own = dense(model, x, ["default"], torch.float64), dense(model, x, ["default"], BF16)

    def autocast(model, x):
        with torch.autocast("cpu", dtype=BF16):
            return run(model, x)

    y, x_grad = autocast(model, x)
    # bitsandbytes' 4-bit layers give back the dtype that they were given, its 8-bit layers what autocast makes.
    assert y.dtype == (BF16 if kind == "8 bit" else x.dtype)
    assert relative_error(y, exact[0]) <= 2 * relative_error(own[0], exact[0])
    assert relative_error(y, exact[0]) > 1e-4, "the product was made in bfloat16"
    assert relative_error(x_grad, exact[1]) <= 2 * relative_error(own[1], exact[1])


@pytest.mark.parametrize("kind", ["nf4", "8 bit, bfloat16 model"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_each_example_of_a_batch_with_its_own_adapter(kind, with_gradients):
    model, x, compute = make(kind, adapters=("default", "b"))
    model.eval()
    names = ["b", "__base__", "default", "b", "default"]
    base = tuned(model).get_base_layer()
    with torch.set_grad_enabled(with_gradients):
        y = model(x.detach().requires_grad_(with_gradients), adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                assert torch.equal(y[i], base(x)[i])
            else:
                exact = dense_output(model, x[i], [name])
                assert relative_error(y[i], exact) < 8 * torch.finfo(compute).eps


def dense_output(model, x, adapters):
    with torch.enable_grad():
        return dense(model, x, adapters, torch.float64)[0]


@pytest.mark.parametrize("kind", ["nf4, double", "8 bit", "8 bit, used"])
def test_resident_mode_changes_neither_numbers_nor_the_packed_weight(kind):
    adapters = ("default", "b")
    model, x, compute = make(kind, adapters=adapters)
    base = tuned(model).get_base_layer()
    packed, before = base.weight.data.clone(), run(model, x)
    with resident(model):
        for one, other in zip(run(model, x), before, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(base.weight.data, packed)
    for delta in (d for name in adapters for _, _, _, d in iter_deltas(model, name)):
        delta.values.grad = None
    assert_matches(model, x, compute, adapters)


@pytest.mark.parametrize("kind", ["nf4, double", "nf4, prepared", "8 bit"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward(kind):
    model, x, _ = make(kind)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x.requires_grad_())
    assert kept
    assert max(tensor.numel() for tensor in kept) < ROWS * COLUMNS


def test_layers_that_read_one_input_share_its_narrow_copy():
    """q, k and v of a model prepared for training: float32 in, bfloat16 products, one bfloat16 copy."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (four_bit(stored=BF16, compute=BF16) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    model = get_peft_model(Three(), RandConfig(density=0.05, target_modules=["q", "k", "v"]))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(7, COLUMNS))
    copies = [tensor.data_ptr() for tensor in kept if tensor.dtype == BF16 and tensor.numel() == 7 * COLUMNS]
    assert len(copies) == 3
    assert len(set(copies)) == 1
    assert y.dtype == F32


@pytest.mark.parametrize("kind", ["nf4, prepared", "nf4, wider than its model", "8 bit, bfloat16 model"])
def test_the_sum_is_made_in_float32_and_rounded_once(kind):
    model, _, compute = make(kind)
    layer = tuned(model)
    weight = layer.make_weight(["default"], dtype=compute)
    delta = layer.sparse_ft_weight["default"].delta
    wide = layer.dequantized().double()
    wide.view(-1)[delta.indices.long()] = (wide.view(-1)[delta.indices.long()].float() + delta.values).double()
    assert torch.equal(weight, wide.to(compute))


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_bitsandbytes_packed_for_the_processor(double):
    """Its own dequantize_4bit gives noise for such a weight."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

    layer = four_bit(double=double)
    backend = find_backend(layer)
    before = dequantize(layer, backend)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert is_packed_for_cpu(layer)
    assert relative_error(dequantize_4bit(layer.weight.data, layer.weight.quant_state), before) > 1
    packed = layer.weight.data.clone()
    weight = dequantize(layer, backend)
    # The scales were rounded to bfloat16, and nothing else.
    assert 0 < relative_error(weight, before) < 2**-8
    assert torch.equal(layer.weight.data, packed)
    hold_layouts(layer)
    assert is_packed_for_cpu(layer), "what evaluation gave before stays what it gives without adapters"
    hold_layouts(layer, undo=True)
    assert not is_packed_for_cpu(layer)
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_training_after_an_evaluation_without_adapters():
    """On processors with AVX512-BF16, bitsandbytes' layers lose the gradient or fail after that; held ones do not."""
    torch.manual_seed(0)
    net = nn.Sequential(four_bit(), nn.Linear(ROWS, COLUMNS), four_bit())
    net.requires_grad_(False)
    model = get_peft_model(net, RandConfig(density=0.1, target_modules=["2"], init_weights=False))
    x = torch.randn(4, COLUMNS)
    model.eval()
    with torch.no_grad():
        first = model(x)
        with model.disable_adapter():
            plain = model(x)
        assert torch.equal(model(x), first)
    assert not torch.equal(first, plain)
    model.train()
    x.requires_grad_()
    y = model(x)
    assert torch.equal(y, first)
    y.sum().backward()
    assert float(x.grad.norm()) > 0


@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "fp4", "8 bit"])
def test_the_measured_merge_error_is_right(kind):
    model, _, _ = make(kind, adapters=("default", "b"))
    layer = tuned(model)
    deltas = [layer.sparse_ft_weight[name].delta for name in ("default", "b")]
    asked = layer.dequantized().double()
    for delta in deltas:
        asked += delta.to_dense(dtype=torch.float64)
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter(["default", "b"])
    base = layer.get_base_layer()
    missed = dequantize(base, find_backend(base)).double() - asked
    at = torch.cat([delta.indices for delta in deltas]).unique().long()
    rms = lambda t: float(t.square().mean().sqrt())  # noqa: E731
    change = sum(delta.to_dense(dtype=torch.float64) for delta in deltas).view(-1)[at]
    error = layer.merge_error
    assert error.tuned == pytest.approx(rms(missed.view(-1)[at]) / rms(asked.view(-1)[at]), rel=1e-4)
    assert error.whole == pytest.approx(rms(missed) / rms(asked), rel=1e-4)
    assert error.of_delta == pytest.approx(rms(missed.view(-1)[at]) / rms(change), rel=1e-4)
    assert 0.001 < error.tuned < 0.5


def test_the_oracle_notices_a_wrong_sum(monkeypatch):
    """Planted bug: an overlay that forgets the last delta."""
    right = Overlay.entries
    monkeypatch.setattr(Overlay, "entries", lambda self, w, v: right(self, w, [*v[:-1], torch.zeros_like(v[-1])]))
    with pytest.raises(AssertionError, match="output"):
        assert_matches(*make("nf4", adapters=("default", "b")), ("default", "b"))


def test_the_oracle_notices_a_wrong_gradient():
    """Planted bug: the gradients of two weights exchanged."""
    model, x, compute = make("nf4, prepared")

    def exchanged(model, x):
        result = run(model, x)
        for _, _, _, delta in iter_deltas(model):
            delta.values.grad[:2] = delta.values.grad[:2].flip(0).clone()
        return result

    with pytest.raises(AssertionError, match="gradient of default"):
        assert_matches(model, x, compute, mode=exchanged)


def test_the_oracle_notices_a_product_in_another_dtype(monkeypatch):
    """Planted bug: a float32 layer that computes in bfloat16."""
    monkeypatch.setattr(QuantizedLinear, "compute_dtype", lambda self, x: BF16)
    with pytest.raises(AssertionError, match="output"):
        assert_matches(*make("nf4"))


def test_a_copy_trains_on_its_own():
    model, x, compute = make("nf4, double")
    twin = copy.deepcopy(model)
    for _, _, _, delta in iter_deltas(twin):
        delta.values.data *= 2
    assert_matches(model, x, compute)
    assert_matches(twin, x, compute)
    assert not torch.equal(model(x), twin(x))
