"""The trainable part of one adapter on one linear weight: the scores of its mask, and the difference under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.masked import MaskedPart, masked_weight, working_dtype
from ..common.base_module import NeverOffloaded
from ..common.events import ON_UNFINISHED, announce
from .config import COMPOSED, HELD, MASK, WEIGHTS


class MaskedWeight(NeverOffloaded):
    """One adapter's mask and difference on the weight of a layer, both float32 masters.

    Args:
        shape: of the weight.
        phase: "mask": scores alone; "weights": scores, which are fixed, and a difference; "composed": a difference.
        initial_mask, from_identity: of the config.
        device: where both live.

    Attributes:
        scores: in the weight's shape: how far S has moved from its start; None in phase "composed".
        difference: in the weight's shape; None in phase "mask".
    """

    scores: nn.Parameter | None
    difference: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        phase: str,
        initial_mask: float,
        from_identity: bool,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.initial_mask = initial_mask
        self.from_identity = from_identity
        self._device = device
        self.register_parameter("scores", None)
        self.register_parameter("difference", None)
        self.enter(phase)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.phase == MASK:
            announce(ON_UNFINISHED)

    @property
    def phase(self) -> str:
        """What it holds, under the names of `AdaSftConfig.phase`."""
        if self.difference is None:
            return MASK
        return COMPOSED if self.scores is None else WEIGHTS

    @property
    def trained(self) -> nn.Parameter:
        """The parameter that this phase trains."""
        found = self.scores if self.difference is None else self.difference
        assert found is not None  # one of the two is there in every phase
        return found

    @property
    def numel(self) -> int:
        """Number of weights under the mask."""
        return self.trained.numel()

    def enter(self, phase: str) -> None:
        """Hold what a phase needs: zeros for what was not there. What was trainable stays so in the new phase."""
        before = list(self.parameters())
        trainable = not before or any(p.requires_grad for p in before)
        device = before[0].device if before else self._device
        for name in ("scores", "difference"):
            if name not in HELD[phase]:
                setattr(self, name, None)
            elif getattr(self, name) is None:
                setattr(self, name, nn.Parameter(torch.zeros(self.shape, dtype=torch.float32, device=device)))
        for parameter in self.parameters():
            parameter.grad = None
            parameter.requires_grad_(trainable and parameter is self.trained)

    def way_back(self) -> Callable[[], None]:
        """What puts back all that it holds now, whatever phase it enters."""
        held = {name: getattr(self, name) for name in ("scores", "difference")}
        trains = {name: parameter is not None and parameter.requires_grad for name, parameter in held.items()}

        def go_back() -> None:
            for name, parameter in held.items():
                setattr(self, name, parameter)
                if parameter is not None:
                    parameter.requires_grad_(trains[name])

        return go_back

    def freeze_what_is_fixed(self) -> None:
        """Undo a switch that made all parameters trainable: a mask is fixed in its second phase."""
        if self.scores is not None and self.difference is not None:
            self.scores.requires_grad_(False)

    def start_at_random(self) -> None:
        """Random scores and differences, large enough to open and close masks, from torch's global generator."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=3.0 if parameter is self.scores else 0.3)

    @property
    def part(self) -> MaskedPart:
        """What the formula takes."""
        return MaskedPart(self.scores, self.difference, self.initial_mask, self.from_identity)

    @torch.no_grad()
    def change(self, weight: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the adapter adds to a weight: (W + D) * M - W, the product as the layer computes it.

        Args:
            weight: the layer's own, in the weight's shape.
            dtype: of the result. In float64 nothing is rounded (of weights up to float32). In float32 the sum of weight
                and change is the product again, bit for bit, where it is between half and twice the weight; elsewhere
                they differ by no more than the last bit of the larger one.

        Returns:
            a new tensor in the weight's shape.
        """
        tuned = masked_weight(weight, [self.part], dtype=working_dtype(weight.dtype, [self.part]))
        return (tuned.double() - weight.double()).to(dtype)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, phase={self.phase}, initial_mask={self.initial_mask}"
