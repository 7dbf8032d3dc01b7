"""Exactly k, whatever the scores: compared with a stable sort."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_sparse.errors import SelectionError
from peft_sparse.selection import top_k as module
from peft_sparse.selection.top_k import joint_top_k, streamed_top_k, top_k


def by_sorting(scores: Tensor, k: int) -> list[int]:
    """The slow twin: a stable sort of the negated scores keeps ties in order."""
    order = np.argsort(-scores.detach().float().reshape(-1).numpy(), kind="stable")
    return sorted(order[:k].tolist())


@pytest.fixture(autouse=True, params=["counted", "sorted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test both ways: small inputs are sorted, large ones counted."""
    monkeypatch.setattr(module, "_SORTED", 0 if request.param == "counted" else 2**16)


@pytest.fixture(params=[2**18, 7])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Once with everything in one chunk, once with many and a partial last one."""
    monkeypatch.setitem(module._CHUNK, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 2, 37, 199, 200])
def test_equals_sorting(dtype: torch.dtype, k: int) -> None:
    scores = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = top_k(scores, k, name="w")
    assert result.dtype == torch.int32
    assert result.tolist() == by_sorting(scores, k)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("k", range(11))
def test_ties_go_to_the_lowest_index(k: int) -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, -0.0, 3.0, 0.0, 1.0, -2.0, -0.0, 0.0, 1.0])
    assert top_k(scores, k, name="w").tolist() == by_sorting(scores, k)


def test_all_tied_in_bfloat16() -> None:
    # What `scores >= threshold` gets wrong: coarse scores tie by the thousand.
    scores = torch.full((1000,), 0.5, dtype=torch.bfloat16)
    assert top_k(scores, 100, name="w").tolist() == list(range(100))


@pytest.mark.usefixtures("chunk")
def test_infinities_and_the_smallest_numbers_have_their_order() -> None:
    inf, tiny = float("inf"), 1e-45
    scores = torch.tensor([-tiny, inf, 0.0, -inf, tiny, 3e38, -3e38])
    order = [1, 5, 4, 2, 0, 6, 3]
    for k in range(8):
        assert top_k(scores, k, name="w").tolist() == sorted(order[:k])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_that_differ_in_one_low_bit(sign: float) -> None:
    base = torch.tensor([1.0]).view(torch.int32)
    scores = (base + torch.randperm(70_000, generator=torch.Generator().manual_seed(1)).int()).view(torch.float32)
    assert top_k(sign * scores, 12_345, name="w").tolist() == by_sorting(sign * scores, 12_345)


def test_not_contiguous_and_requires_grad() -> None:
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).requires_grad_().t()
    assert top_k(scores, 4, name="w").tolist() == by_sorting(scores.detach().clone().contiguous(), 4)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("position", [0, 6, 7, 19])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_refused(position: int, sign: float) -> None:
    scores = torch.zeros(20)
    scores[position] = torch.tensor(sign * float("nan"))
    with pytest.raises(SelectionError, match=r"scores of layer\.w contain NaN.*lower the learning rate"):
        top_k(scores, 0, name="layer.w")


@pytest.mark.parametrize("k", [-1, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(SelectionError, match=rf"{k} weights are asked from layer\.w: ask for 0 to 4"):
        top_k(torch.zeros(4), k, name="layer.w")


def test_integer_scores_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"scores of w must be floating point, got torch\.int64"):
        top_k(torch.zeros(4, dtype=torch.int64), 1, name="w")


def test_min_score_counts_only_what_exceeds_it() -> None:
    scores = torch.tensor([0.0, 0.2, -0.0, 0.1, 0.0])
    assert top_k(scores, 2, name="w", min_score=0.0).tolist() == [1, 3]
    assert top_k(scores, 0, name="w", min_score=0.0).tolist() == []
    with pytest.raises(
        SelectionError, match=r"3 weights are asked from w, but only 2 of 5 moved\. Train longer, use a larger"
    ):
        top_k(scores, 3, name="w", min_score=0.0)
    with pytest.raises(SelectionError, match=r"2 weights are asked from w, but only 1 of 5 scored above 0\.1"):
        top_k(scores, 2, name="w", min_score=0.1)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("k", [0, 1, 9, 40, 61, 62])
def test_joint_equals_the_top_k_of_all_in_a_row(k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    # Rounded, so that there are ties within and between the tensors.
    scores = {
        n: (torch.randn(s, generator=generator) * 3).round() for n, s in {"b": 20, "a": 31, "empty": 0, "c": 11}.items()
    }
    chosen = by_sorting(torch.cat(list(scores.values())), k)
    result = joint_top_k(scores, k)
    assert list(result) == ["b", "a", "empty", "c"]
    offset = 0
    for name, own in scores.items():
        assert result[name].tolist() == [i - offset for i in chosen if offset <= i < offset + own.numel()]
        offset += own.numel()


def test_joint_ties_go_to_the_first_tensor() -> None:
    result = joint_top_k({"z": torch.ones(3), "a": torch.tensor([1.0, 2.0])}, 3)
    assert {name: indices.tolist() for name, indices in result.items()} == {"z": [0, 1], "a": [1]}


def test_joint_errors_name_the_tensors() -> None:
    with pytest.raises(SelectionError, match="scores of second contain NaN"):
        joint_top_k({"first": torch.zeros(2), "second": torch.tensor([float("nan")])}, 1)
    with pytest.raises(SelectionError, match=r"9 weights are asked from first and 1 more: ask for 0 to 3"):
        joint_top_k({"first": torch.zeros(2), "second": torch.zeros(1)}, 9)
    with pytest.raises(SelectionError, match=r"2 weights are asked from first and 1 more, but only 1 of 3 moved"):
        joint_top_k({"first": torch.zeros(2), "second": torch.ones(1)}, 2, min_score=0.0)
    with pytest.raises(SelectionError, match=r"1 weights are asked from no tensor"):
        joint_top_k({}, 1)


def test_lazy_scores_are_computed_three_times_and_never_kept() -> None:
    asked: list[str] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return torch.arange(4.0) + (10 if name == "b" else 0)

        def __iter__(self) -> Iterator[str]:
            return iter(["a", "b"])

        def __len__(self) -> int:
            return 2

    assert {n: i.tolist() for n, i in joint_top_k(Lazy(), 5).items()} == {"a": [3], "b": [0, 1, 2, 3]}
    assert asked == ["a", "b"] * 3


def test_streamed_scores_are_seen_once_and_dropped() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for i in range(20):
            assert all(seen() is None for seen in alive), "a tensor was kept"
            scores = torch.arange(1000.0).roll(i) + i
            alive.append(weakref.ref(scores))
            yield f"p{i}", scores
            del scores

    found = streamed_top_k(stream(), 100)
    expected = joint_top_k({f"p{i}": torch.arange(1000.0).roll(i) + i for i in range(20)}, 100)
    assert len(alive) == 20
    assert {name: indices.tolist() for name, indices in found.items()} == {n: i.tolist() for n, i in expected.items()}


def test_streamed_errors_are_those_of_the_joint_selection() -> None:
    def stream(*scores: float) -> Iterator[tuple[str, Tensor]]:
        for i, score in enumerate(scores):
            yield f"p{i}", torch.tensor([score])

    with pytest.raises(SelectionError, match="scores of p1 contain NaN"):
        streamed_top_k(stream(1.0, float("nan"), 2.0), 1)
    with pytest.raises(SelectionError, match=r"9 weights are asked from p0 and 2 more: ask for 0 to 3"):
        streamed_top_k(stream(0.0, 0.0, 1.0), 9)
    with pytest.raises(SelectionError, match=r"2 weights are asked from p0 and 2 more, but only 1 of 3 moved"):
        streamed_top_k(stream(0.0, 1.0, 0.0), 2, min_score=0.0)
    with pytest.raises(SelectionError, match=r"1 weights are asked from no tensor"):
        streamed_top_k(stream(), 1)
    assert streamed_top_k(stream(), 0) == {}


class LargestNewTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that is made while it is active, views of `known` left out."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_million_scores_in_little_time_and_memory(dtype: torch.dtype) -> None:
    scores = torch.rand(20_000_000, dtype=dtype, generator=torch.Generator().manual_seed(4))
    start = time.process_time()
    with LargestNewTensor(scores) as largest:
        result = top_k(scores, 200_000, name="w", min_score=0.0)
    elapsed = time.process_time() - start
    assert result.numel() == 200_000
    least = float(scores[result.long()].min())
    scores[result.long()] = 0
    assert least >= float(scores.max())
    assert elapsed < 10, f"{elapsed:.1f} s; about 0.2 s on a quiet core"
    # A chunk of 2**18 positions in int64 is the largest intermediate there can be.
    assert 0 < largest.num_bytes <= 2**18 * 8, f"a tensor of {largest.num_bytes} bytes beside the scores"


class TestSelectedByTorch:
    """The way of accelerators, taken on the CPU."""

    @pytest.fixture(autouse=True)
    def _by_torch(self, monkeypatch):
        monkeypatch.setattr("peft_sparse.selection.top_k._SELECTED_BY_TORCH", ("cpu",))
        monkeypatch.setattr("peft_sparse.selection.top_k._SORTED", 0)
        monkeypatch.setattr("peft_sparse.selection.top_k._CHUNK", {"cpu": 700})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("k", [1, 2, 499, 500, 1999, 2000])
    def test_equals_a_stable_sort(self, k, dtype):
        # Few different values and both zeros: ties everywhere.
        scores = torch.randint(-3, 4, (2000,), generator=torch.Generator().manual_seed(k)).to(dtype)
        scores[::7] = -0.0
        scores[5], scores[1500] = float("inf"), -float("inf")
        expected = scores.float().add(0.0).argsort(descending=True, stable=True)[:k].sort().values
        assert top_k(scores, k, name="w").tolist() == expected.tolist()

    def test_nan_is_refused(self):
        scores = torch.zeros(2000)
        scores[7] = float("nan")
        with pytest.raises(SelectionError, match="scores of w contain NaN"):
            top_k(scores, 3, name="w")

    def test_a_lowest_score_is_respected(self):
        scores = torch.zeros(2000)
        scores[:3] = 1.0
        assert top_k(scores, 3, name="w", min_score=0.0).tolist() == [0, 1, 2]
        with pytest.raises(SelectionError, match="only 3 of 2000 moved"):
            top_k(scores, 4, name="w", min_score=0.0)

    def test_it_is_taken(self, monkeypatch):
        monkeypatch.setattr("peft_sparse.selection.top_k._find_threshold", None)
        assert top_k(torch.arange(2000.0), 2, name="w").tolist() == [1998, 1999]


class TestSampledThreshold:
    """What a sample finds first is what counting finds, whatever the scores."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        monkeypatch.setattr(module, "_SAMPLED_FROM", 2**10)
        monkeypatch.setattr(module, "_SAMPLE", 2**8)
        monkeypatch.setattr(module, "_SORTED", 0)
        monkeypatch.setitem(module._CHUNK, "cpu", 700)

    @staticmethod
    def both(scores, k, monkeypatch, **kwargs):
        sampled = joint_top_k(scores, k, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_above_sampled_threshold", lambda *_: None)
            return sampled, joint_top_k(scores, k, **kwargs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("k", [0, 1, 13, 400, 1500, 5000])
    @pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "heavy", "zeros", "periodic", "infinite"])
    def test_same_positions(self, kind, k, dtype, monkeypatch):
        scores = torch.randn(6000, generator=torch.Generator().manual_seed(k))
        if kind == "ties":
            scores = scores.round()
        elif kind == "sorted":
            scores = scores.sort().values
        elif kind == "heavy":
            scores = scores**9
        elif kind == "zeros":
            scores = torch.where(scores > 1.5, scores, -0.0)
        elif kind == "periodic":
            scores[::23] = 100.0
        elif kind == "infinite":
            scores[torch.arange(0, 6000, 11)] = float("inf")
        tensors = {"a": scores[:2500].to(dtype).view(50, 50), "b": scores[2500:].to(dtype)}
        sampled, counted = self.both(tensors, k, monkeypatch)
        assert sum(found.numel() for found in sampled.values()) == k
        for name in tensors:
            assert torch.equal(sampled[name], counted[name])
            assert sampled[name].dtype == counted[name].dtype

    def test_it_is_taken(self):
        scores = {"a": torch.randn(6000, generator=torch.Generator().manual_seed(0))}
        assert module._above_sampled_threshold(scores, 200, None) is not None

    def test_nan_outside_of_the_sample_is_named(self):
        scores = torch.randn(6000, generator=torch.Generator().manual_seed(0))
        scores[1] = float("nan")
        with pytest.raises(SelectionError, match="scores of w contain NaN"):
            top_k(scores, 60, name="w")

    @pytest.mark.parametrize("k", [100, 900])
    def test_a_minimum(self, k, monkeypatch):
        scores = {"w": torch.randn(6000, generator=torch.Generator().manual_seed(0)).sub(1.0).clamp(min=0)}
        eligible = int((scores["w"] > 0).sum())
        sampled, counted = self.both(scores, k, monkeypatch, min_score=0.0)
        assert torch.equal(sampled["w"], counted["w"])
        with pytest.raises(SelectionError, match=f"only {eligible} of 6000 moved"):
            joint_top_k(scores, eligible + 1, min_score=0.0)
