"""SpIEL written down slowly from the thesis (7.3, algorithms 2 and 3): dense tensors, Python loops, nothing shared with
the library.

Every tuned tensor has a dense list of differences `phi` and a set of flat positions `eta`; the whole gradient is formed
in every update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import ceil, cos, floor, pi, sqrt

import torch
from torch import Tensor

Loss = Callable[[dict[str, Tensor]], Tensor]


class ReferenceSpiel:
    """SpIEL-AG with AdamW, or SpIEL-MA with SM3, on named weights.

    Args:
        weights: name -> pretrained weight of any shape.
        supports: name -> flat positions of the tuned weights at the start.
        method: "ag" or "ma".
        lr: learning rate; `update` may be given another one.
        total_steps: T; None keeps the rate at xi.
        reselection_steps, estimation_steps, initial_rate, kind, replace_all_first, until: S, gamma, xi, and so on, as
            in `selection.schedule.Schedule`.
        candidates_per_weight: how many candidates per tuned weight.
        drop_by: "delta" or "change_since_reselection".
        betas, eps, weight_decay: of AdamW (`eps` as torch adds it); `eps` is added inside the root by SM3.
        max_grad_norm: clip the norm of the gradients of all tuned weights together.
        dtype: of the weights in forward and backward; everything else is Python's float64.

    Attributes:
        eta: name -> set of flat positions.
        phi, m, v, age: name -> list of one number per weight of the tensor, tuned or not.
        history: per reselection (update, name -> set of positions that were grown).
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        supports: Mapping[str, Tensor],
        *,
        method: str = "ag",
        lr: float,
        total_steps: int | None,
        reselection_steps: int = 20,
        estimation_steps: int = 5,
        initial_rate: float = 0.2,
        kind: str = "linear",
        replace_all_first: bool = True,
        until: float = 1.0,
        candidates_per_weight: float = 1.0,
        drop_by: str = "delta",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.weights = {name: weight.detach().to(dtype) for name, weight in weights.items()}
        self.eta = {name: set(support.tolist()) for name, support in supports.items()}
        self.method, self.lr, self.total_steps = method, lr, total_steps
        self.reselection_steps, self.estimation_steps = reselection_steps, estimation_steps
        self.initial_rate, self.kind, self.replace_all_first, self.until = initial_rate, kind, replace_all_first, until
        self.candidates_per_weight, self.drop_by = candidates_per_weight, drop_by
        self.betas, self.eps, self.weight_decay, self.max_grad_norm = betas, eps, weight_decay, max_grad_norm
        self.t = 0
        self.phi = {name: [0.0] * weight.numel() for name, weight in self.weights.items()}
        self.phi0 = {name: list(phi) for name, phi in self.phi.items()}
        self.m = {name: list(phi) for name, phi in self.phi.items()}
        self.v = {name: list(phi) for name, phi in self.phi.items()}
        self.age = {name: [0] * weight.numel() for name, weight in self.weights.items()}
        self.rows = {name: [0.0] * weight.shape[0] for name, weight in self.weights.items()}
        self.columns = {name: [0.0] * (w.numel() // w.shape[0]) for name, w in self.weights.items()}
        self.estimates: dict[str, dict[int, list[float]]] = {}
        self.history: list[tuple[int, dict[str, set[int]]]] = []

    # ---- what it holds ---------------------------------------------------------------------------

    def indices(self, name: str) -> Tensor:
        """[k] the support, ascending."""
        return torch.tensor(sorted(self.eta[name]), dtype=torch.int64)

    def values(self, name: str) -> Tensor:
        """[k] the tuned values, in the order of `indices`."""
        return torch.tensor([self.phi[name][j] for j in sorted(self.eta[name])], dtype=self.weights[name].dtype)

    def effective(self) -> dict[str, Tensor]:
        """The weights with their differences."""
        return {
            name: weight + torch.tensor(self.phi[name], dtype=weight.dtype).view(weight.shape)
            for name, weight in self.weights.items()
        }

    # ---- one update ------------------------------------------------------------------------------

    def update(self, micro_batches: Sequence[Loss], *, lr: float | None = None) -> float:
        """One optimizer update, and the reselection after it if one is due.

        Args:
            micro_batches: each computes the loss of a micro-batch from the weights, divided as the trainer divides it;
                the gradients are summed.

        Returns:
            the sum of the losses.
        """
        self.t += 1
        micro_gradients, total = [], 0.0
        for loss_of in micro_batches:
            weights = {name: weight.requires_grad_() for name, weight in self.effective().items()}
            loss = loss_of(weights)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            micro_gradients.append({name: g.flatten().tolist() for name, g in zip(weights, gradients, strict=True)})
            total += float(loss.detach())
        gradient = {name: [sum(g) for g in zip(*(m[name] for m in micro_gradients), strict=True)] for name in self.phi}
        self._clip(gradient)
        window_end = self._window_end(self.t)
        if self.method == "ag" and window_end is not None:
            if self.t == window_end - self.estimation_steps + 1:
                self._nominate(micro_gradients[0])
            for name, candidates in self.estimates.items():
                for j, seen in candidates.items():
                    seen.append(gradient[name][j])
        for name in self.phi:
            (self._adamw if self.method == "ag" else self._sm3)(name, gradient[name], self.lr if lr is None else lr)
        if self._selects_after(self.t):
            self.history.append((self.t, {name: self._reselect(name) for name in self.phi}))
            self.estimates = {}
        return total

    def _clip(self, gradient: dict[str, list[float]]) -> None:
        if self.max_grad_norm is None:
            return
        norm = sqrt(sum(gradient[name][j] ** 2 for name in gradient for j in self.eta[name]))
        # torch.nn.utils.clip_grad_norm_ adds this much to the norm.
        factor = min(1.0, self.max_grad_norm / (norm + 1e-6))
        for name in gradient:
            gradient[name] = [g * factor for g in gradient[name]]

    def _adamw(self, name: str, gradient: list[float], lr: float) -> None:
        beta1, beta2 = self.betas
        for j in self.eta[name]:
            self.age[name][j] += 1
            a, g = self.age[name][j], gradient[j]
            self.m[name][j] = beta1 * self.m[name][j] + (1 - beta1) * g
            self.v[name][j] = beta2 * self.v[name][j] + (1 - beta2) * g * g
            m_hat = self.m[name][j] / (1 - beta1**a)
            v_hat = self.v[name][j] / (1 - beta2**a)
            self.phi[name][j] -= lr * self.weight_decay * self.phi[name][j]
            self.phi[name][j] -= lr * m_hat / (sqrt(v_hat) + self.eps)

    def _sm3(self, name: str, gradient: list[float], lr: float) -> None:
        if self.weights[name].dim() < 2:
            for j in self.eta[name]:
                self.v[name][j] += gradient[j] ** 2
                self._sm3_step(name, j, gradient[j], self.v[name][j], lr)
            return
        estimates = {}
        for j in self.eta[name]:
            row, column = divmod(j, len(self.columns[name]))
            estimates[j] = min(self.rows[name][row], self.columns[name][column]) + gradient[j] ** 2
        for j, estimate in estimates.items():
            row, column = divmod(j, len(self.columns[name]))
            self.rows[name][row] = max(self.rows[name][row], estimate)
            self.columns[name][column] = max(self.columns[name][column], estimate)
            self._sm3_step(name, j, gradient[j], estimate, lr)

    def _sm3_step(self, name: str, j: int, g: float, estimate: float, lr: float) -> None:
        self.phi[name][j] -= lr * self.weight_decay * self.phi[name][j]
        self.phi[name][j] -= lr * g / sqrt(estimate + self.eps)

    # ---- when ------------------------------------------------------------------------------------

    def _selects_after(self, t: int) -> bool:
        if t < self.estimation_steps or (t - self.estimation_steps) % self.reselection_steps != 0:
            return False
        return self.total_steps is None or (t < self.total_steps and t <= self.until * self.total_steps)

    def _window_end(self, t: int) -> int | None:
        for end in range(t, t + self.estimation_steps):
            if self._selects_after(end):
                return end
        return None

    def _num_replaced(self, count: int) -> int:
        if self.replace_all_first and self.t == self.estimation_steps:
            return count
        xi = Fraction(str(self.initial_rate))
        if self.total_steps is None:
            return floor(xi * count)
        if self.kind == "linear":
            return floor(xi * Fraction(self.total_steps - self.t, self.total_steps) * count)
        return floor(self.initial_rate / 2 * (1 + cos(pi * self.t / self.total_steps)) * count)

    # ---- which -----------------------------------------------------------------------------------

    def _nominate(self, gradient: dict[str, list[float]]) -> None:
        for name, g in gradient.items():
            number = ceil(self.candidates_per_weight * len(self.eta[name]))
            best = sorted(range(len(g)), key=lambda j: (-abs(g[j]), j))[:number]
            self.estimates[name] = {j: [] for j in best}

    def _reselect(self, name: str) -> set[int]:
        """Drop and grow in one tensor; the positions that were grown."""
        eta, phi = self.eta[name], self.phi[name]
        n = self._num_replaced(len(eta))
        if self.drop_by == "delta":
            strength = {j: abs(phi[j]) for j in eta}
        else:
            strength = {j: abs(phi[j] - self.phi0[name][j]) for j in eta}
        weakest = sorted(eta, key=lambda j: (strength[j], j))
        drop = weakest[:n]
        score = self._growth_scores(name, eta - set(drop))
        grow = sorted(score, key=lambda j: (-score[j], j))[:n]
        entering = set(grow) - set(drop)
        # What is dropped and grown at once stays; the count is kept by dropping no more than are grown.
        leaving = [j for j in drop if j not in grow][: len(entering)]
        for j in leaving:
            eta.remove(j)
            phi[j] = 0.0
        for j in entering:
            eta.add(j)
            self._seed(name, j)
        self.phi0[name] = list(phi)
        return entering

    def _growth_scores(self, name: str, staying: set[int]) -> dict[int, float]:
        if self.method == "ag":
            means = {j: sum(seen) / len(seen) for j, seen in self.estimates[name].items()}
            return {j: abs(mean) for j, mean in means.items() if j not in staying}
        if self.weights[name].dim() < 2:
            return {}
        scores = {}
        for j in set(range(len(self.phi[name]))) - self.eta[name]:
            row, column = divmod(j, len(self.columns[name]))
            score = (self.rows[name][row] * self.columns[name][column]) ** 0.25
            if score > 0:
                scores[j] = score
        return scores

    def _seed(self, name: str, j: int) -> None:
        if self.method != "ag":
            return
        seen = self.estimates[name][j]
        gamma = len(seen)
        beta1, beta2 = self.betas
        self.age[name][j] = gamma
        self.m[name][j] = sum(seen) / gamma * (1 - beta1**gamma)
        self.v[name][j] = sum(g * g for g in seen) / gamma * (1 - beta2**gamma)
