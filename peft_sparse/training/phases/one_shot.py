"""Choosing a support by gradients, once, before training: FISH masks, SNIP, and criteria of the user's own."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.indices import index_dtype
from ...errors import ConfigError, SparseError
from ...selection.criteria import WEIGHT, Criterion, GradientMeans, criterion_name, resolve_criterion
from ...selection.rows import RowConfinement
from ...selection.shortlist import Shortlist
from ...tuners.common.base_model import base_model_of
from ...tuners.common.targets import targets_of
from ...tuners.sparse_ft.allocation import plan_groups
from ...tuners.sparse_ft.configs.base import GRADIENTS, SparseConfig
from ...tuners.sparse_ft.configs.one_shot import OneShotConfig
from ...tuners.sparse_ft.configs.spiel import SpielConfig
from ...tuners.sparse_ft.iteration import iter_layers
from ...tuners.sparse_ft.known_support import check_scores
from ...tuners.sparse_ft.random_part import RandomPart
from ...tuners.sparse_ft.unselected import is_unselected
from ..distributed import from_first_rank, refuse_sharded
from ..fitted_rate import iter_rate_fits
from ..progress import progress_bar
from ..spiel.reselector import iter_reselectors
from .gradient_means import LossFunction, gradient_means
from .phase import Phase, first_phase
from .targets import Target, check_active, check_trains, refuse_wrapper, sparse_config, targets_of_adapter

logger = logging.getLogger(__name__)


def select_by_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """Choose the weights of an adapter whose criterion looks at gradients. Train it in any loop afterwards.

        model = get_peft_model(base, OneShotConfig(density=0.005, criterion="fisher"))
        select_by_gradients(model, loader)

    The batches are gone through `selection_passes` times, each time for another part of the targets, with the same
    dropout; the result does not depend on how often. Nothing but the adapter's support changes: not the weights, the
    mode (`model.eval()` first selects without dropout), buffers, gradients, or the state of torch's generators.

    Args:
        model: a PeftModel (or a tuner) with such an adapter, active and without weights yet; SpIEL with an
            `initial_support` is one. Not wrapped: DDP is made afterwards. In several processes each gives its share of
            every batch, and all choose alike.
        batches: the first `selection_batches` of these are kept and used; on the model's device, unless `loss_fn` sees
            to that.
        loss_fn: (model, batch) -> loss, a scalar; by default model(**batch).loss.
        adapter_name: that adapter.

    Returns:
        {parameter name: [k_i] sorted flat indices} that the adapter tunes from now on.

    Raises:
        ConfigError: the adapter is of another kind, has its weights already, is not active or frozen; the base is
            sharded; the model is wrapped; there is no loss or no batch; the criterion gives other than scores.
        SelectionError: a gradient is not finite (its tensor is named), no gradient was seen, or fewer weights are
            eligible than are asked for. The adapter is as it was.

    Cost: `selection_passes` * `selection_batches` forward and backward passes. In memory, beside a training step's, one
        float32 number for each weight of the largest part (of the `selection_passes` that the targets are split into,
        or the largest tensor), one more for each mean that the criterion uses, and two for each weight to select.
    Source: the criteria name theirs; see `peft_sparse.selection.criteria`.
    """
    refuse_wrapper(model)
    config = sparse_config(model, adapter_name)
    criterion = _check_adapter(adapter_name, config)
    targets = targets_of_adapter(model, adapter_name)
    for target in targets:
        check_active(adapter_name, target)
        refuse_sharded(target.name, target.parameter, why="the selection by gradients ranks")
    check_trains(adapter_name, targets)
    for _, layer in iter_layers(model):
        layer.restore()
    kept = list(islice(batches, config.selection_batches))
    if not kept:
        raise ConfigError("batches must hold at least one batch, got none. An iterator may have been used up.")
    if len(kept) < config.selection_batches:
        logger.warning(
            "selection by gradients: only %d batches were given, selection_batches asks for %d",
            len(kept),
            config.selection_batches,
        )
    drawn = RandomPart(config, [target.name for target in targets], base_model_of(model), adapter_name)
    selection = _select(model, config, criterion, targets, kept, loss_fn or _own_loss, drawn)
    _apply(config, targets, selection)
    for reselector in iter_reselectors(model):
        if reselector.adapter_name == adapter_name:
            reselector.begin_window()
    for fit in iter_rate_fits(model):
        if fit.adapter_name == adapter_name:
            fit.begin()
    logger.info(
        "adapter %r: selected %d of %d weights by criterion %r over %d batches",
        adapter_name,
        sum(chosen.numel() for chosen in selection.values()),
        sum(target.delta.numel for target in targets),
        criterion_name(config.criterion),
        len(kept),
    )
    return selection


def select_in_trainer(trainer: Any, adapter_name: str) -> None:
    """`select_by_gradients` with the first batches of a trainer's own data, and its loss.

    Each batch counts as one, whatever `gradient_accumulation_steps` says; the loss is not scaled for float16.

    Raises:
        ConfigError, SelectionError: as there; or the trainer shards the model, makes its batches while it trains
            (GRPO), or has a loss that only its training loop can compute.
    """
    name = type(trainer).__name__
    if hasattr(trainer, "_generate_and_score_completions"):
        raise ConfigError(
            f"{name} makes its batches while it trains, so there are none to select weights with. {_SELECT_FIRST}"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "fsdp and deepspeed shard the weights whose gradients are ranked. Select under DDP or in one process; an "
            "adapter that has its weights trains here."
        )

    # What the training loop sets before each step, for a loss that asks.
    trainer.current_gradient_accumulation_steps = 1
    wanted = inspect.signature(trainer.compute_loss).parameters.get("num_items_in_batch")
    counts_items = wanted is not None and wanted.default is inspect.Parameter.empty

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        # A copy: a loss that takes the labels out of its inputs would not find them in the next pass.
        batch = copy.copy(batch)
        count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1] if counts_items else None
        try:
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, inputs, **({"num_items_in_batch": count} if counts_items else {}))
        except SparseError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the loss of {name} could not be computed outside of its training loop ({type(error).__name__}: "
                f"{error}). {_SELECT_FIRST}"
            ) from error

    trainer.model.train()
    with _told_nothing(trainer):
        select_by_gradients(
            trainer.model,
            trainer.get_train_dataloader(),
            loss_fn=loss_of,
            adapter_name=adapter_name,
        )


@contextmanager
def _told_nothing(trainer: Any) -> Iterator[None]:
    """Keep what the losses of TRL's trainers note for the next log, tokens among it, from counting the selection."""
    noted = [name for name in ("_metrics", "_stored_metrics", "_total_train_tokens") if name in vars(trainer)]
    before = {name: copy.deepcopy(vars(trainer)[name]) for name in noted}
    try:
        yield
    finally:
        vars(trainer).update(before)


