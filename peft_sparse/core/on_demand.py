"""Tensors that are computed when an operation first needs their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError


class OnDemand(Tensor):
    """Stands for a tensor that is made when an operation needs its numbers, once.

    Models read the weights of their layers mostly for the dtype or the device, which costs nothing here. It has no
    memory of its own: a kernel that went past torch's operations would get an error, and never other numbers. It can
    be read alone, for what is written into it would be lost.

    Args:
        like: has its shape, dtype and device.
        make: gives its numbers, outside of autograd.
        refusal: the error of writing into it.
    """

    _make: Callable[[], Tensor]
    _made: list[Tensor]
    _refusal: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, like: Tensor, make: Callable[[], Tensor], refusal: str, device: torch.device | None = None
    ) -> OnDemand:
        self: OnDemand = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device or like.device
        )
        self._make, self._made, self._refusal = make, [], refusal
        return self

    def made(self) -> Tensor:
        """The numbers, as an ordinary tensor outside of autograd."""
        if not self._made:
            with torch.no_grad():
                self._made.append(self._make().detach())
        return self._made[0]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return OnDemand(args[0], args[0].made, args[0]._refusal)
        kwargs = kwargs or {}
        schema = func._schema
        for i, argument in enumerate(schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(given, OnDemand) and argument.is_write:
                raise ConfigError(given._refusal)
        result = func(*tree_map_only(OnDemand, cls.made, args), **tree_map_only(OnDemand, cls.made, kwargs))
        if any(value.alias_info is not None for value in schema.returns) and isinstance(args[0], OnDemand):
            # A view: what is written into it would be lost as well.
            return tree_map_only(Tensor, lambda view: OnDemand(view, lambda: view, args[0]._refusal), result)
        return result

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(self._refusal)

    requires_grad_ = __setitem__ = _refuse
    data = property(Tensor.detach, _refuse)

    # What reads the memory without an operation. Triton asks for `data_ptr`, safetensors for the storage.
    def data_ptr(self) -> int:
        return self.made().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.made().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        return self.made().numpy(force=force)

    def tolist(self) -> Any:
        return self.made().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.made().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made().__reduce_ex__(protocol)


def on_demand(
    like: Tensor,
    make: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    refusal: str,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """A tensor that is computed when it is needed, with the gradient of what it is computed from.

    Args:
        like: has its shape, dtype and device.
        make: computes it from `leaves` and from what needs no gradient, by differentiable operations; called once if
            its numbers are wanted, and once more in the backward.
        leaves: what may require a gradient.
        refusal: the error of writing into it.
        device: where it will be, if that is another one.

    Cost: nothing until an operation needs the numbers; then what `make` costs, held as long as the tensor is.
    """
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        made: Tensor = _OnDemand.apply(like, make, refusal, device, *leaves)
        return made
    return OnDemand(like, make, refusal, device)


class _OnDemand(torch.autograd.Function):
    """Gives an `OnDemand` tensor its place in the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        like: Tensor,
        make: Callable[[], Tensor],
        refusal: str,
        device: torch.device | None,
        *leaves: Tensor,
    ) -> Tensor:
        # Not by save_for_backward, whose tensors are gone after one pass: reentrant checkpointing makes several through
        # what its segments share, as through any parameter.
        ctx.make, ctx.leaves, ctx.versions = make, leaves, [leaf._version for leaf in leaves]
        return OnDemand(like, make, refusal, device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.leaves
        if [leaf._version for leaf in leaves] != ctx.versions:
            raise RuntimeError(
                "a weight that the model has read, or an adapter's values in it, was written into between the forward "
                "and its backward. Run the backward first."
            )
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            made = ctx.make()
        found = torch.autograd.grad(made, [leaves[i] for i in wanted], grad, create_graph=twice, allow_unused=True)
        grads: list[Tensor | None] = [None] * len(leaves)
        for i, gradient in zip(wanted, found, strict=True):
            grads[i] = gradient
        return None, None, None, None, *grads
