"""Which calls of optimizers update an adapter: several optimizers may share it, and some calls update nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import ref

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ...core.sharded import is_sharded, whole
from ...errors import ConfigError
from ...optim.step_watch import Step, all_parameters
from ...tuners.sparse_ft.layers.delta import AdapterDelta


class Updates:
    """Tells when an update of one adapter is complete: every tensor that has a gradient was stepped on once.

    One optimizer, several, or one for each tensor that steps within the backward pass come out the same.

    Args:
        adapter_name: the adapter, for messages.
        deltas: {parameter name: delta}.
    """

    def __init__(self, adapter_name: str, deltas: Mapping[str, AdapterDelta]) -> None:
        self._adapter_name = adapter_name
        self._deltas = deltas
        # Tensors that were stepped on in the update that is under way.
        self._stepped: set[str] = set()
        # Tensors with a gradient that nothing steps on, and those of them that something stepped on later.
        self._left_out: set[str] = set()
        self._were_left_out: set[str] = set()
        self._optimizers: list[ref[Optimizer]] = []
        self._before: dict[int, tuple[str, int, Tensor]] = {}

    # ---- one step --------------------------------------------------------------------------------

    def before(self, step: Step) -> bool:
        """A step begins. Returns whether the update before it was complete without anybody noticing.

        Raises:
            ConfigError: optimizers share the adapter, and do not step equally often.
        """
        names = self._held_by(step)
        for name in names[:1]:
            values = self._deltas[name].held_values
            if not is_sharded(values):
                self._before[id(step.optimizer)] = name, values._version, values.detach().clone()
        if self._stepped.isdisjoint(names):
            return False
        waiting = self._waiting()
        if waiting & self._were_left_out:
            raise ConfigError(
                f"the optimizers that share adapter {self._adapter_name!r} do not step equally often: "
                f"{len(self._stepped)} of its tensors were updated twice while {len(waiting)} waited. SpIEL counts an "
                "update when all tensors with a gradient were stepped on. Step every optimizer once per update, or use "
                "one optimizer with several param_groups."
            )
        self._left_out |= waiting
        self._stepped.clear()
        return True

    def after(self, step: Step, *, is_active: bool) -> list[str]:
        """A step ended. Returns the tensors that it updated.

        Args:
            step: the step.
            is_active: whether the adapter takes part in the model's forward now.
        """
        optimizer = step.optimizer
        before = self._before.pop(id(optimizer), None)
        held = {id(delta.held_values) for delta in self._deltas.values()}
        if any(id(p) in held for p in all_parameters(optimizer)):
            self._remember(optimizer)
        names = [name for name in self._held_by(step) if self._deltas[name].held_values.grad is not None]
        if not names or not _updated_anything(optimizer, self._deltas, before):
            return []
        # Zeros in place of None are left of an earlier turn; an adapter that was switched off since may have more.
        names = [name for name in names if (is_active and self._is_trained(name)) or self._has_gradient(name)]
        if names and self._left_out.issuperset(names):
            # They are stepped on after all, by an optimizer of their own.
            self._were_left_out |= set(names)
            self._left_out.difference_update(names)
        else:
            self._left_out.difference_update(names)
            self._stepped.update(names)
        return names

    def is_complete(self) -> bool:
        """Whether all that has a gradient was stepped on; if so, the next update begins."""
        if not self._stepped or self._waiting():
            return False
        self._were_left_out -= self._stepped
        self._stepped.clear()
        return True

    def waits(self, name: str) -> bool:
        """Whether a tensor has a gradient that an optimizer has still to use, or none ever will."""
        return name in self._left_out and self._deltas[name].held_values.grad is not None

    # ---- who holds what --------------------------------------------------------------------------

    def optimizers_of(self, values: Tensor) -> list[Optimizer]:
        """The optimizers that stepped on some values: several where one is built around another."""
        return [optimizer for optimizer in self.optimizers() if any(p is values for p in all_parameters(optimizer))]

    def optimizers(self) -> list[Optimizer]:
        """All optimizers that stepped on the adapter's values."""
        return [optimizer for held in self._optimizers if (optimizer := held()) is not None]

    def _remember(self, optimizer: Optimizer) -> None:
        if any(held() is optimizer for held in self._optimizers):
            return
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                f"LBFGS cannot train adapter {self._adapter_name!r}: its history belongs to all parameters together "
                "and cannot follow a weight to another place. SparseAdamW, SM3, torch.optim's other optimizers and "
                "bitsandbytes' can; RandConfig trains under LBFGS."
            )
        self._optimizers = [held for held in self._optimizers if held() is not None] + [ref(optimizer)]

    def _held_by(self, step: Step) -> list[str]:
        names = {id(delta.held_values): name for name, delta in self._deltas.items()}
        return [names[id(p)] for p in step.parameters() if id(p) in names]

    def _waiting(self) -> set[str]:
        return {
            name
            for name, delta in self._deltas.items()
            if name not in self._stepped
            and name not in self._left_out
            and delta.held_values.grad is not None
            and delta.held_values.numel()
            and self._is_trained(name)
        }

    def _is_trained(self, name: str) -> bool:
        return self._deltas[name].held_values.requires_grad

    def _has_gradient(self, name: str) -> bool:
        return bool(whole(self._deltas[name].held_values.grad).any())


def _updated_anything(
    optimizer: Optimizer, deltas: Mapping[str, AdapterDelta], before: tuple[str, int, Tensor] | None
) -> bool:
    """Whether a step that has ended made an update, and did not skip it."""
    overflow = getattr(optimizer, "found_inf", None)
    if overflow is not None and bool(torch.as_tensor(overflow).any()):
        return False  # a fused optimizer under a GradScaler looks at this itself
    if before is None:
        return True
    name, version, values = before
    held = deltas[name].held_values
    if held._version != version or held.grad is None or not bool(held.grad.any()):
        return True
    is_still = any(not group["lr"] for group in optimizer.param_groups if any(p is held for p in group["params"]))
    return is_still or held.shape != values.shape or not torch.equal(held.detach(), values)


def first_not_finite(deltas: Mapping[str, AdapterDelta], names: Iterable[str]) -> str | None:
    """The first of some tensors whose gradient holds NaN or infinity; None if there is none.

    Gradients that FSDP2 has sharded are left out: each process sees a part of them.
    """
    named = [(name, deltas[name].held_values.grad) for name in names]
    whole_ones = [(name, grad) for name, grad in named if grad is not None and grad.numel() and not is_sharded(grad)]
    if not whole_ones:
        return None
    device = whole_ones[0][1].device
    # Norms of finite numbers may overflow, but those of others are never finite.
    norms = torch._foreach_norm([grad for _, grad in whole_ones])
    if bool(torch.stack([norm.to(device, torch.float64) for norm in norms]).isfinite().all()):
        return None
    finite = torch.stack([torch.isfinite(grad).all().to(device) for _, grad in whole_ones])
    return None if bool(finite.all()) else whole_ones[int((~finite).int().argmax())][0]