@first_phase
class GradientSelection(Phase):
    """`select_in_trainer` as the first phase of a trainer, in which nothing trains.

    What it selected lies where a dense phase's selection does.
    """

    name: ClassVar = GRADIENTS
    folder: ClassVar = "_dense"
    trains: ClassVar = False

    def __init__(self, trainer: Any, adapter_name: str) -> None:
        self.model = trainer.model
        self.adapter_name = adapter_name
        self._trainer = trainer

    @classmethod
    def begin(cls, trainer: Any, adapter_name: str) -> GradientSelection:
        """The selection with this trainer's data and loss."""
        return cls(trainer, adapter_name)

    @property
    def numel(self) -> int:
        """How many weights are ranked."""
        return sum(target.delta.numel for target in targets_of_adapter(self.model, self.adapter_name))

    def select(self) -> None:
        """Choose the support; nothing else changes, so there is nothing to go back to."""
        select_in_trainer(self._trainer, self.adapter_name)

    def __exit__(self, *error: object) -> None:
        pass


_SELECT_FIRST = (
    "Select first, with batches and a loss of your own, e.g. those of supervised fine-tuning: "
    "select_by_gradients(model, batches, loss_fn=...); an adapter that has its weights trains here."
)


def _select(
    model: nn.Module,
    config: OneShotConfig | SpielConfig,
    criterion: Criterion,
    targets: Sequence[Target],
    batches: Sequence[Any],
    loss_fn: LossFunction,
    drawn: RandomPart,
) -> dict[str, Tensor]:
    by_name = {target.name: target for target in targets}
    groups = plan_groups(config, targets_of(by_name), base_model_of(model))
    confinement = RowConfinement(config.support_rows)
    shortlists: dict[str, Shortlist] = {}
    for group in groups:
        count = group.count - sum(drawn.counts.get(name, 0) for name in group.members)
        if count:
            shortlist = Shortlist(count, name=group.name, min_score=criterion.min_score)
            shortlists.update(dict.fromkeys(group.members, shortlist))
    parts = split_in_parts([by_name[name] for name in by_name if name in shortlists], config.selection_passes)
    with progress_bar("selecting weights by gradients", len(parts) * len(batches)) as advance:
        for part in parts:
            means = gradient_means(
                model,
                {target.name: target.delta for target in part},
                batches,
                uses=criterion.uses,
                loss_fn=loss_fn,
                on_batch=advance,
            )
            scores = {
                name: confinement.confine(name, drawn.left_out(name, _scores(criterion, by_name[name], mean)))
                for name, mean in means
            }
            for shortlist in dict.fromkeys(shortlists[name] for name in scores):
                shortlist.add({name: scores.pop(name) for name in list(scores) if shortlists[name] is shortlist})
    chosen: dict[str, Tensor] = {}
    for shortlist in dict.fromkeys(shortlists.values()):
        chosen.update(confinement.in_whole(shortlist.select()))
    chosen = {t.name: drawn.joined(t.name, chosen.get(t.name, _nothing(t))) for t in targets}
    return from_first_rank(chosen)


