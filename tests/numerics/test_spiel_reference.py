"""The slow SpIEL itself, and the library's parts put together by hand against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_sparse.core.delta import SparseDelta
from peft_sparse.optim.reindex import GrownGradients, reindex
from peft_sparse.optim.sm3 import SM3
from peft_sparse.optim.sparse_adamw import SparseAdamW
from peft_sparse.selection.momentum import grow_candidates
from peft_sparse.selection.replacement import Candidates, drop_and_grow
from peft_sparse.selection.schedule import Schedule
from peft_sparse.selection.top_k import top_k
from tests.support.spiel_reference import Loss, ReferenceSpiel

SHAPES = {"first": (12, 9), "bias": (12,), "second": (4, 12)}
SUPPORT = {"first": 23, "bias": 5, "second": 11}


def pretrained() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def supports() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randperm(weight.numel(), generator=generator)[: SUPPORT[name]].sort().values.int()
        for name, weight in pretrained().items()
    }


def losses(update: int, *, micro_batches: int) -> list[Loss]:
    generator = torch.Generator().manual_seed(100 + update)

    def loss_of(x: Tensor, y: Tensor) -> Loss:
        def loss(w: dict[str, Tensor]) -> Tensor:
            hidden = torch.tanh(x @ w["first"].T + w["bias"])
            return nn.functional.mse_loss(hidden @ w["second"].T, y) / micro_batches

        return loss

    batches = [
        [torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (9, 4)] for _ in range(micro_batches)
    ]
    return [loss_of(*batch) for batch in batches]


class Held:
    """What an AdapterDelta is to an optimizer."""

    def __init__(self, indices: Tensor, shape: tuple[int, ...]) -> None:
        self.indices, self.shape = indices, shape
        self.values = nn.Parameter(torch.zeros(indices.numel(), dtype=torch.float64))


class Parts:
    """SpIEL from the library's parts, with dense gradients and without its hooks."""

    def __init__(
        self, schedule: Schedule, method: str, drop_by: str, make: Callable[[list[Held]], torch.optim.Optimizer]
    ):
        self.weights = pretrained()
        self.deltas = {name: Held(support, SHAPES[name]) for name, support in supports().items()}
        self.optimizer = make(list(self.deltas.values()))
        self.schedule, self.method, self.drop_by = schedule, method, drop_by
        self.t = 0
        self.before = {name: torch.zeros(d.values.numel(), dtype=torch.float64) for name, d in self.deltas.items()}
        self.candidates: dict[str, Tensor] = {}
        self.seen: dict[str, list[Tensor]] = {}

    def update(self, micro_batches: list[Loss], *, max_grad_norm: float) -> None:
        self.t += 1
        total = {name: torch.zeros_like(w).flatten() for name, w in self.weights.items()}
        for i, loss in enumerate(micro_batches):
            weights = {
                name: (self.weights[name] + SparseDelta(d.indices, d.values, d.shape).to_dense()).requires_grad_()
                for name, d in self.deltas.items()
            }
            gradients = torch.autograd.grad(loss(weights), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += gradient.flatten()
                if i == 0 and self.schedule.is_first_of_window(self.t):
                    self.candidates[name] = top_k(gradient.abs(), self.deltas[name].values.numel(), name=name)
                    self.seen[name] = []
        for name, d in self.deltas.items():
            d.values.grad = total[name][d.indices.long()]
        norm = nn.utils.clip_grad_norm_([d.values for d in self.deltas.values()], max_grad_norm)
        if self.schedule.in_window(self.t):
            factor = min(1.0, max_grad_norm / (float(norm) + 1e-6))
            for name, indices in self.candidates.items():
                self.seen[name].append(total[name][indices.long()] * factor)
        self.optimizer.step()
        if self.schedule.selects_after(self.t):
            for name in self.deltas:
                self._reselect(name)

    def _reselect(self, name: str) -> None:
        d = self.deltas[name]
        num = self.schedule.num_replaced(self.t, d.values.numel())
        grown = None
        if self.method == "ag":
            assert len(self.seen[name]) == self.schedule.estimation_steps
            gradients = torch.stack(self.seen[name])
            candidates = Candidates(self.candidates[name], gradients.mean(0).abs())
        elif len(d.shape) < 2:
            candidates = Candidates(d.indices[:0], torch.empty(0))
        else:
            assert isinstance(self.optimizer, SM3)
            row, column = self.optimizer.row_accumulator(d.values), self.optimizer.column_accumulator(d.values)
            candidates = grow_candidates(row, column, d.indices, num)
        change = d.values.detach() - (self.before[name] if self.drop_by == "change_since_reselection" else 0)
        replacement = drop_and_grow(d.indices, change.abs(), candidates, num_replaced=num)
        if self.method == "ag":
            chosen = gradients[:, replacement.candidates]
            grown = GrownGradients(chosen.mean(0), chosen.square().mean(0), len(self.seen[name]))
        reindex(self.optimizer, d.values, replacement, grown)
        d.values.data = replacement.carry(d.values)
        d.indices = replacement.indices
        self.before[name] = d.values.detach().clone()


def adamw(deltas: list[Held]) -> torch.optim.Optimizer:
    return SparseAdamW([d.values for d in deltas], lr=0.02, weight_decay=0.1)


def sm3(deltas: list[Held]) -> torch.optim.Optimizer:
    return SM3([d.values for d in deltas], lr=0.1, deltas=deltas, weight_decay=0.1)


@pytest.mark.parametrize("drop_by", ["delta", "change_since_reselection"])
@pytest.mark.parametrize(
    ("method", "kind", "replace_all_first"), [("ag", "linear", True), ("ag", "cosine", False), ("ma", "linear", True)]
)
def test_the_parts_make_the_thesis(method: str, kind: str, replace_all_first: bool, drop_by: str) -> None:
    calendar = {"reselection_steps": 6, "estimation_steps": 3, "initial_rate": 0.4}
    calendar |= {"kind": kind, "replace_all_first": replace_all_first, "total_steps": 40}
    make = adamw if method == "ag" else sm3
    parts = Parts(Schedule(**calendar), method, drop_by, make)
    reference = ReferenceSpiel(
        pretrained(),
        supports(),
        method=method,
        lr=0.02 if method == "ag" else 0.1,
        drop_by=drop_by,
        weight_decay=0.1,
        max_grad_norm=0.5,
        **calendar,
    )
    for update in range(1, 41):
        parts.update(losses(update, micro_batches=2), max_grad_norm=0.5)
        reference.update(losses(update, micro_batches=2))
        for name, d in parts.deltas.items():
            assert d.indices.tolist() == reference.indices(name).tolist(), (update, name)
            torch.testing.assert_close(d.values.detach(), reference.values(name), rtol=1e-9, atol=1e-12)
    grown = [sum(map(len, names.values())) for _, names in reference.history]
    assert [update for update, _ in reference.history] == [3, 9, 15, 21, 27, 33, 39]
    assert sum(grown) > 30


def test_the_reference_with_every_weight_tuned_is_adamw() -> None:
    everything = {name: torch.arange(weight.numel()) for name, weight in pretrained().items()}
    reference = ReferenceSpiel(pretrained(), everything, lr=0.02, total_steps=5, eps=1e-6)
    weights = {name: nn.Parameter(weight) for name, weight in pretrained().items()}
    dense = torch.optim.AdamW(weights.values(), lr=0.02, weight_decay=0.0, eps=1e-6)
    for update in range(1, 6):
        reference.update(losses(update, micro_batches=3))
        dense.zero_grad()
        for loss in losses(update, micro_batches=3):
            loss(weights).backward()
        dense.step()
    for name, weight in weights.items():
        torch.testing.assert_close(reference.effective()[name], weight.detach(), rtol=1e-10, atol=1e-12)
