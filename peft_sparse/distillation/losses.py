"""What a student is taught: attention probabilities, hidden states and predictions, as functions of tensors.

All of them leave padding out: masked means, where the authors' code averages over padding as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from ..checks import check_one_of, is_number
from ..errors import ConfigError


@dataclass(frozen=True)
class DistillationLoss:
    """The weights of the terms of a loss; a term of weight 0 is not computed.

    Args:
        attention: of the attention probabilities, needs eager attention.
        hidden: of the embeddings' and layers' outputs.
        prediction: of the distributions over labels, or over the next token.
        labels: of the trainer's own loss, on labels.
        temperature: both distributions of `prediction` are softened by it, > 0. The authors' code has 2 and no factor
            for it in the loss; the paper does not mention one.

    Raises:
        ConfigError: a weight is negative or not finite, all are 0, or the temperature is not positive.
    """

    attention: float = 1.0
    hidden: float = 1.0
    prediction: float = 0.0
    labels: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise ConfigError(f"{field.name} must be a finite number >= 0, got {value!r}.")
        if self.temperature == 0:
            raise ConfigError("temperature must be > 0, got 0.")
        if not (self.needs_teacher or self.labels):
            raise ConfigError("one of attention, hidden, prediction and labels must be above 0, got 0 for all.")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return bool(self.attention or self.hidden or self.prediction)


# The thesis's names: phase 1 (general), and the two ways of phase 2.
VARIANTS = {
    "general": DistillationLoss(),
    "teacher_forcing": DistillationLoss(prediction=1.0),
    "self_taught": DistillationLoss(attention=0.0, hidden=0.0, labels=1.0),
}


def loss_named(loss: DistillationLoss | str) -> DistillationLoss:
    """The loss of a name of `VARIANTS`, or the one that was given.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(loss, DistillationLoss):
        return loss
    check_one_of("loss", loss, VARIANTS)
    return VARIANTS[loss]


def pair_mask(mask: Tensor, *, causal: bool = False, window: int | None = None) -> Tensor:
    """Which queries attend to which keys.

    Args:
        mask: [B, T], non-zero where there is a token.
        causal: a query sees no key after itself.
        window: how many keys a query sees at most to a side, itself included; None for all.

    Returns:
        [B, T, T] bool, query by key.
    """
    is_token = mask.bool()
    pairs = is_token[:, :, None] & is_token[:, None, :]
    places = torch.arange(mask.shape[1], device=mask.device)
    distance = places[:, None] - places[None, :]
    if causal:
        pairs = pairs & (distance >= 0)
    if window is not None:
        pairs = pairs & (distance.abs() < window)
    return pairs


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean squared difference of attention probabilities, over the pairs of a mask.

    Args:
        student, teacher: [B, H, T, T] of each aligned layer.
        masks: [B, T, T] bool of each of them, see `pair_mask`.

    Source: BiStil, equation 1; thesis (5.1): probabilities, where TinyBERT compares scores.
    """
    terms = []
    for own, target, mask in zip(student, teacher, masks, strict=True):
        squared = (_wide(own) - _wide(target)).square() * mask[:, None]
        terms.append(squared.sum() / (mask.sum() * own.shape[1]).clamp(min=1))
    return torch.stack(terms).mean()


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over the embeddings and layers of the mean squared difference of their outputs, over real tokens.

    Args:
        student, teacher: [B, T, h] each.
        mask: [B, T], non-zero where there is a token.

    Source: BiStil, equation 2; thesis (5.2).
    """
    is_token = mask.bool()
    terms = [
        ((_wide(own) - _wide(target)).square() * is_token[:, :, None]).sum()
        / (is_token.sum() * own.shape[-1]).clamp(min=1)
        for own, target in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def prediction_loss(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy of the student's distribution under the teacher's, over the places of a mask.

    Args:
        student, teacher: [..., C] logits, C >= 2.
        mask: [...], non-zero where a prediction counts.
        temperature: divides both logits.

    Source: BiStil, equation 3; thesis (5.3).
    """
    targets = softmax(_wide(teacher) / temperature, dim=-1)
    entropies = -(targets * log_softmax(_wide(student) / temperature, dim=-1)).sum(-1)
    counted = mask.bool()
    return torch.where(counted, entropies, 0).sum() / counted.sum().clamp(min=1)


def prediction_mask(mask: Tensor, labels: Tensor | None, *, next_token: bool) -> Tensor:
    """Where the predictions of a model that labels tokens count: [B, T] bool.

    Args:
        mask: [B, T], non-zero where there is a token.
        labels: [B, T], negative where a label is to be ignored; None if there are none.
        next_token: the prediction at a place is of the token after it.
    """
    counted = mask.bool()
    if labels is not None:
        counted = counted & (labels >= 0)
    if not next_token:
        return counted
    following = torch.zeros_like(counted)
    following[:, :-1] = counted[:, 1:] & mask.bool()[:, :-1]
    return following


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
