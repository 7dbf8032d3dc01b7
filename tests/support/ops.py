"""Inputs for the operations of `core.ops`, and the comparison with dense float64 and with the dense path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_sparse.core import ops
from peft_sparse.core.backends import reference, sddmm
from peft_sparse.core.overlay import Overlay
from tests.support.oracle import relative_error

# Results that the dense path happens to have exactly may still differ by a rounding of float64.
ROUNDING = 64 * torch.finfo(torch.float64).eps


def support(numel: int, count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:count].sort().values.int()


def sampled_product(
    grad: Tensor, x: Tensor, indices: Tensor, shape: tuple[int, int], *, transposed: bool = False
) -> Tensor:
    """The fast twin of `reference.sampled_product`."""
    return sddmm.weight_gradients(grad, x, [indices], shape, transposed=transposed, sampled=True)[0]


@dataclass(frozen=True)
class Case:
    """One linear layer with deltas. `values` are leaves; those named in `frozen` require no gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    values: Sequence[Tensor]
    indices: Sequence[Tensor]
    output_grad: Tensor
    fan_in_fan_out: bool = False

    def to(self, dtype: torch.dtype, *, values_dtype: torch.dtype) -> Case:
        """The same numbers in other dtypes, as fresh leaves."""

        def leaf(tensor: Tensor, target: torch.dtype) -> Tensor:
            # Through the original's strides, which the tests of non-contiguous input are about.
            return tensor.detach().to(target, copy=True).requires_grad_(tensor.requires_grad)

        return replace(
            self,
            x=leaf(self.x, dtype),
            weight=leaf(self.weight, dtype),
            bias=None if self.bias is None else leaf(self.bias, dtype),
            values=[leaf(v, values_dtype) for v in self.values],
            output_grad=self.output_grad.to(dtype),
        )

    @property
    def deltas(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.values, self.indices, strict=True))


def make_case(
    *,
    out_features: int = 24,
    in_features: int = 20,
    leading: Sequence[int] = (3, 11),
    counts: Sequence[int] = (60,),
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    fan_in_fan_out: bool = False,
    frozen: Sequence[int] = (),
    device: str = "cpu",
) -> Case:
    """A random case. Every tensor is exact in `dtype`, so that the float64 oracle is given the same numbers; those of
    all devices are equal.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, target: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, target)

    shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
    numel = out_features * in_features
    return Case(
        x=random(*leading, in_features).requires_grad_(),
        weight=random(*shape),
        bias=random(out_features).requires_grad_() if bias else None,
        values=[random(k, target=values_dtype).requires_grad_(i not in frozen) for i, k in enumerate(counts)],
        indices=[support(numel, k, seed=i).to(device) for i, k in enumerate(counts)],
        output_grad=random(*leading, out_features),
        fan_in_fan_out=fan_in_fan_out,
    )


def run(case: Case, call: Callable[[Case], Tensor]) -> dict[str, Tensor]:
    """Output and gradients of every leaf."""
    output = call(case)
    output.backward(case.output_grad.to(output.dtype))
    found = {"output": output.detach()}
    leaves = {"x": case.x, "bias": case.bias, **{f"values {i}": v for i, v in enumerate(case.values)}}
    for name, leaf in leaves.items():
        if leaf is not None and leaf.grad is not None:
            found[f"gradient of {name}"] = leaf.grad
    return found


def sparse_linear(case: Case) -> Tensor:
    overlay = Overlay(case.indices)
    return ops.linear(
        case.x,
        lambda: overlay.add(case.weight, case.values),
        case.bias,
        case.deltas,
        fan_in_fan_out=case.fan_in_fan_out,
    )


def dense_linear(case: Case) -> Tensor:
    return reference.linear(
        case.x,
        lambda: reference.tuned_weight(case.weight, case.deltas),
        case.bias,
        case.deltas,
        fan_in_fan_out=case.fan_in_fan_out,
    )


def compare(sparse: dict[str, Tensor], dense: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Same tensors, shapes and dtypes as the dense path; error against float64 at most twice the dense path's."""
    assert sparse.keys() == dense.keys() == exact.keys()
    for name, actual in sparse.items():
        assert actual.shape == dense[name].shape, name
        assert actual.dtype == dense[name].dtype, name
        if actual.numel() == 0:
            continue
        allowed = 2 * relative_error(dense[name], exact[name]) + ROUNDING
        error = relative_error(actual, exact[name])
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def check_linear(case: Case) -> None:
    """`ops.linear` on a case against both twins."""
    values_dtype = case.values[0].dtype if case.values else torch.float32
    own = case.to(case.x.dtype, values_dtype=values_dtype)
    twin = case.to(case.x.dtype, values_dtype=values_dtype)
    exact = case.to(torch.float64, values_dtype=torch.float64)
    compare(run(own, sparse_linear), run(twin, dense_linear), run(exact, dense_linear))