def _scores(criterion: Criterion, target: Target, means: GradientMeans) -> Tensor:
    weight = _weight(target) if WEIGHT in criterion.uses else None
    with torch.no_grad():
        scores = criterion.score(weight, means)
    return check_scores(scores, target.delta.shape, name=target.name)


def _weight(target: Target) -> Tensor:
    layer: Any = target.layer
    return layer.base_tensor(target.which).detach()


def _nothing(target: Target) -> Tensor:
    return torch.empty(0, dtype=index_dtype(target.delta.numel), device=target.delta.indices.device)


def split_in_parts(targets: Sequence[Target], parts: int) -> list[list[Target]]:
    """Consecutive parts of about equal size; fewer where single tensors are large."""
    total = sum(target.delta.numel for target in targets)
    middles, before = [], 0
    for target in targets:
        middles.append((2 * before + target.delta.numel) * parts // (2 * total) if total else 0)
        before += target.delta.numel
    numbered = groupby(zip(middles, targets, strict=True), key=lambda pair: pair[0])
    return [[target for _, target in part] for _, part in numbered]


def _apply(config: SparseConfig, targets: Sequence[Target], selection: Mapping[str, Tensor]) -> None:
    for target in targets:
        target.delta.set_support(selection[target.name])
    config.counts = {target.name: target.delta.count for target in targets}


def _own_loss(model: Any, batch: Any) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ConfigError(
            "the model gave no loss: put labels into the batches, or give loss_fn=lambda model, batch: ..."
        )
    return loss


def _check_adapter(adapter_name: str, config: SparseConfig) -> Criterion:
    if not isinstance(config, (OneShotConfig, SpielConfig)) or config.selected_by != GRADIENTS:
        how = f"criterion {config.criterion!r}" if isinstance(config, OneShotConfig) else f"method {config.method!r}"
        raise ConfigError(
            f"adapter {adapter_name!r} has the {how}, which no gradients choose the weights of. For one that they do "
            "use OneShotConfig(criterion='fisher', ...)"
        )
    if not is_unselected(config):
        raise ConfigError(
            f"adapter {adapter_name!r} has its {sum((config.counts or {}).values())} weights already. Train them, or "
            "select anew in a new adapter: model.add_adapter(name, OneShotConfig(...))"
        )
    return resolve_criterion(config.criterion)
