"""Means of gradients over a few batches, of a part of a model's tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.sharded import in_several_processes
from ...errors import SelectionError
from ...selection.criteria import MEAN, MEAN_SQUARED, GradientMeans
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from ..distributed import means_over_ranks

# (model, batch) -> loss, a scalar.
LossFunction = Callable[[Any, Any], Tensor]


class GradientSums:
    """Sums over batches of the gradient of one tensor, and of its square (`core.observer.GradientObserver`).

    What the backward passes of one batch give is added up before it is squared: a layer may be called several times,
    and several processes see a share of the batch each.
    """

    def __init__(self, name: str, delta: AdapterDelta, uses: Sequence[str]) -> None:
        self._name = name
        self.delta = delta
        self._uses = uses
        self._current: Tensor | None = None
        self._total: Tensor | None = None
        self._total_squared: Tensor | None = None
        self.was_seen = False

    def wanted(self) -> None:
        """The whole gradient."""

    def receive(self, gradient: Tensor) -> None:
        """Add what one backward pass gave."""
        self.was_seen = True
        self._current = gradient.clone() if self._current is None else self._current.add_(gradient)

    def end_batch(self, batch: str) -> None:
        """Square and add up what the backward passes of a batch gave.

        Args:
            batch: which one, for the message.

        Raises:
            SelectionError: the gradient is not finite, or the processes are in different batches.
        """
        current, self._current = self._current, None
        if in_several_processes():
            own = self._zeros() if current is None else current
            (current,) = means_over_ranks([own], what=f"{self._name} in {batch}")
        if current is None:
            return
        if not bool(torch.isfinite(current).all()):
            raise SelectionError(
                f"the gradient of {self._name} in {batch} holds NaN or infinite values, so it cannot rank weights. "
                "Look at the batch and the loss; under float16 use bfloat16, or select without autocast"
            )
        if MEAN in self._uses:
            self._total = current.clone() if self._total is None else self._total.add_(current)
        if MEAN_SQUARED in self._uses:
            square = current.square_()
            self._total_squared = square if self._total_squared is None else self._total_squared.add_(square)

    def means(self, batches: int) -> GradientMeans:
        """Their means over so many batches, in the tensor's shape; the sums are given up."""

        def mean(total: Tensor | None) -> Tensor:
            return (self._zeros() if total is None else total.div_(batches)).view(self.delta.shape)

        found = GradientMeans(
            mean(self._total) if MEAN in self._uses else None,
            mean(self._total_squared) if MEAN_SQUARED in self._uses else None,
            batches,
        )
        self._total = self._total_squared = None
        return found

    def _zeros(self) -> Tensor:
        return torch.zeros(self.delta.numel, dtype=torch.float32, device=self.delta.indices.device)


def gradient_means(
    model: nn.Module,
    deltas: Mapping[str, AdapterDelta],
    batches: Sequence[Any],
    *,
    uses: Sequence[str],
    loss_fn: LossFunction,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, GradientMeans]]:
    """Average the gradients of some tensors over batches, and leave the model as it was.

    Torch's random generators and the model's buffers (running statistics) are put back afterwards, so that every call
    sees the same dropout. Gradients that parameters hold are kept aside.

    Args:
        model: whose `train` or `eval` mode stays.
        deltas: {parameter name: delta} of these tensors, all of one adapter that is active.
        batches: what `loss_fn` takes.
        uses: which of "mean" and "mean_squared" to compute.
        loss_fn: (model, batch) -> loss.
        on_batch: called after each batch.

    Yields:
        (parameter name, means), in the order of `deltas`; a tensor's sums are freed when it was yielded. A tensor that
        no gradient reached has zeros.

    Raises:
        SelectionError: a gradient is not finite, or none was seen of any tensor.

    Cost: a forward and backward pass per batch; per number of these tensors one float32 number for the batch, and one
        for each of `uses`.
    """
    sums = {name: GradientSums(name, delta, uses) for name, delta in deltas.items()}
    with _left_as_it_was(model), _observed(deltas, sums), torch.enable_grad():
        for number, batch in enumerate(batches, 1):
            loss_fn(model, batch).backward()
            _forget_gradients(model)
            for one in sums.values():
                one.end_batch(f"batch {number} of {len(batches)}")
            on_batch()
    if not any(one.was_seen for one in sums.values()):
        raise SelectionError(
            f"no gradient of {next(iter(sums))} and {len(sums) - 1} more was seen: the loss does not depend on them. "
            "Reentrant gradient checkpointing needs model.enable_input_require_grads()"
        )
    for name in list(sums):
        yield name, sums.pop(name).means(len(batches))


@contextmanager
def _observed(deltas: Mapping[str, AdapterDelta], sums: Mapping[str, GradientSums]) -> Iterator[None]:
    # Of SpIEL, whose window may be open.
    before = {name: delta.observer for name, delta in deltas.items()}
    for name, delta in deltas.items():
        delta.observer = sums[name]
    try:
        yield
    finally:
        for name, delta in deltas.items():
            delta.observer = before[name]


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random generators as they were before, whatever happens."""
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    buffers = [(b, b.detach().clone()) for name, b in model.named_buffers() if "sparse_ft_" not in name]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    _forget_gradients(model)
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            _forget_gradients(model)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for buffer, before in buffers:
                buffer.data.copy_(before)


def _forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
