"""What a reselection replaces: weights that are weak by the config's `drop_by`, in every tensor or in all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.sharded import whole
from ...errors import ConfigError
from ...optim.reindex import moment_ratios
from ...selection.replacement import Candidates, Replacement, drop_and_grow, redistribute


def drop_scores(
    drop_by: str,
    values: Tensor,
    *,
    before: Tensor | None,
    held: nn.Parameter,
    optimizers: Sequence[Optimizer],
    adapter_name: str,
) -> Tensor:
    """How much each weight of a tensor counts; the lowest are dropped.

    Args:
        drop_by: of the config.
        values: [k] the tuned values, whole.
        before: [k] what they were after the last reselection; None if there was none.
        held: the parameter that optimizers hold, with the gradient of the update that was just made.
        optimizers: that step on it.
        adapter_name: for the message.

    Returns:
        [k] >= 0.

    Raises:
        ConfigError: no optimizer keeps the moments that are asked for.
    """
    if drop_by == "change_since_reselection" and before is not None:
        return (values - before.to(values.device)).abs()
    if drop_by == "delta_times_gradient" and held.grad is not None:
        return (values * whole(held.grad).to(values)).abs()
    if drop_by == "moment_ratio":
        for optimizer in optimizers:
            if (ratios := moment_ratios(optimizer, held)) is not None:
                return ratios.to(values.device)
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "no optimizer"
        raise ConfigError(
            f"drop_by='moment_ratio' of adapter {adapter_name!r} needs the moments of Adam's kind in full precision, "
            f"and {names} has none. Use SparseAdamW or torch's Adam, or drop_by='delta'."
        )
    return values.abs()


def choose_replacements(
    indices: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    candidates: Mapping[str, Candidates],
    *,
    budget: str,
    num_replaced: Callable[[int], int],
) -> dict[str, Replacement]:
    """What is dropped and grown in the tensors that have candidates.

    Args:
        indices, scores: {parameter name: [k] the tuned positions, and how much each weight counts}.
        candidates: {parameter name: candidates}.
        budget: of the config: with "global" weights move between tensors.
        num_replaced: k -> how many of k weights are to be replaced.
    """
    if budget == "global":
        total = sum(own.numel() for own in indices.values())
        return redistribute(indices, scores, candidates, num_replaced=num_replaced(total))
    return {
        name: drop_and_grow(own, scores[name], candidates[name], num_replaced=num_replaced(own.numel()))
        for name, own in indices.items()
    }
