"""Invertible adapters of the embeddings: coupling blocks, which have an exact inverse and no Jacobian to train for.

MAD-X (Pfeiffer et al. 2020, arXiv:2005.00052) puts one behind the embeddings and its inverse before the
output embeddings, which share their weights, so that a language's vocabulary is learnt where it is read and where it is
predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.sharded import gathered, is_sharded
from ..common.base_module import AdapterLinear, NeverOffloaded
from .adapter import activation_named, init_linears

# The largest factor by which a GLOW coupling scales is exp(CLAMP).
CLAMP = 5.0


class Coupling(NeverOffloaded):
    """What both couplings share: the input is split in halves, each is changed by a function of the other.

    Attributes:
        first: computes what changes the first half, from the second.
        second: computes what changes the second half, from the first as it is by then.
    """

    # Numbers that a function gives for each entry that it changes.
    outputs_per_entry = 1

    def __init__(self, width: int, *, activation: str, reduction_factor: float, device: torch.device | None) -> None:
        super().__init__()
        self.split = [width // 2, width - width // 2]
        for name, own, other in (("first", *self.split), ("second", *reversed(self.split))):
            size = max(1, int(min(other // reduction_factor, 2.0**60)))
            self.add_module(name, _Subnet(other, size, own * self.outputs_per_entry, activation, device))

    def reset(self, *, init: str, random: bool) -> None:
        """Starting values, as `init_linears` draws them."""
        for net in (self.first, self.second):
            init_linears(net.down, net.up, init=init, random=random)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves in the finer of the dtypes of `x` and the weights: what is added to zero must stay what it is."""
        one, two = x.to(torch.promote_types(x.dtype, self.first.down.weight.dtype)).split(self.split, dim=-1)
        return one, two

    def forward(self, x: Tensor) -> Tensor:
        """The coupling: [..., h] to [..., h], in the dtype of `x`."""
        one, two = self._halves(x)
        one = self.change(one, self.first(two))
        two = self.change(two, self.second(one))
        return torch.cat([one, two], dim=-1).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` was given: exact but for rounding."""
        one, two = self._halves(y)
        two = self.change_back(two, self.second(one))
        one = self.change_back(one, self.first(two))
        return torch.cat([one, two], dim=-1).to(y.dtype)


class Nice(Coupling):
    """Additive coupling: y1 = x1 + F(x2), y2 = x2 + G(y1).

    Source: Dinh et al. 2015, arXiv:1410.8516, in the form of MAD-X.
    """

    def change(self, half: Tensor, given: Tensor) -> Tensor:
        return half + given

    def change_back(self, half: Tensor, given: Tensor) -> Tensor:
        return half - given


class Glow(Coupling):
    """Affine coupling: y1 = e(s) x1 + t with (s, t) = F(x2), then y2 likewise from y1.

    e(s) = exp(0.636 c atan(s / c)) with c = 5 stays within exp(-5) and exp(5), so that the inverse never divides by
    nothing.

    Source: Kingma and Dhariwal 2018, arXiv:1807.03039; the soft clamp is FrEIA's. Differs from the `adapters`
    library, whose "glow" block cuts the wrong axis of a batch of sequences and returns a list: its files load here,
    but there is no output of it to compare with.
    """

    outputs_per_entry = 2

    def change(self, half: Tensor, given: Tensor) -> Tensor:
        scale, shift = given.chunk(2, dim=-1)
        return half * _bounded_exp(scale) + shift

    def change_back(self, half: Tensor, given: Tensor) -> Tensor:
        scale, shift = given.chunk(2, dim=-1)
        return (half - shift) / _bounded_exp(scale)


def _bounded_exp(s: Tensor) -> Tensor:
    return torch.exp(0.636 * CLAMP * torch.atan(s / CLAMP))


class _Subnet(nn.Module):
    """down, activation, up, from one half to the numbers that change the other."""

    def __init__(self, inputs: int, size: int, outputs: int, activation: str, device: torch.device | None) -> None:
        super().__init__()
        self.down = AdapterLinear(inputs, size, device=device, dtype=torch.float32)
        self.activation = activation_named(activation)
        self.up = AdapterLinear(size, outputs, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self.up, self.activation(_linear(self.down, x.to(self.down.weight.dtype))))


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """The linear map, whatever holds its weight: the inverse acts when FSDP2 has cut up the embeddings' unit again."""
    if is_sharded(linear.weight):
        return F.linear(x, gathered(linear.weight), gathered(linear.bias))
    return linear(x)


COUPLINGS: dict[str, type[Coupling]] = {"nice": Nice, "glow": Glow}
