"""`ops.linear` and `ops.scatter` against the dense float64 oracle: outputs and every gradient, in every situation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_sparse.core import ops
from peft_sparse.core.backends import native, reference, sddmm
from peft_sparse.core.overlay import Overlay, add_deltas
from tests.support.ops import Case, check_linear, compare, dense_linear, make_case, run, sparse_linear, support

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SUPPORTS = {"one": (60,), "overlapping": (120, 200, 90), "empty": (0,), "empty and one": (0, 40), "full": (480,)}


@pytest.fixture(params=["sampled", "dense"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both products, whatever the rule would choose."""
    monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: request.param == "sampled")
    return request.param


@pytest.mark.usefixtures("way")
class TestLinear:
    @pytest.mark.parametrize("counts", SUPPORTS.values(), ids=SUPPORTS)
    @pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_output_and_gradients(self, dtype, fan_in_fan_out, counts):
        values_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        case = make_case(dtype=dtype, values_dtype=values_dtype, fan_in_fan_out=fan_in_fan_out, counts=counts)
        check_linear(case)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_values_in_sixteen_bits(self, dtype):
        check_linear(make_case(dtype=dtype, values_dtype=dtype, counts=(60, 30)))

    @pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3, 5), (0,), (2, 0, 3)], ids=str)
    def test_any_leading_dimensions(self, leading):
        check_linear(make_case(leading=leading))

    def test_more_rows_than_one_block(self):
        check_linear(make_case(leading=(2 * sddmm._BLOCK_ROWS + 3,), counts=(60, 30)))

    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    def test_no_bias(self, fan_in_fan_out):
        check_linear(make_case(bias=False, fan_in_fan_out=fan_in_fan_out))

    def test_frozen_bias(self):
        case = make_case()
        case.bias.requires_grad_(False)
        check_linear(case)

    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    def test_input_that_is_not_contiguous(self, fan_in_fan_out):
        case = make_case(leading=(6, 8), fan_in_fan_out=fan_in_fan_out)
        x = case.x.detach().transpose(0, 1).requires_grad_()
        assert not x.is_contiguous()
        check_linear(replace(case, x=x, output_grad=case.output_grad.transpose(0, 1)))

    def test_expanded_output_gradient(self):
        case = make_case(leading=(4, 5))
        grad = torch.tensor(1.5).expand(case.output_grad.shape)
        assert grad.stride() == (0, 0, 0)
        found = []
        for call in (sparse_linear, dense_linear):
            own = case.to(torch.float32, values_dtype=torch.float32)
            call(own).backward(grad)
            found.append({"x": own.x.grad, "values": own.values[0].grad, "bias": own.bias.grad})
        exact = case.to(torch.float64, values_dtype=torch.float64)
        dense_linear(exact).backward(grad.double())
        compare(*found, {"x": exact.x.grad, "values": exact.values[0].grad, "bias": exact.bias.grad})

    def test_frozen_values_beside_trained_ones(self):
        case = make_case(counts=(60, 80), frozen=(0,))
        check_linear(case)
        own = case.to(torch.float32, values_dtype=torch.float32)
        assert "gradient of values 0" not in run(own, sparse_linear)

    def test_gradcheck(self):
        case = make_case(
            leading=(3,), in_features=4, out_features=5, counts=(6, 9), dtype=torch.float64, values_dtype=torch.float64
        )
        overlay = Overlay(case.indices)

        def call(x: Tensor, bias: Tensor, *values: Tensor) -> Tensor:
            deltas = list(zip(values, case.indices, strict=True))
            return ops.linear(x, lambda: overlay.add(case.weight, values), bias, deltas)

        assert torch.autograd.gradcheck(call, (case.x, case.bias, *case.values))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_bit(self, use_reentrant):
        case = make_case(counts=(60, 30))
        plain = run(case.to(torch.float32, values_dtype=torch.float32), sparse_linear)
        own = case.to(torch.float32, values_dtype=torch.float32)

        def call(c: Case) -> Tensor:
            return checkpoint(lambda x: sparse_linear(replace(c, x=x)), c.x, use_reentrant=use_reentrant)

        recomputed = run(own, call)
        assert recomputed.keys() == plain.keys()
        for name, expected in plain.items():
            assert torch.equal(recomputed[name], expected), name

    def test_one_layer_twice_in_a_graph(self):
        case = make_case(in_features=20, out_features=20, counts=(50,))

        def twice(call):
            def composed(c: Case) -> Tensor:
                return call(replace(c, x=torch.tanh(call(c))))

            return composed

        own = case.to(torch.float32, values_dtype=torch.float32)
        twin = case.to(torch.float32, values_dtype=torch.float32)
        exact = case.to(torch.float64, values_dtype=torch.float64)
        compare(run(own, twice(sparse_linear)), run(twin, twice(dense_linear)), run(exact, twice(dense_linear)))

    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    @pytest.mark.parametrize("backward_inside", [False, True])
    def test_autocast(self, fan_in_fan_out, backward_inside):
        case = make_case(fan_in_fan_out=fan_in_fan_out, counts=(60, 30))
        results = []
        for call in (sparse_linear, dense_linear):
            own = case.to(torch.float32, values_dtype=torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = call(own)
                assert output.dtype == torch.bfloat16
                if backward_inside:
                    output.backward(case.output_grad.bfloat16())
            if not backward_inside:
                output.backward(case.output_grad.bfloat16())
            grads = {f"values {i}": v.grad for i, v in enumerate(own.values)}
            results.append({"output": output.detach(), "x": own.x.grad, "bias": own.bias.grad, **grads})
        exact = case.to(torch.float64, values_dtype=torch.float64)
        exact = replace(exact, output_grad=case.output_grad.bfloat16().double())
        output = dense_linear(exact)
        output.backward(exact.output_grad)
        grads = {f"values {i}": v.grad for i, v in enumerate(exact.values)}
        compare(*results, {"output": output.detach(), "x": exact.x.grad, "bias": exact.bias.grad, **grads})

    def test_autocast_leaves_float64_alone(self):
        case = make_case(dtype=torch.float64, values_dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sparse_linear(case).dtype == torch.float64

    def test_backward_twice_through_a_kept_graph(self):
        case = make_case()
        output = sparse_linear(case)
        output.backward(case.output_grad, retain_graph=True)
        first = case.values[0].grad.clone()
        output.backward(case.output_grad)
        assert torch.equal(case.values[0].grad, 2 * first)


class CountingWeight:
    """`make_weight` that counts its calls."""

    def __init__(self, case: Case) -> None:
        self.calls = 0
        self._case = case
        self._overlay = Overlay(case.indices)

    def __call__(self) -> Tensor:
        self.calls += 1
        return self._overlay.add(self._case.weight, self._case.values)


class LargestOutput(TorchDispatchMode):
    """Records the largest tensor that any operation makes; what shares an argument's memory is not made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.layout == torch.strided:
            given = {
                a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and a.layout == torch.strided
            }
            if result.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, result.numel())
        return result


class TestCost:
    def test_first_layer_makes_the_weight_once(self):
        case = make_case()
        make_weight = CountingWeight(case)
        ops.linear(case.x.detach(), make_weight, None, case.deltas).backward(case.output_grad)
        assert make_weight.calls == 1
        assert case.values[0].grad is not None

    def test_inner_layer_makes_the_weight_twice(self):
        case = make_case()
        make_weight = CountingWeight(case)
        ops.linear(case.x, make_weight, None, case.deltas).backward(case.output_grad)
        assert make_weight.calls == 2

    def test_frozen_values_sample_nothing_and_keep_no_input(self, monkeypatch):
        case = make_case(frozen=(0,))
        monkeypatch.setattr(sddmm, "weight_gradients", lambda *_, **__: pytest.fail("sampled for frozen values"))
        saved = saved_by(lambda: sparse_linear(case))
        assert case.x.shape not in [tensor.shape for tensor in saved]
        sparse_linear(case).backward(case.output_grad)
        assert case.x.grad is not None

    def test_no_graph_without_gradients(self):
        case = make_case()
        with torch.no_grad():
            output = sparse_linear(case)
        assert not output.requires_grad
        assert torch.equal(output, sparse_linear(case))

    def test_nothing_of_the_weights_size_is_kept(self):
        case = make_case(leading=(4,), counts=(60, 30))
        make_weight = CountingWeight(case)
        saved = saved_by(lambda: ops.linear(case.x, make_weight, case.bias, case.deltas))
        assert max(tensor.untyped_storage().nbytes() for tensor in saved) < case.weight.untyped_storage().nbytes() / 2
        # The oracle of this test: the plain way does keep the weight.
        plain = saved_by(lambda: F.linear(case.x, make_weight(), case.bias))
        assert any(tensor.numel() == case.weight.numel() for tensor in plain)

    def test_sampled_way_makes_no_dense_gradient(self, monkeypatch):
        case = make_case(leading=(4,), bias=False)
        for sampled in (True, False):
            monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, _way=sampled, **__: _way)
            output = ops.linear(case.x.detach(), CountingWeight(case), None, case.deltas)
            with LargestOutput() as largest:
                output.backward(case.output_grad)
            assert (largest.numel < case.weight.numel()) == sampled


def saved_by(call) -> list[Tensor]:
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call()
    return saved


class TestSafety:
    def test_values_changed_before_the_backward(self):
        case = make_case()
        output = sparse_linear(case)
        with torch.no_grad():
            case.values[0].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward(case.output_grad)

    def test_wrong_dtype_is_told_as_by_torch(self):
        case = make_case(dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            sparse_linear(replace(case, x=case.x.float()))


def test_meta_tensors_pass_through():
    case = make_case()
    x, weight = case.x.detach().to("meta").requires_grad_(), case.weight.to("meta")
    values, indices = case.values[0].detach().to("meta").requires_grad_(), case.indices[0].to("meta")
    output = ops.linear(x, lambda: weight, None, [(values, indices)])
    output.sum().backward()
    assert (output.shape, x.grad.shape, values.grad.shape) == (case.output_grad.shape, x.shape, values.shape)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    @pytest.mark.parametrize("weight_has_gradient", [False, True], ids=["detached weight", "differentiable weight"])
    def test_one_graph_and_the_same_gradients(self, backend, fan_in_fan_out, weight_has_gradient):
        case = make_case(counts=(60, 30), fan_in_fan_out=fan_in_fan_out)
        overlay = Overlay(case.indices)

        def call(x, bias, values):
            deltas = list(zip(values, case.indices, strict=True))

            def make_weight():
                return add_deltas(case.weight, deltas) if weight_has_gradient else overlay.add(case.weight, values)

            return ops.linear(x, make_weight, bias, deltas, fan_in_fan_out=fan_in_fan_out)

        compiled = torch.compile(call, backend=backend, fullgraph=True)
        own = case.to(torch.float32, values_dtype=torch.float32)
        twin = case.to(torch.float32, values_dtype=torch.float32)
        exact = case.to(torch.float64, values_dtype=torch.float64)
        found = run(own, lambda c: compiled(c.x, c.bias, c.values))
        compare(found, run(twin, dense_linear), run(exact, dense_linear))


class TestScatter:
    def test_places_values_and_passes_gradients(self):
        indices = support(24, 7)
        values = torch.randn(7, dtype=torch.float64, requires_grad=True)
        dense = ops.scatter(values, indices, (4, 6), dtype=torch.float64)
        assert torch.equal(dense, reference.scatter(values, indices, (4, 6), dtype=torch.float64))
        assert torch.equal(dense.reshape(-1)[indices.long()], values)
        assert int((dense != 0).sum()) == 7
        assert torch.autograd.gradcheck(lambda v: ops.scatter(v, indices, (4, 6), dtype=torch.float64), (values,))

    def test_empty(self):
        dense = ops.scatter(torch.empty(0), torch.empty(0, dtype=torch.int32), (2, 3), dtype=torch.bfloat16)
        assert torch.equal(dense, torch.zeros(2, 3, dtype=torch.bfloat16))


def rolled_support(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = sddmm._pattern
    monkeypatch.setattr(sddmm, "_pattern", lambda s, shape, dtype: pattern((s + 1).clamp(max=479), shape, dtype))


def swapped_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sddmm.weight_gradients
    monkeypatch.setattr(sddmm, "weight_gradients", lambda g, x, s, shape, **kw: whole(x, g, s, shape, **kw))


def half_precision_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sddmm, "_wide", lambda tensor: tensor.bfloat16().float())


def last_block_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sddmm, "_BLOCK_ROWS", 16)
    blocks = sddmm._transposed_blocks
    monkeypatch.setattr(
        sddmm, "_transposed_blocks", lambda matrix: [*blocks(matrix)[:-1], blocks(matrix)[-1].mul(0.999)]
    )


def weight_without_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Overlay, "add", lambda self, weight, values: weight.detach().clone())


def second_delta_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sddmm.weight_gradients
    monkeypatch.setattr(
        sddmm, "weight_gradients", lambda g, x, s, shape, **kw: [whole(g, x, s, shape, **kw)[0], torch.zeros(80)]
    )


BUGS = [
    rolled_support,
    swapped_factors,
    half_precision_sum,
    last_block_lost,
    weight_without_deltas,
    second_delta_forgotten,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_comparison_notices_a_planted_bug(plant, monkeypatch):
    # The bugs are those of torch's way; test_native.py plants one in ours.
    monkeypatch.setattr(native, "_found", [None])
    monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: True)
    square = make_case(in_features=20, out_features=24, counts=(60, 80))
    if plant is swapped_factors:
        square = make_case(in_features=20, out_features=20, counts=(60, 80))
    check_linear(square)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        check_linear(square)
