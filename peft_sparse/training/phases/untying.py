"""Tied parameters in a dense phase: the tuned embedding moves, the output matrix in the same memory does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class _Tie:
    module: nn.Module
    name: str
    parameter: nn.Parameter


class Ties:
    """What was untied, and how to tie it again.

    LT-SFT's authors decouple the two matrices by cloning as well: with the output matrix moving too, most of the
    weights that change most lie in the embedding (Ansell et al. 2022, arXiv:2110.07560, section 4.2).
    """

    def __init__(self, ties: list[_Tie]) -> None:
        self._ties = ties

    @classmethod
    def untie(cls, model: nn.Module, tuned: Sequence[tuple[nn.Module, str]]) -> Ties:
        """Give every other holder of a tuned parameter a frozen copy of its own.

        Of two tuned holders of one parameter the first keeps it. Input embeddings that share a matrix (an encoder's and
        a decoder's) stay tied to each other, as one delta acts on all of them.

        Args:
            model: where to look for other holders.
            tuned: (module, name of its parameter) of every parameter that is about to train.
        """
        owners: dict[int, nn.Module] = {}
        for module, name in tuned:
            owners.setdefault(id(module._parameters[name]), module)
        ties: list[_Tie] = []
        for module in model.modules():
            for name, parameter in module._parameters.items():
                owner = owners.get(id(parameter))
                if owner is None or parameter is None:
                    continue
                both_look_up = isinstance(owner, nn.Embedding) and isinstance(module, nn.Embedding)
                if module is not owner and not both_look_up:
                    ties.append(_Tie(module, name, parameter))
        for tie in ties:
            tie.module._parameters[tie.name] = nn.Parameter(tie.parameter.detach().clone(), requires_grad=False)
        return cls(ties)

    def retie(self) -> None:
        """Put the shared parameters back, the very same objects."""
        for tie in self._ties:
            tie.module._parameters[tie.name] = tie.parameter
        self._ties = []
