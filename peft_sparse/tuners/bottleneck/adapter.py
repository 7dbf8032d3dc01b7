"""One bottleneck adapter in one place: down, activation, up. What it is added to is its layer's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ...core.sharded import overwrite
from ...errors import ConfigError
from ..common.base_module import AdapterLinear, NeverOffloaded

LEARNED = "learned"
# Standard deviation of the weights that "near_identity" draws; cut off at two of them (Houlsby et al. 2019).
NEAR_IDENTITY_STD = 0.01
# Of `init_weights=False`: large enough that the adapter's effect cannot be taken for noise.
RANDOM_STD = 0.3


class BottleneckWeights(NamedTuple):
    """What one adapter module computes with: m its bottleneck size, h the model's width.

    Attributes:
        down_weight: [m, h], or [B, m, h] for a module of its own for each example of a batch.
        down_bias: [m] or [B, m].
        up_weight: [h, m] or [B, h, m].
        up_bias: [h] or [B, h].
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


class Bottleneck(NeverOffloaded):
    """scaling * up(activation(down(x))), without the residual: U alpha(D h) of thesis equation 2.8.

    Attributes:
        down, up: the two linear maps, [m, h] and [h, m], with biases: 2hm + h + m parameters.
        generated: weights to compute with instead of those of `down` and `up`. Gradients flow into them.
    """

    def __init__(
        self,
        width: int,
        bottleneck_size: int,
        *,
        activation: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = AdapterLinear(width, bottleneck_size, device=device, dtype=torch.float32)
        self.activation = activation_named(activation)
        self.up = AdapterLinear(bottleneck_size, width, device=device, dtype=torch.float32)
        self.scaling = nn.Parameter(torch.ones(1, device=device)) if scaling == LEARNED else scaling
        self.dropout = nn.Dropout(dropout)
        self.generated: BottleneckWeights | None = None

    @property
    def weights(self) -> BottleneckWeights:
        """The module's own parameters."""
        return BottleneckWeights(self.down.weight, self.down.bias, self.up.weight, self.up.bias)

    @torch.no_grad()
    def set_weights(self, weights: BottleneckWeights) -> None:
        """Copy tensors of the same shapes into the module's own parameters.

        Raises:
            ConfigError: a shape differs.
        """
        for name, own, new in zip(BottleneckWeights._fields, self.weights, weights, strict=True):
            if own.shape != new.shape:
                raise ConfigError(
                    f"{name} must be of shape {list(own.shape)}, got {list(new.shape)}. "
                    "The bottleneck sizes and the models' widths must be the same."
                )
        for own, new in zip(self.weights, weights, strict=True):
            overwrite(own, new)

    def forward(self, x: Tensor) -> Tensor:
        """What is to be added to the residual: [..., h] like `x`, in its dtype."""
        if self.generated is None:
            up = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        else:
            up = bottleneck_output(self.generated, x, self.activation)
        return self.dropout(self.scaling * up).to(x.dtype)


def bottleneck_output(weights: BottleneckWeights, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """up(activation(down(x))) with weights that belong to no module: [..., h] like `x`, in the weights' dtype."""
    hidden = activation(_linear(x.to(weights.down_weight.dtype), weights.down_weight, weights.down_bias))
    return _linear(hidden, weights.up_weight, weights.up_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear map, or one for each example of the batch."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """transformers' activation of that name.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(name, str) or name not in ACT2FN:
        raise ConfigError(f"activation must be one of {sorted(ACT2FN)}, got {name!r}.")
    return ACT2FN[name]


@torch.no_grad()
def init_linears(down: nn.Linear, up: nn.Linear, *, init: str, random: bool = False) -> None:
    """Give two linear maps their starting values; biases start at zero.

    Args:
        down, up: the maps.
        init: "near_identity" (both drawn from a normal distribution of deviation 0.01, cut off at two deviations:
            Houlsby et al. 2019) or "identity" (`up` starts at zero, `down` uniform as torch draws it: He et
            al. 2022, arXiv:2110.04366).
        random: draw large values instead, biases too, for tests.
    """
    for linear in (down, up):
        if random:
            nn.init.normal_(linear.weight, std=RANDOM_STD)
            nn.init.normal_(linear.bias, std=RANDOM_STD)
            continue
        nn.init.zeros_(linear.bias)
        if init == "near_identity":
            nn.init.trunc_normal_(
                linear.weight, std=NEAR_IDENTITY_STD, a=-2 * NEAR_IDENTITY_STD, b=2 * NEAR_IDENTITY_STD
            )
        elif linear is up:
            nn.init.zeros_(linear.weight)
        else:
            nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
