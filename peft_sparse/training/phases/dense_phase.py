"""The dense phase of LT-SFT and DeFT-X: base parameters train, are compared with their start, and are rewound."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.indices import index_dtype
from ...errors import ConfigError, SelectionError
from ...optim import l1 as regularization
from ...selection.change import difference
from ...selection.lazy_tensors import LazyTensors
from ...selection.rows import RowConfinement
from ...selection.top_k import streamed_top_k
from ...tuners.common.base_model import base_model_of
from ...tuners.common.layer import PARAMETERS
from ...tuners.common.packed import find_backend, is_packed
from ...tuners.common.targets import model_numel, targets_of
from ...tuners.sparse_ft.allocation import plan_groups
from ...tuners.sparse_ft.configs.base import DENSE_PHASE, SparseConfig
from ...tuners.sparse_ft.configs.two_phase import DeftXConfig
from ...tuners.sparse_ft.iteration import iter_layers
from ...tuners.sparse_ft.layers.moved import Moved
from ...tuners.sparse_ft.unselected import is_unselected, open_phase, set_open_phase
from ..distributed import from_first_rank, refuse_sharded
from ..progress import progress_bar
from .denoiser import Denoiser
from .dense_checkpoint import FILE_NAME, load_dense_phase, save_dense_phase
from .phase import Phase, first_phase
from .targets import Target, check_active, check_trains, refuse_wrapper, sparse_config, targets_of_adapter
from .untying import Ties

logger = logging.getLogger(__name__)


@first_phase
class DensePhase(Phase):
    """The first phase of LT-SFT and DeFT-X, in which how far each targeted base parameter moves decides what to tune.

    Made by `start_dense_phase`. As a context manager it never leaves a moved weight behind: leaving the block starts
    the sparse phase if `select` was called in it, and takes everything back otherwise, so also after an exception.

        with start_dense_phase(model) as phase:
            train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0))
            phase.select()
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))

    During the phase the targeted parameters and whatever was trainable before it (heads in `modules_to_save`) are
    trainable, the adapter's own values are not. Other active adapters stay applied as they are: scores are the change
    of the base parameter under them. What the parameters have moved by acts where the adapter does: with
    `model.disable_adapter()` the model is the base model, and an adapter that is set alone acts on that.

    Attributes:
        model: the model it was started on.
        adapter_name: the adapter that it chooses weights for.
        targets: the parameters that train.
        originals: {parameter name: where it started}.
        others: {name: tensor} of everything else that training may change: heads, and buffers.
        start_of_others: {name: where it started}.
        l1_coefficient: lambda/N of the penalty lambda/N * sum |theta - theta0|; 0 for none.
        is_open: False once the phase was left.
    """

    name: ClassVar = DENSE_PHASE
    args_name: ClassVar = "dense_args"
    folder: ClassVar = "_dense"
    file_name: ClassVar = FILE_NAME
    holds_adapter: ClassVar = False

    def __init__(self, model: nn.Module, adapter_name: str, config: SparseConfig, targets: list[Target]) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.targets = targets
        self.is_open = True
        self._config = config
        self._root = base_model_of(model)
        self._selection: dict[str, Tensor] | None = None
        self.l1_coefficient = config.l1 / model_numel(self._root) if config.l1 else 0.0
        self._ties = Ties.untie(self._root, [(t.module, t.which) for t in targets])
        own = {id(parameter) for t in targets for parameter in (t.parameter, t.delta.values)}
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
        buffers = {n: b for n, b in model.named_buffers() if "sparse_ft_" not in n}
        self.others: dict[str, Tensor] = {**trainable, **buffers}
        # The penalty needs the originals at every step; otherwise they are better kept out of an accelerator's memory.
        self.originals = {t.name: _copy(t.parameter, stay=bool(self.l1_coefficient)) for t in targets}
        self.start_of_others = {name: _copy(tensor) for name, tensor in self.others.items()}
        self._flags = [(p, p.requires_grad) for t in targets for p in (t.parameter, t.delta.values)]
        for target in targets:
            target.parameter.requires_grad_(True)
            target.delta.values.requires_grad_(False)
        self._mark_moved()
        if self.l1_coefficient:
            regularization.penalised.add(self)
        set_open_phase(self._root, self)

    def _mark_moved(self) -> None:
        """Tell the layers where their parameters started, those too that look up in a tuned embedding's matrix."""
        originals = {id(target.parameter): self.originals[target.name] for target in self.targets}
        for _, layer in iter_layers(self._root):
            held = layer.get_base_layer()._parameters
            own = {which: originals[id(held[which])] for which in PARAMETERS if id(held.get(which)) in originals}
            layer.moved = Moved(self.adapter_name, own) if own else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied model is in the same phase, and is penalised like what it was made from.
        vars(self).update(state)
        if self.is_open and self.l1_coefficient:
            regularization.penalised.add(self)

    @property
    def numel(self) -> int:
        """How many base weights train."""
        return sum(target.delta.numel for target in self.targets)

    # ---- selection ---------------------------------------------------------------------------------

    def scores(self) -> Mapping[str, Tensor]:
        """|theta - theta0| of every target, float32, in the parameter's shape; for DeFT-X, denoised before |.|.

        Computed when asked for, one tensor at a time, and not kept.

        Raises:
            SelectionError: (when a tensor is asked for) the run diverged to an infinite weight.
        """
        self._check_open("score")
        return self._scores(self._new_denoiser())

    def _scores(self, denoiser: Denoiser | None) -> LazyTensors:
        targets = {target.name: target for target in self.targets}

        def score(name: str) -> Tensor:
            target = targets[name]
            parameter = target.parameter.detach()
            moved = difference(parameter, self.originals[name].to(parameter.device))
            if moved.numel() and any(extreme.isinf() for extreme in moved.aminmax()):
                raise SelectionError(
                    f"the dense phase diverged: {name} holds an infinite weight. Lower its learning rate, or clip "
                    "gradients."
                )
            if denoiser is not None:
                moved = denoiser(name, target.module, moved)
            return moved.abs_()

        return LazyTensors(list(targets), score)

    def _new_denoiser(self) -> Denoiser | None:
        return Denoiser(self._config) if isinstance(self._config, DeftXConfig) else None

    def select(self) -> dict[str, Tensor]:
        """Choose the weights that moved most: exactly as many as the adapter's config asks for.

        Nothing is rewound yet; several calls may be made, and the last one counts. Every process must call it.

        Returns:
            {parameter name: [k_i] sorted flat indices}; also what the sparse phase will tune.

        Raises:
            SelectionError: fewer weights moved than are asked for (DeFT-X: have a non-zero denoised difference), or the
                training diverged. The phase stays open: train on, or leave it.

        Cost: each target is scored once, and one tensor's scores are in memory at a time; besides, up to 40 bytes for
        each of the K weights, on the CPU. DeFT-X decomposes each matrix: see `selection.denoise.denoise`.
        """
        self._check_open("select")
        denoiser = self._new_denoiser()
        scores = self._scores(denoiser)
        confinement = RowConfinement(self._config.support_rows)
        indices: dict[str, Tensor] = {}
        with progress_bar("selecting weights", len(self.targets)) as advance:
            for group in plan_groups(self._config, targets_of(t.name for t in self.targets), self._root):
                stream = ((name, confinement.confine(name, s)) for name, s in _scored(group.members, scores, advance))
                indices.update(confinement.in_whole(streamed_top_k(stream, group.count, min_score=0.0)))
        if denoiser is not None:
            denoiser.log()
        self._selection = from_first_rank({target.name: indices[target.name] for target in self.targets})
        logger.info(
            "dense phase of adapter %r: selected %d of %d weights",
            self.adapter_name,
            sum(chosen.numel() for chosen in self._selection.values()),
            self.numel,
        )
        return self._selection

    # ---- leaving -----------------------------------------------------------------------------------

    def start_sparse_phase(self) -> dict[str, int]:
        """Rewind and go on with the selected weights alone (selecting them now if `select` was not called).

        Targeted parameters are restored bit for bit, heads and buffers to where the dense phase found them. Make a new
        optimizer: what the old one holds is frozen now.

        Returns:
            {parameter name: number of tuned weights}, also stored as `counts` in the model's copy of the config.

        Raises:
            SelectionError: as `select`.
        """
        self._check_open("start the sparse phase")
        selection = self._selection if self._selection is not None else self.select()
        self.abort()
        for target in self.targets:
            target.delta.set_support(selection[target.name].to(index_dtype(target.delta.numel)))
        counts = {target.name: target.delta.count for target in self.targets}
        self._config.counts = counts
        return counts

    def abort(self) -> None:
        """Leave the phase as if it had never been: weights, heads, ties, and what is trainable."""
        self._check_open("abort")
        self.is_open = False
        regularization.penalised.discard(self)
        for target in self.targets:
            target.parameter.data.copy_(self.originals[target.name])
            target.parameter.grad = None
        for name, tensor in self.others.items():
            tensor.data.copy_(self.start_of_others[name])
            tensor.grad = None
        for parameter, was_trainable in self._flags:
            parameter.requires_grad_(was_trainable)
        self._ties.retie()
        set_open_phase(self._root, None)
        for _, layer in iter_layers(self._root):
            layer.moved = None
        self.originals, self.start_of_others = {}, {}

    def __enter__(self) -> DensePhase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_open:
            return
        if kind is None and self._selection is not None:
            self.start_sparse_phase()
        else:
            self.abort()

    def _check_open(self, what: str) -> None:
        if not self.is_open:
            raise SelectionError(
                f"cannot {what}: the dense phase of adapter {self.adapter_name!r} is over. start_dense_phase(model) "
                "starts one."
            )

    # ---- L1 ----------------------------------------------------------------------------------------

    def pulls(self) -> Iterator[regularization.Pull]:
        """The L1 penalty of the config on the targets: lambda/N * |theta - theta0|."""
        for target in self.targets:
            yield regularization.Pull(target.parameter, self.l1_coefficient, self.originals[target.name])

    # ---- in a trainer ------------------------------------------------------------------------------

    @classmethod
    def warn_of_args(cls, changes: Mapping[str, Any]) -> None:
        """Warn of weight decay."""
        if changes.get("weight_decay"):
            logger.warning(
                "dense_args: weight_decay=%s moves every weight in the dense phase, the largest most, and the "
                "selection cannot tell that from learning.",
                changes["weight_decay"],
            )

    @classmethod
    def begin(cls, trainer: Any, adapter_name: str) -> DensePhase:
        """`start_dense_phase` on the trainer's model."""
        return start_dense_phase(trainer.model, adapter_name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """See `save_dense_phase`."""
        save_dense_phase(self, directory)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """See `load_dense_phase`."""
        load_dense_phase(self, directory)


def start_dense_phase(model: nn.Module, adapter_name: str = "default") -> DensePhase:
    """Unfreeze exactly the targeted base parameters and remember where they start.

    Use weight decay 0 in this phase, as the authors do: decay moves every weight, and would be taken for learning. A
    base model in bfloat16 or float16 gets a warning, because it loses most small updates.

    Args:
        model: a PeftModel (or a tuner) whose adapter has the method "lottery_ticket" and no weights yet. Not wrapped:
            DDP is made anew for each phase, after its start, because each trains other parameters.
        adapter_name: that adapter; it must be active.

    Returns:
        DensePhase: its `select()` and `start_sparse_phase()` end it, as do the functions of the same names; also a
        context manager.

    Raises:
        ConfigError: the adapter is of another method, has its weights already, is not active, frozen or merged; the
            base is quantised, sharded or on the meta device; the model is wrapped; another dense phase is open.

    Cost: a copy of the targeted parameters on the CPU (on their own device with `l1`), and one of a tied output matrix
    beside it. A forward with the adapter disabled or inactive copies them to their own device, one layer at a time.
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3.1. Differs from the authors' code in: K is exact, fewer than
    K moved weights are an error, weights are restored from copies and never by subtraction, and only what is targeted
    is unfrozen.
    """
    refuse_wrapper(model)
    config = sparse_config(model, adapter_name)
    targets = targets_of_adapter(model, adapter_name)
    _check_adapter(model, adapter_name, config)
    for target in targets:
        check_active(adapter_name, target)
        _check_target(target)
    check_trains(adapter_name, targets)
    for _, layer in iter_layers(model):
        layer.restore()
    _warn_of_low_precision(targets)
    return DensePhase(model, adapter_name, config, targets)


def _scored(
    names: Sequence[str], scores: Mapping[str, Tensor], advance: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, scores[name]
        advance()


def _copy(tensor: Tensor, *, stay: bool = False) -> Tensor:
    return tensor.detach().to(tensor.device if stay else "cpu", copy=True)


def _check_adapter(model: nn.Module, adapter_name: str, config: SparseConfig) -> None:
    if config.selected_by != DENSE_PHASE:
        what_then = "call select_by_gradients(model, batches)" if is_unselected(config) else "train it in any loop"
        raise ConfigError(
            f"adapter {adapter_name!r} has the method {config.method!r}, whose weights need no dense phase: "
            f"{what_then}. For LT-SFT use LotteryTicketConfig(...)"
        )
    if not is_unselected(config):
        raise ConfigError(
            f"adapter {adapter_name!r} has its {sum((config.counts or {}).values())} weights already. Train them, or "
            "select anew in a new adapter: model.add_adapter(name, LotteryTicketConfig(...))"
        )
    other = open_phase(base_model_of(model))
    if other is not None:
        raise ConfigError(
            f"a {other.name} phase of adapter {other.adapter_name!r} is open on this model. Select and rewind "
            "first, or abort() it."
        )


def _check_target(target: Target) -> None:
    if (target.which == "weight" and find_backend(target.module) is not None) or is_packed(target.parameter):
        raise ConfigError(
            f"{target.name} is quantised, and a dense phase trains the base weights themselves. Load the base "
            "unquantised, or use a method without a dense phase: SpIEL, or Rand-SFT (RandConfig)."
        )
    refuse_sharded(target.name, target.parameter)


def _warn_of_low_precision(targets: list[Target]) -> None:
    low = sorted({str(t.parameter.dtype) for t in targets if t.parameter.dtype in (torch.bfloat16, torch.float16)})
    if low:
        logger.warning(
            "The dense phase trains base weights in %s, which rounds small updates away: at a learning rate of 5e-5, "
            "bfloat16 weights above 0.016 do not move at all, so the selection would prefer small weights. Load the "
            "base in float32 and train under autocast.",
            " and ".join(low),
        )
