"""The kernels in C++: products by parts, what is up to date, and how they are compiled and found."""

from __future__ import annotations

import multiprocessing
import stat
import time
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse import RandConfig, iter_deltas, resident
from peft_sparse.composition.combine import combine
from peft_sparse.core.backends import native, prepared_calls, reference
from peft_sparse.core.delta import SparseDelta
from peft_sparse.core.few_rows import FEW_ROWS, Parts, add_parts_, most_rows
from peft_sparse.core.indices import union
from peft_sparse.core.overlay import Overlay
from peft_sparse.errors import SelectionError
from peft_sparse.optim import sm3
from peft_sparse.selection.top_k import top_k
from tests.support.ops import make_case, sampled_product, sparse_linear, support
from tests.support.oracle import relative_error

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler")


@pytest.fixture(params=["portable", "best"])
def kernels(request, monkeypatch):
    found = native.compiled()
    if found is None:
        pytest.skip("no C++ compiler")
    if request.param == "portable":
        monkeypatch.setattr(found, "level", 0)
    return found


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestProductByParts:
    @pytest.mark.parametrize("fan_in_fan_out", [False, True])
    @pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_against_float64(self, kernels, dtype, rows, fan_in_fan_out):
        shape = (33, 70) if fan_in_fan_out else (70, 33)
        weight, x = random(*shape, dtype=dtype), random(rows, 33, dtype=dtype, seed=1)
        values, indices = random(300, seed=2) / 100, support(33 * 70, 300)
        base = x @ (weight if fan_in_fan_out else weight.t())
        found = add_parts_(base, x, Parts(weight, indices, values), fan_in_fan_out=fan_in_fan_out)
        tuned = reference.tuned_weight(weight, [(values, indices)])
        dense = x @ (tuned if fan_in_fan_out else tuned.t())
        exact = x.double() @ (tuned.double() if fan_in_fan_out else tuned.double().t())
        assert relative_error(found, exact) <= 2 * relative_error(dense, exact)

    def test_nan_of_a_value_reaches_its_output_alone(self, kernels):
        weight, indices = torch.ones(8, 8), torch.tensor([9, 20], dtype=torch.int32)
        values = torch.tensor([float("nan"), 1.0])
        y = add_parts_(torch.zeros(3, 8), torch.ones(3, 8), Parts(weight, indices, values), fan_in_fan_out=False)
        assert y.isnan().nonzero().tolist() == [[n, 1] for n in range(3)]
        assert torch.equal(y[:, 2], torch.ones(3))

    @pytest.mark.parametrize("make", [lambda: nn.Linear(160, 130), lambda: Conv1D(130, 160)], ids=["linear", "conv1d"])
    @pytest.mark.parametrize("rows", [1, 5])
    def test_a_layer_gives_outputs_and_gradients_of_the_weight(self, monkeypatch, make, rows):
        if native.compiled() is None:
            pytest.skip("no C++ compiler")
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(make()), RandConfig(density=0.01, target_modules=["0"], init_weights=False)
        )
        values = next(iter_deltas(model))[3].values
        x = torch.randn(rows, 160, requires_grad=True)
        added = []
        by_kernel = prepared_calls.SparseProduct.add_
        count = lambda self, *args, **kwargs: added.append(1) or by_kernel(self, *args, **kwargs)  # noqa: E731
        monkeypatch.setattr(prepared_calls.SparseProduct, "add_", count)

        def outcome():
            y = model(x)
            (y * torch.arange(y.numel()).view_as(y)).sum().backward()
            found = [y.detach(), x.grad, values.grad]
            x.grad = values.grad = None
            with torch.no_grad():
                return [*found, model(x)]

        by_parts = outcome()
        assert len(added) == 3  # forward, gradient of the input, and the forward that records nothing
        monkeypatch.setattr(native, "_found", [None])
        for one, other in zip(by_parts, outcome(), strict=True):
            assert relative_error(one, other.double()) < 1e-6
        assert len(added) == 3


