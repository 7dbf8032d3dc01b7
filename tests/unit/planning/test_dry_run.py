"""What torch's functions make of tensors without data, asked for again: the same sizes, layouts, dtypes and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_sparse.planning.dry_run import Results

aten = torch.ops.aten


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def whole() -> Tensor:
    return empty(3, 4, dtype=torch.int64)


# Next to each other what differs in one thing alone: a layout, the type of a number, a dtype.
QUESTIONS = {
    "broadcast": lambda: (aten.add.Tensor, [empty(3, 4), empty(4)], {}),
    "of other layout": lambda: (aten.add.Tensor, [empty(4, 3).t(), empty(4)], {}),
    "a whole number": lambda: (aten.mul.Scalar, [whole(), 1], {}),
    "a fraction": lambda: (aten.mul.Scalar, [whole(), 1.0], {}),
    "a half": lambda: (aten.add.Tensor, [empty(3, 4, dtype=torch.float16), empty(4)], {}),
    "by name": lambda: (aten.sum.dim_IntList, [empty(3, 4), [1]], {"dtype": torch.float64}),
    "by another name": lambda: (aten.sum.dim_IntList, [empty(3, 4), [1]], {"keepdim": True}),
    "one axis": lambda: (aten.sum.dim_IntList, [empty(3, 4), [0]], {}),
    "several results": lambda: (aten.native_layer_norm.default, [empty(2, 3, 4), [4], empty(4), empty(4), 1e-5], {}),
    "some results left out": lambda: (
        aten.native_layer_norm_backward.default,
        [empty(3, 4), empty(3, 4), [4], empty(3, 1), empty(3, 1), empty(4), None, [True, False, False]],
        {},
    ),
    "a list": lambda: (aten.cat.default, [[empty(3, 4), empty(2, 4)]], {}),
    "in place": lambda: (aten.mul_.Scalar, [empty(3, 4), 2], {}),
    "in place, another shape": lambda: (aten.t_.default, [empty(3, 4)], {}),
    "a view": lambda: (aten.expand.default, [empty(1, 4), [3, 4]], {}),
    "nothing given": lambda: (aten.ones.default, [[3]], {"device": torch.device("meta")}),
}


def described(result) -> list:
    tensors = result if isinstance(result, tuple) else [result]
    return [
        t if t is None else (t.shape, t.stride(), t.dtype, t.device.type, t.untyped_storage().nbytes()) for t in tensors
    ]


def memory(result) -> int:
    return (result[0] if isinstance(result, tuple) else result).untyped_storage()._cdata


def test_an_answer_that_is_known_is_that_of_torch():
    results = Results()
    for _ in range(3):
        for name, ask in QUESTIONS.items():
            func, args, kwargs = ask()
            expected = described(func(*args, **kwargs))
            given = described(args[0]) if isinstance(args[0], Tensor) else None
            func, args, kwargs = ask()
            found = results.of(func, args, kwargs)
            assert described(found) == expected, name
            if given is not None:
                assert described(args[0]) == given, name
                is_shared = memory(found) == memory(args[0])
                assert is_shared == (name == "a view" or name.startswith("in place")), name


def test_a_result_is_new_each_time():
    results = Results()
    func, args, kwargs = QUESTIONS["broadcast"]()
    one, other = (results.of(func, args, kwargs) for _ in range(2))
    assert memory(one) != memory(other)


def test_the_default_dtype_is_asked_for(request):
    results = Results()
    func, args, kwargs = QUESTIONS["nothing given"]()
    assert results.of(func, args, kwargs).dtype == torch.float32
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    assert results.of(func, args, kwargs).dtype == torch.float64


def test_what_fails_goes_on_failing():
    results = Results()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            results.of(aten.mm.default, [empty(2, 3), empty(2, 3)], {})
