"""The sampled product against its twin and a plain loop, the rule that chooses it, and the shared transposes."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_sparse.core import ops
from peft_sparse.core.backends import native, reference, sddmm
from tests.support.ops import Case, make_case, sampled_product, sparse_linear, support
from tests.support.oracle import relative_error


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no compiler is."""
    monkeypatch.setattr(native, "_found", [None])


@pytest.fixture(params=["torch", "portable", "best"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """torch's kernel, or ours for any processor, or for this one."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_found", [None])
    elif native.compiled() is None:
        pytest.skip("no C++ compiler")
    elif request.param == "portable":
        monkeypatch.setattr(native.compiled(), "level", 0)
    return request.param


def factors(num_rows: int, *, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    generator = torch.Generator().manual_seed(num_rows)
    grad = torch.randn(num_rows, 24, generator=generator).to(dtype)
    x = torch.randn(num_rows, 20, generator=generator).to(dtype)
    return grad, x, ((20, 24) if transposed else (24, 20))


@pytest.mark.usefixtures("way")
class TestSampledProduct:
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("count", [0, 1, 37, 480])
    @pytest.mark.parametrize("num_rows", [0, 1, 33, sddmm._BLOCK_ROWS, sddmm._BLOCK_ROWS + 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_equals_its_twin(self, dtype, num_rows, count, transposed):
        grad, x, shape = factors(num_rows, dtype=dtype, transposed=transposed)
        indices = support(480, count)
        found = sampled_product(grad, x, indices, shape, transposed=transposed)
        expected = reference.sampled_product(grad.double(), x.double(), indices, shape, transposed=transposed)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.shape == (count,)
        if count and num_rows:
            # Relative to the size of such sums, for a single one may happen to be near zero.
            error = (found.double() - expected).square().mean().sqrt() / num_rows**0.5
            assert error < (1e-14 if dtype == torch.float64 else 1e-6)
        else:
            assert torch.equal(found, torch.zeros_like(found))

    @pytest.mark.parametrize("transposed", [False, True])
    def test_twin_equals_a_loop(self, transposed):
        grad, x, shape = factors(3, dtype=torch.float64, transposed=transposed)
        indices = support(480, 9)
        expected = []
        for flat in indices.tolist():
            row, column = divmod(flat, shape[1])
            o, i = (column, row) if transposed else (row, column)
            expected.append(sum(float(grad[n, o]) * float(x[n, i]) for n in range(3)))
        found = reference.sampled_product(grad, x, indices, shape, transposed=transposed)
        assert found.tolist() == pytest.approx(expected, rel=1e-12)

    def test_wide_indices(self):
        grad, x, shape = factors(5, dtype=torch.float32, transposed=False)
        indices = support(480, 40)
        narrow = sampled_product(grad, x, indices, shape)
        assert torch.equal(narrow, sampled_product(grad, x, indices.long(), shape))

    def test_several_supports_share_the_factors(self):
        grad, x, shape = factors(40, dtype=torch.float32, transposed=False)
        supports = [support(480, 40, seed=0), support(480, 0), support(480, 200, seed=1)]
        for sampled in (True, False):
            found = sddmm.weight_gradients(grad, x, supports, shape, sampled=sampled)
            for one, own in zip(found, supports, strict=True):
                expected = reference.sampled_product(grad, x, own, shape)
                torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("sampled", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_neither_product_is_rounded_to_the_dtype_of_the_factors(self, dtype, sampled, transposed):
        grad, x, shape = factors(700, dtype=dtype, transposed=transposed)
        few_rows = support(5 * shape[1], 30) + 2 * shape[1]
        for supports in ([support(480, 60)], [few_rows], [few_rows, support(480, 60)], [None, few_rows]):
            found = sddmm.weight_gradients(grad, x, supports, shape, sampled=sampled, transposed=transposed)
            for one, own in zip(found, supports, strict=True):
                own = torch.arange(480) if own is None else own
                expected = reference.sampled_product(grad.double(), x.double(), own, shape, transposed=transposed)
                assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert relative_error(one, expected) < (1e-14 if dtype == torch.float64 else 2e-6)


def test_first_use_warns_of_nothing(interpreter, monkeypatch):
    # torch warns once per process, so a process of its own.
    script = (
        "import torch\n"
        "from peft_sparse.core.backends.sddmm import weight_gradients\n"
        "import warnings; warnings.simplefilter('error')\n"
        "support = torch.tensor([5], dtype=torch.int32)\n"
        "(found,) = weight_gradients(torch.ones(2, 3), torch.ones(2, 4), [support], (3, 4), sampled=True)\n"
        "assert found.tolist() == [2.0], found\n"
    )
    monkeypatch.setenv(native.SWITCH, "0")
    interpreter.run(script)


class TestRule:
    CPU = torch.device("cpu")

    @pytest.mark.parametrize(
        ("density", "shape", "expected"),
        [
            (0.01, (768, 768), True),
            (0.10, (768, 768), True),
            (0.50, (768, 768), False),
            (1.00, (768, 768), False),
            (0.01, (32, 32), False),
        ],
    )
    def test_choices_on_two_cores(self, density, shape, expected, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        count = int(density * shape[0] * shape[1])
        assert sddmm.prefer_sampled(count, shape, device=self.CPU) is expected

    @pytest.mark.usefixtures("by_torch")
    def test_more_cores_favour_the_dense_product_where_torch_transposes(self, monkeypatch):
        chosen = []
        for threads in (1, 2, 64):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            chosen.append(sddmm.prefer_sampled(5000, (512, 512), device=self.CPU))
        assert chosen == [True, True, False]

    def test_accelerators_take_the_dense_product(self):
        assert not sddmm.prefer_sampled(1, (4096, 4096), device=torch.device("cuda"))

    @pytest.mark.usefixtures("by_torch")
    @pytest.mark.parametrize("choice", [True, False])
    def test_the_rule_is_what_decides(self, choice, monkeypatch):
        monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: choice)
        made = []
        pattern = sddmm._pattern
        monkeypatch.setattr(sddmm, "_pattern", lambda *args: made.append(args) or pattern(*args))
        case = make_case()
        sparse_linear(case).backward(case.output_grad)
        assert bool(made) is choice


@pytest.fixture
def transposed_tensors(monkeypatch: pytest.MonkeyPatch, by_torch: None) -> list[tuple[int, ...]]:
    """Shapes of all matrices that were transposed, with every product sampled."""
    monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: True)
    shapes: list[tuple[int, ...]] = []
    transpose = sddmm._transposed
    monkeypatch.setattr(sddmm, "_transposed", lambda matrix: shapes.append(tuple(matrix.shape)) or transpose(matrix))
    return shapes


def heads(x: Tensor, cases: list[Case]) -> Tensor:
    """Layers that read one input, as q, k and v do, and one number that depends on all."""
    return sum(sparse_linear(replace(case, x=x)).mul(case.output_grad).sum() for case in cases)


def three_cases() -> list[Case]:
    return [make_case(in_features=20, out_features=o, counts=(50,)) for o in (24, 16, 8)]


def gradients(cases: list[Case]) -> list[Tensor]:
    found = [case.values[0].grad for case in cases]
    for case in cases:
        case.values[0].grad = None
    return found


class TestSharedInput:
    def test_three_layers_transpose_their_input_once(self, transposed_tensors):
        cases = three_cases()
        x = torch.randn(33, 20)
        heads(x.view(3, 11, 20), cases).backward()
        assert transposed_tensors.count((33, 20)) == 1
        assert sorted(transposed_tensors) == [(33, 8), (33, 16), (33, 20), (33, 24)]
        for case, found in zip(cases, gradients(cases), strict=True):
            grad = case.output_grad.reshape(33, -1)
            expected = reference.sampled_product(grad, x, case.indices[0], tuple(case.weight.shape))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_under_gradient_checkpointing(self, transposed_tensors, use_reentrant):
        cases = three_cases()
        x = torch.randn(3, 11, 20, requires_grad=True)
        heads(x, cases).backward()
        plain = gradients(cases)
        transposed_tensors.clear()
        checkpoint(lambda x: heads(x, cases), x, use_reentrant=use_reentrant).backward()
        assert transposed_tensors.count((33, 20)) == 1
        assert all(torch.equal(a, b) for a, b in zip(gradients(cases), plain, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_kernels_pack_the_shared_input_once(self, monkeypatch, dtype):
        if native.compiled() is None:
            pytest.skip("no C++ compiler")
        packed = []
        pack = native.Kernels.pack
        monkeypatch.setattr(native.Kernels, "pack", lambda self, m: packed.append(tuple(m.shape)) or pack(self, m))
        monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: True)
        cases = [make_case(in_features=20, out_features=o, counts=(50,), dtype=dtype) for o in (24, 16, 8)]
        x = torch.randn(3, 11, 20).to(dtype)
        for _ in range(2):
            loss = heads(x, cases)
            loss.backward()
        assert packed == [(33, 20)] * 2
        for case, found in zip(cases, gradients(cases), strict=True):
            grad = case.output_grad.reshape(33, -1).double()
            flat, shape = x.view(33, 20).double(), tuple(case.weight.shape)
            expected = reference.sampled_product(grad, flat, case.indices[0], shape)
            assert relative_error(found, 2 * expected) < 1e-6

    def test_two_inputs_are_kept_apart(self, transposed_tensors):
        cases = three_cases()
        first, second = torch.randn(3, 11, 20), torch.randn(3, 11, 20)
        (heads(first, cases) + heads(second, cases)).backward()
        together = gradients(cases)
        assert transposed_tensors.count((33, 20)) == 2
        heads(first, cases).backward()
        heads(second, cases).backward()
        for a, b in zip(together, gradients(cases), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_memory_that_changed_is_transposed_again(self):
        x = torch.randn(5, 3)
        shared = sddmm.SharedInput()
        for _ in range(4):
            shared.join()
        first = shared.transposed(x)[0]
        assert shared.transposed(x)[0] is first
        x.add_(1.0)
        again = shared.transposed(x)[0]
        assert torch.equal(again, x.t())
        assert not torch.equal(first, again)

    def test_input_changed_between_two_layers_is_another_input(self):
        x = torch.randn(5, 3)
        first = sddmm.share_input(x)
        assert sddmm.share_input(x) is first
        x.add_(1.0)
        assert sddmm.share_input(x) is not first

    def test_other_memory_of_the_same_shape_is_transposed_again(self):
        shared = sddmm.SharedInput()
        for _ in range(4):
            shared.join()
        for _ in range(3):
            x = torch.randn(5, 3)
            assert torch.equal(shared.transposed(x)[0], x.t())
            del x

    def test_dropped_after_the_last_reader(self):
        x = torch.randn(5, 3)
        shared = sddmm.SharedInput()
        shared.join()
        shared.join()
        kept = weakref.ref(shared.transposed(x)[0])
        assert kept() is not None
        shared.transposed(x)
        assert kept() is None
        # The next backward through a kept graph starts over.
        kept = weakref.ref(shared.transposed(x)[0])
        assert kept() is not None
        shared.transposed(x)
        assert kept() is None

    @pytest.mark.usefixtures("by_torch")
    def test_dies_with_the_graph_though_the_input_lives(self, monkeypatch):
        monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: True)
        made = []
        blocks = sddmm._transposed_blocks

        def watched(matrix):
            result = blocks(matrix)
            made.extend(weakref.ref(block) for block in result)
            return result

        monkeypatch.setattr(sddmm, "_transposed_blocks", watched)
        cases = three_cases()
        x = torch.randn(3, 11, 20)
        one = sparse_linear(replace(cases[0], x=x))
        other = sparse_linear(replace(cases[1], x=x))
        # Only one of two readers runs, so the transpose waits for the other, until its graph is dropped.
        one.backward(cases[0].output_grad)
        assert [reference() is None for reference in made] == [False]
        del one, other
        gc.collect()
        assert [reference() is None for reference in made] == [True]
        assert torch.isfinite(x).all()

    def test_layers_that_take_the_dense_product_are_not_waited_for(self, monkeypatch):
        cases = three_cases()
        wide = cases[0].weight.shape[0]
        monkeypatch.setattr(sddmm, "prefer_sampled", lambda count, shape, **_: shape[0] != wide)
        x = torch.randn(3, 11, 20)
        outputs = [sparse_linear(replace(case, x=x)) for case in cases]
        shared = outputs[0].grad_fn.next_functions[0][0].shared
        assert all(output.grad_fn.next_functions[0][0].shared is shared for output in outputs)
        for output, case in zip(outputs, cases, strict=True):
            output.backward(case.output_grad)
        assert shared._blocks is None

    def test_threads_do_not_disturb_each_other(self, monkeypatch):
        monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: True)
        cases = three_cases()
        inputs = [torch.randn(3, 11, 20) for _ in range(4)]

        def own(x: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(heads(x, cases), [case.values[0] for case in cases]))

        expected = [own(x) for x in inputs]
        found: list[list[Tensor]] = [[] for _ in inputs]

        def work(position: int) -> None:
            for _ in range(20):
                found[position] = own(inputs[position])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

    def test_one_graph_walked_by_two_threads(self, monkeypatch):
        monkeypatch.setattr(sddmm, "prefer_sampled", lambda *_, **__: True)
        cases = three_cases()
        leaves = [case.values[0] for case in cases]
        loss = heads(torch.randn(3, 11, 20), cases)
        expected = torch.autograd.grad(loss, leaves, retain_graph=True)
        failures: list[str] = []

        def work() -> None:
            for _ in range(20):
                found = torch.autograd.grad(loss, leaves, retain_graph=True)
                if not all(torch.equal(p, q) for p, q in zip(found, expected, strict=True)):
                    failures.append("different gradients")

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_a_stale_transpose_would_be_noticed(self, monkeypatch):
        # The planted bug: a transpose handed out without a look at the memory it was made from.
        def stale(self, x):
            self._blocks = self._blocks or sddmm._transposed_blocks(x)
            return self._blocks

        monkeypatch.setattr(sddmm.SharedInput, "transposed", stale)
        with pytest.raises(AssertionError):
            self.test_memory_that_changed_is_transposed_again()
        with pytest.raises(AssertionError):
            self.test_dropped_after_the_last_reader()


def test_autocast_saves_one_narrow_input_for_all_readers():
    cases = three_cases()
    x = torch.randn(3, 11, 20)
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        outputs = [ops.linear(x, lambda case=case: case.weight, None, case.deltas) for case in cases]
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 3
    inputs = [t for t in saved if t.shape == x.shape]
    assert [t.dtype for t in inputs] == [torch.bfloat16] * 3
    assert len({t.untyped_storage().data_ptr() for t in inputs}) == 1