class TestMostRows:
    def test_more_rows_for_larger_and_sparser_weights_and_fewer_in_bfloat16(self):
        def rows(size, density, dtype=torch.float32):
            return most_rows(int(size * size * density), (size, size), dtype=dtype)

        assert rows(64, 0.01) == 0 < rows(512, 0.01) < rows(1024, 0.01) < rows(2048, 0.01) <= FEW_ROWS
        assert rows(2048, 0.3) < rows(2048, 0.05) < rows(2048, 0.01)
        assert rows(8192, 0.001) == FEW_ROWS
        assert rows(2048, 0.01, torch.bfloat16) == 32 >= rows(512, 0.01, torch.bfloat16) > 0
        assert rows(512, 0.9) <= 16


class TestUpToDate:
    @pytest.mark.parametrize("by_kernels", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("num_deltas", [1, 2])
    def test_writes_what_the_plain_way_writes_and_only_what_changed(self, monkeypatch, by_kernels, dtype, num_deltas):
        if not by_kernels:
            monkeypatch.setattr(native, "_found", [None])
        supports = [support(400, 60, seed=i) for i in range(num_deltas)]
        values = [random(60, seed=i) for i in range(num_deltas)]
        values[0][3] = float("nan")
        overlay, own = Overlay(supports), random(400, dtype=dtype, seed=7)
        flat, originals = own.clone(), own[overlay.indices]
        overlay.write_(flat, values, originals=originals)
        wanted = own.clone()
        wanted[overlay.indices] = overlay.entries(originals, values)
        torch.testing.assert_close(flat, wanted, rtol=0, atol=0, equal_nan=True)
        version = flat._version
        overlay.write_(flat, values, originals=originals)
        assert flat._version == version
        values[-1][5] += 1
        overlay.write_(flat, values, originals=originals)
        wanted[overlay.indices] = overlay.entries(originals, values)
        torch.testing.assert_close(flat, wanted, rtol=0, atol=0, equal_nan=True)

    @pytest.fixture(params=[True, False], ids=["kernels", "torch"])
    def model(self, request, monkeypatch):
        if not request.param:
            monkeypatch.setattr(native, "_found", [None])
        torch.manual_seed(0)
        config = RandConfig(density=0.1, target_modules=["0", "1"], init_weights=False)
        return get_peft_model(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)), config).eval()

    @torch.no_grad()
    def test_every_way_to_change_values_is_seen(self, model):
        x, (_, layer, _, delta) = torch.randn(3, 30), next(iter_deltas(model))
        other = torch.full_like(delta.values, 0.5)

        def by_swap():
            delta.values.data = delta.values.data + 1

        def by_support():
            delta.set_support(delta.indices.flip(0).sub(599).neg(), other)

        changes = [
            lambda: delta.values.data.mul_(3),
            lambda: delta.values.data[-1:].add_(1),
            lambda: delta.values.mul_(2),
            lambda: delta.values.detach().numpy().__setitem__(0, 9.0),
            by_swap,
            by_support,
        ]
        with resident(model):
            for change in changes:
                before = model(x)
                change()
                found = model(x)
                weight = layer.get_base_layer().weight.detach().clone()
                layer.restore()
                expected = layer.get_base_layer().weight.view(-1).clone()
                expected[delta.indices.long()] += delta.values
                assert torch.equal(weight.view(-1), expected)
                assert not torch.equal(before, found)

    @torch.no_grad()
    def test_a_weight_that_is_replaced_by_data_gets_the_deltas_again(self, model):
        x, layer = torch.randn(3, 30), model.base_model.model[0]
        weight = layer.get_base_layer().weight
        with resident(model):
            expected = model(x)
            standing = weight.detach().clone()
            weight.data.zero_()
            model(x)
            where = next(iter_deltas(model))[3].indices.long()
            assert torch.equal(weight.view(-1)[where], standing.view(-1)[where])
            weight.data.copy_(standing)
            assert torch.equal(model(x), expected)

    @torch.no_grad()
    def test_nothing_is_written_where_nothing_changed(self, model, monkeypatch):
        x, layer = torch.randn(3, 30), model.base_model.model[0]
        with resident(model):
            expected = model(x)
            monkeypatch.setattr(type(layer), "write_entries", None)
            assert torch.equal(model(x), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("is_resident", [True, False])
    def test_values_of_another_length_are_an_error_and_read_no_other_memory(self, model, is_resident):
        x, (_, _, _, delta) = torch.randn(3, 30), next(iter_deltas(model))
        with resident(model) if is_resident else nullcontext():
            model(x)
            delta.values.data = torch.zeros(3)
            with pytest.raises((RuntimeError, IndexError)):
                model(x)
            delta.values.data = torch.zeros(delta.indices.numel())

    @torch.no_grad()
    def test_hooks_on_the_base_layer_run_once(self, model):
        called = []
        handle = model.base_model.model[0].get_base_layer().register_forward_hook(lambda *_: called.append(1))
        with resident(model):
            model(torch.randn(3, 30))
        assert called == [1]
        handle.remove()

    @torch.no_grad()
    def test_a_delta_that_grows_from_nothing_takes_part(self, model):
        x, (_, _, _, delta) = torch.randn(3, 30), next(iter_deltas(model))
        indices, values = delta.indices.clone(), delta.values.detach().clone()
        with resident(model):
            expected = model(x)
            delta.set_support(indices[:0])
            model(x)
            delta.set_support(indices, values)
            assert torch.equal(model(x), expected)

    @torch.no_grad()
    def test_switching_inside_a_block(self, model):
        x = torch.randn(3, 30)
        model.add_adapter("other", RandConfig(density=0.2, target_modules=["0"], init_weights=False, seed=4))
        expected = {}
        for names in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(names)
            expected[str(names)] = model(x)
        with resident(model):
            for names in ("other", "default", ["default", "other"], "other"):
                model.base_model.set_adapter(names)
                torch.testing.assert_close(model(x), expected[str(names)])
                assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("num", [2, 5, 17])
def test_merging_sorted_lists_changes_no_bit_of_sums_and_unions(monkeypatch, num, wide):
    counts = [0, 300, 1, 900, 40, *[50] * 12][:num] if num > 2 else [300, 900]
    supports = [support(4000, count, seed=i) for i, count in enumerate(counts)]
    supports = [s.long() for s in supports] if wide else supports
    values = [random(count, seed=i) * 10.0 ** (i % 5 - 2) for i, count in enumerate(counts)]
    values[-1][0] = float("inf")
    deltas = [SparseDelta(s, v, (40, 100)) for s, v in zip(supports, values, strict=True)]
    factors = [(-1.0) ** i * (0.3 + i) for i in range(num)]
    found, united = combine(deltas, factors, "linear"), union(supports)
    monkeypatch.setattr(native, "_found", [None])
    expected = combine(deltas, factors, "linear")
    assert torch.equal(found.indices, expected.indices)
    assert found.indices.dtype == expected.indices.dtype
    assert torch.equal(found.values.view(torch.int32), expected.values.view(torch.int32))
    assert torch.equal(united, union(supports))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moving_entries(dtype):
    flat, overlay = random(500, dtype=dtype), Overlay([support(500, 120)])
    taken, other = overlay.take(flat), flat.clone()
    assert torch.equal(taken, flat[overlay.indices])
    overlay.put_(other, taken.flip(0))
    expected = flat.clone()
    expected[overlay.indices] = taken.flip(0)
    assert torch.equal(other, expected)


@needs_compiler
class TestBuild:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(native, "_found", [])
        # The real thing takes seconds: what is tested here is where it goes.
        monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O0"))
        return tmp_path / "peft_sparse"

    def test_one_file_of_the_users_own(self, cache, caplog):
        caplog.set_level("INFO", logger=native.__name__)
        assert native.compiled() is not None
        (library,) = cache.iterdir()
        for path in (cache, library):
            assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        assert len(caplog.records) == 1
        assert str(library) in caplog.text
        # Found again, not compiled.
        native._found.clear()
        when = library.stat().st_mtime_ns
        assert native.compiled() is not None
        assert library.stat().st_mtime_ns == when

    @pytest.mark.parametrize("who", ["everybody", "a link"])
    def test_a_folder_that_others_control_is_refused(self, cache, caplog, who, tmp_path):
        if who == "everybody":
            cache.mkdir()
            cache.chmod(0o777)
        else:
            (tmp_path / "elsewhere").mkdir()
            cache.symlink_to(tmp_path / "elsewhere")
        assert native.compiled() is None
        assert "others can write into it" in caplog.text

    def test_a_compiler_that_fails_leaves_nothing(self, cache, caplog, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "_SOURCE", tmp_path / "broken.cpp")
        (tmp_path / "broken.cpp").write_text("#error on purpose")
        assert native.compiled() is None
        assert "on purpose" in caplog.text
        assert native.SWITCH in caplog.text
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("why", ["switch", "no compiler"])
    def test_does_without(self, cache, monkeypatch, why):
        if why == "switch":
            monkeypatch.setenv(native.SWITCH, "0")
        else:
            monkeypatch.setenv("CXX", "no-such-compiler")
        assert native.compiled() is None
        assert not cache.exists()
        case = make_case()
        sparse_linear(case).backward(case.output_grad)
        flat = case.output_grad.reshape(-1, 24)
        expected = reference.sampled_product(flat, case.x.reshape(-1, 20), case.indices[0], (24, 20))
        torch.testing.assert_close(case.values[0].grad, expected, rtol=1e-5, atol=1e-5)

    def test_several_processes_at_once_and_one_killed(self, cache):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        both = [context.Process(target=_compile_and_tell, args=(queue,)) for _ in range(2)]
        killed = context.Process(target=_compile_and_tell, args=(queue,))
        for process in (killed, *both):
            process.start()
        while not cache.exists() or not list(cache.iterdir()):
            time.sleep(0.01)
        killed.kill()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert len([path for path in cache.iterdir() if path.suffix == ".so"]) == 1
        assert native.compiled() is not None


def _compile_and_tell(queue):
    queue.put(native.compiled().level)


def test_a_shifted_support_would_be_noticed(monkeypatch):
    if native.compiled() is None:
        pytest.skip("no C++ compiler")
    sampled = native.Kernels.sampled

    def shifted(self, left, right, supports, **packed):
        return sampled(self, left, right, [(s + 1).clamp(max=479) for s in supports], **packed)

    monkeypatch.setattr(native.Kernels, "sampled", shifted)
    grad, x, indices = random(40, 24), random(40, 20, seed=1), support(480, 60)
    found = sampled_product(grad, x, indices, (24, 20))
    assert relative_error(found, reference.sampled_product(grad, x, indices, (24, 20)).double()) > 0.1


def test_threads_share_the_work(monkeypatch):
    if native.compiled() is None:
        pytest.skip("no C++ compiler")
    grad, x, indices = random(1100, 300), random(1100, 200, seed=1), support(60000, 9000)
    alone = sampled_product(grad, x, indices, (300, 200))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = sampled_product(grad, x, indices, (300, 200))
    exact = reference.sampled_product(grad.double(), x.double(), indices, (300, 200))
    assert relative_error(alone, exact) < 1e-6
    assert relative_error(together, exact) < 1e-6
    assert not torch.equal(alone, together)  # the sums were really parted


class TestAbove:
    @pytest.mark.parametrize("by_kernels", [True, False])
    def test_top_k_of_many_is_that_of_a_sort(self, monkeypatch, by_kernels):
        if not by_kernels:
            monkeypatch.setattr(native, "_found", [None])
        scores = random(2**18 + 5).mul(50).round().view(3, -1)
        found = top_k(scores, 3000, name="scores")
        wanted = scores.flatten().sort(descending=True, stable=True).indices[:3000].sort().values
        assert torch.equal(found.long(), wanted)
        scores[1, 7] = float("nan")
        with pytest.raises(SelectionError, match="scores of scores contain NaN"):
            top_k(scores, 3000, name="scores")

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_finds_what_reaches_the_threshold(self, kernels, dtype):
        scores = random(1000)
        scores[[3, 500]] = 1.25
        where, values = kernels.above(scores, 1.25, at_most=1000, dtype=dtype)
        assert torch.equal(where, (scores >= 1.25).nonzero().squeeze(1).to(dtype))
        assert torch.equal(values, scores[where.long()])
        assert kernels.above(scores, 1.25, at_most=where.numel(), dtype=dtype) is not None
        assert kernels.above(scores, 1.25, at_most=where.numel() - 1, dtype=dtype) is None
        scores[999] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            kernels.above(scores, 1.25, at_most=1000, dtype=dtype)


class TestCovers:
    @pytest.mark.parametrize("wide", [False, True])
    def test_against_float64_and_the_plain_way(self, monkeypatch, kernels, wide):
        indices = support(40 * 30, 300)
        indices = indices.long() if wide else indices.int()
        own = [random(40, seed=1).abs(), random(30, seed=2).abs()]
        plain, exact = [t.clone() for t in own], [t.double() for t in own]
        for step in range(4):
            gradient = random(300, seed=10 + step)
            fast = sm3.accumulate(gradient, *own, indices)
            with monkeypatch.context() as patch:
                patch.setattr(native, "_found", [None])
                slow = sm3.accumulate(gradient, *plain, indices)
                wanted = sm3.accumulate(gradient.double(), *exact, indices)
            for found, other, oracle in zip((fast, *own), (slow, *plain), (wanted, *exact), strict=True):
                torch.testing.assert_close(found.double(), oracle, rtol=1e-6, atol=0)
                torch.testing.assert_close(found, other, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("where", ["gradient", "accumulator"])
    def test_a_nan_goes_where_the_plain_way_lets_it_go(self, monkeypatch, kernels, where):
        def outcome():
            rows, columns, gradient = torch.ones(4), torch.ones(5), torch.ones(6)
            (gradient if where == "gradient" else columns)[2] = float("nan")
            sm3.accumulate_all([(gradient, rows, columns, torch.arange(0, 18, 3).int())])
            return rows, columns

        found = outcome()
        monkeypatch.setattr(native, "_found", [None])
        for one, other in zip(found, outcome(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert any(tensor.isnan().any() for tensor in found)

    @pytest.mark.parametrize("beyond", [20, -21])
    def test_an_index_beyond_the_matrix_is_never_written(self, kernels, beyond):
        rows, columns = torch.zeros(4), torch.zeros(5)
        indices = torch.tensor([3, beyond], dtype=torch.int32)
        assert kernels.cover_([(torch.ones(2), rows, columns, indices, None)]) == 0
        assert not rows.any()
        assert not columns.any()

    def test_indices_in_any_order(self, kernels):
        rows, columns, order = torch.rand(4), torch.rand(5), torch.tensor([19, 3, 7, 18, 0, 4])
        own = [rows.clone(), columns.clone()]
        estimate = sm3.accumulate(order.float(), rows, columns, order)
        where = order.argsort()
        assert torch.equal(sm3.accumulate(order[where].float(), *own, order[where]), estimate[where])
        assert torch.equal(own[0], rows)
        assert torch.equal(own[1], columns)


class TestKeepAndWrite:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("wide", [False, True])
    def test_writes_what_an_overlay_writes_and_puts_it_back(self, kernels, dtype, wide):
        weights = [random(400, dtype=dtype, seed=i) for i in range(3)]
        places = [support(400, size, seed=size) for size in (60, 0, 90)]
        places = [place.long() if wide else place.int() for place in places]
        values = [random(place.numel(), seed=place.numel()) for place in places]
        before, wanted = [weight.clone() for weight in weights], []
        for weight, place, value in zip(weights, places, values, strict=True):
            copy = weight.clone()
            Overlay([place]).write_(copy, [value])
            wanted.append(copy)
        kept = [torch.empty(place.numel(), dtype=dtype) for place in places]
        pieces = list(zip(weights, places, kept, values, strict=True))
        assert kernels.keep_and_write_(pieces)
        assert all(torch.equal(one, other) for one, other in zip(weights, wanted, strict=True))
        kernels.write_back_([(weight, place, own, None) for weight, place, own, _ in pieces])
        assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
    def test_tells_what_is_not_finite(self, kernels, value):
        flat, kept = torch.full((8,), 3.4e38), torch.empty(1)
        values = torch.tensor([value])
        assert not kernels.keep_and_write_([(flat, torch.tensor([5], dtype=torch.int32), kept, values)])
        assert kept.tolist() == flat[:1].tolist()
