"""The phases of each method's training, taken as dry runs, and the memory that each of them needs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.indices import index_dtype
from ..errors import ConfigError
from ..selection.criteria import WEIGHT, resolve_criterion
from ..training.fitted_rate import InputMeter
from ..training.phases.gradient_means import GradientSums
from ..training.phases.one_shot import split_in_parts
from ..training.phases.targets import targets_of_adapter
from ..training.phases.untying import Ties
from ..training.spiel.gradient_tap import TRACKED
from ..tuners.common.config import TARGETS, Stage, WeightConfig
from ..tuners.common.targets import find_targets
from ..tuners.sparse_ft.allocation import Allocation, allocate, plan_groups
from ..tuners.sparse_ft.configs.base import WEIGHTS, SparseConfig
from ..tuners.sparse_ft.configs.one_shot import OneShotConfig, RandConfig
from ..tuners.sparse_ft.iteration import iter_deltas
from ..tuners.sparse_ft.layers.embedding import Embedding
from ..tuners.sparse_ft.layers.linear import Linear
from ..tuners.sparse_ft.resident import resident
from .base_weights import base_bytes, multiply_as_packed, nbytes, tensors_of
from .dry_run import StepMemory, measure_step
from .nomination import CANDIDATE_BYTES, watch_for_candidates
from .optimizer import PlannedOptimizer

# What a selection by gradients keeps of a weight that leads so far: its score and its place.
_CHOSEN_BYTES = 4 + 8
# The fields of a config that say what it targets.
_REQUEST = (
    "target_modules", "exclude_modules", "target_biases", "target_norms", "target_parameters", "layers_to_transform",
    "layers_pattern", "modules_to_save", "trainable_token_indices", "values_dtype", "task_type",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What a training run is planned for; see `plan_memory`."""

    batch_size: int
    sequence_length: int
    dtype: torch.dtype
    gradient_checkpointing: bool
    gradient_accumulation: bool
    load_in_4bit: bool
    optimizer: str | None
    device: str


@dataclass(frozen=True)
class PhaseMemory:
    """The most memory that one phase of a training run needs at a time, in bytes.

    Attributes:
        name: "training"; "estimating gradients" (SpIEL-AG); "selection by gradients" (one-shot criteria of gradients,
            SpIEL's `initial_support`); "dense phase" and "sparse phase" (LT-SFT); "mask phase" and "weight phase"
            (Ada-SFT).
        parts: {what takes it: bytes} at the moment when most is taken, so that they add up to the peak. "activations"
            is what the forward pass takes, logits and loss included; "temporaries" what is taken and given back.
        all_gradients: bytes of the gradients when all of them are there, at the end of the backward pass.
        host: what the computer's own memory takes, where the model is trained on an accelerator.
    """

    name: str
    parts: Mapping[str, int]
    all_gradients: int
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def phases_of(
    make: Callable[[], PreTrainedModel], config: PeftConfig | None, workload: Workload
) -> tuple[int, list[PhaseMemory]]:
    """(number of trained weights, the phases of a method in the order in which they come).

    Args:
        make: makes the base model, on the meta device and in training mode.
        config: the adapter's; None for full fine-tuning.
        workload: what for.
    """
    num_trained, phases = 0, []
    for stage in config.stages if isinstance(config, WeightConfig) else (Stage("training"),):
        own = replace(config, **stage.fields) if stage.fields else config
        if stage.selects:
            phases.append(_selection(make(), own, workload, name=stage.name))
        elif stage.trains == TARGETS:
            phases.append(_dense_phase(make(), own, workload, name=stage.name))
        elif isinstance(own, SparseConfig):
            watches = stage.watches_gradients
            num_trained, phase = _sparse_training(make(), own, workload, name=stage.name, nominates=watches)
            phases.append(_with_candidates(phase, phases[-1], own, num_trained) if watches else phase)
        else:
            num_trained, phase = _other_method(make(), own, workload, name=stage.name)
            phases.append(phase)
    return num_trained, phases


def _with_candidates(first: PhaseMemory, training: PhaseMemory, config: Any, num_trained: int) -> PhaseMemory:
    """What a window takes that watches gradients: its first micro-batch, or a later one beside the candidates.

    Where whole updates nominate, each of their micro-batches sees whole gradients beside what is tracked of the others.
    """
    candidates = round(num_trained * config.candidates_per_weight) * (CANDIDATE_BYTES + 4)
    later = replace(first, parts={**training.parts, "growth candidates": candidates})
    if config.nomination_updates:
        first = replace(first, parts={**first.parts, "growth candidates": TRACKED * candidates})
    return max(first, later, key=lambda phase: phase.total)


# The kinds of runs


def _other_method(
    model: PreTrainedModel, config: PeftConfig | None, workload: Workload, *, name: str
) -> tuple[int, PhaseMemory]:
    base, own_tensors = base_bytes(model, load_in_4bit=workload.load_in_4bit), tensors_of(model)
    if workload.load_in_4bit:
        multiply_as_packed(model)
    # PEFT's tuners write the names that they resolve into the config that they are given.
    own = copy.deepcopy(config)
    tuned: nn.Module = model if own is None else get_peft_model(model, own, low_cpu_mem_usage=True)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = PlannedOptimizer(workload.optimizer or "adamw", trained)
    step = _measure(model, tuned, optimizer, workload)
    # Not only what is trained: fixed masks, frozen projections.
    added = [tensor for key, tensor in tensors_of(tuned).items() if key not in own_tensors]
    adapter = {} if config is None else {"adapter": nbytes(added)}
    parts = {"base weights": base, **adapter, **_parts_of(step, optimizer)}
    return sum(p.numel() for p in trained), PhaseMemory(name, parts, nbytes(trained))


def _dense_phase(model: PreTrainedModel, config: SparseConfig, workload: Workload, *, name: str) -> PhaseMemory:
    base = base_bytes(model)
    # The adapter is there, with its heads and rows of tokens, and holds no weight of its own yet.
    tuned = get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=True)
    targets = targets_of_adapter(tuned, "default")
    Ties.untie(model, [(target.module, target.which) for target in targets])
    own = {id(target.delta.values) for target in targets}
    heads = [p for p in tuned.parameters() if p.requires_grad and id(p) not in own]
    trained = [target.parameter for target in targets]
    for target in targets:
        target.parameter.requires_grad_(True)
        target.delta.values.requires_grad_(False)
        target.delta.indices = target.delta.indices.to("meta")
    optimizer = PlannedOptimizer(workload.optimizer or "adamw", [*trained, *heads])
    step = _measure(model, tuned, optimizer, workload)
    untied = base_bytes(model) - base
    originals = {"copy of the weights": nbytes(trained)}
    on_device = originals if workload.device == "cpu" or config.l1 else {}
    parts = {"base weights": base + untied, **_parts_of(step, optimizer), **on_device}
    if heads:
        # The phase keeps a copy of them, to undo what it did to them.
        parts["heads"] = 2 * nbytes(heads)
    return PhaseMemory(name, parts, nbytes([*trained, *heads]), {} if on_device else originals)


def _sparse_training(
    model: PreTrainedModel, config: SparseConfig, workload: Workload, *, name: str, nominates: bool = False
) -> tuple[int, PhaseMemory]:
    base = base_bytes(model, load_in_4bit=workload.load_in_4bit)
    tuned = get_peft_model(model, _static(config, model), low_cpu_mem_usage=True)
    deltas = [(layer, delta) for _, layer, _, delta in iter_deltas(tuned)]
    for _, delta in deltas:
        delta.indices = delta.indices.to("meta")
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = PlannedOptimizer(workload.optimizer or config.own_optimizer, trained, [delta for _, delta in deltas])
    # Looking up in a tuned embedding depends on the tokens, which a dry run has not. It only touches their rows.
    lookups = [delta for layer, delta in deltas if isinstance(layer, Embedding)]
    _take_out_embeddings(tuned)
    optimizer.has_ages = config.grows_weights
    ratio = getattr(config, "candidates_per_weight", 1.0)
    watched = [delta for layer, delta in deltas if not isinstance(layer, Embedding)]
    has_parts = bool(getattr(config, "random_share", 0))
    scaled = _measure_inputs(tuned) if config.fitted_rate else [d.values for _, d in deltas] if has_parts else []
    step = _measure(
        model,
        tuned,
        optimizer,
        workload,
        unseen=[delta.values for delta in lookups],
        is_resident=not workload.load_in_4bit,
        watch=partial(watch_for_candidates, watched, config) if nominates else None,
        scaled=scaled,
    )
    values = nbytes(delta.values for _, delta in deltas)
    parts = {
        "base weights": base,
        "adapter values": values,
        "adapter indices": sum(delta.count * index_dtype(delta.numel).itemsize for _, delta in deltas),
        **_parts_of(step, optimizer),
    }
    if has_parts:
        parts["rates of the weights"] = sum(4 * delta.count for _, delta in deltas)
    own = {id(delta.values) for _, delta in deltas}
    heads = nbytes(p for p in trained if id(p) not in own)
    if heads:
        parts["heads"] = heads
    if getattr(config, "drop_by", None) == "change_since_reselection":
        parts["values of the last reselection"] = values
    if nominates and lookups:
        # The whole gradient of an embedding, its magnitudes, and two masks of it. It comes last in the backward pass.
        candidates = round(sum(delta.count for _, delta in deltas) * ratio) * CANDIDATE_BYTES
        largest = max(delta.numel for delta in lookups)
        at_the_end = {"activations": 0, "gradients": nbytes(trained), "temporaries": 10 * largest + candidates}
        parts = max(parts, {**parts, **at_the_end}, key=lambda moment: sum(moment.values()))
    return sum(p.numel() for p in trained), PhaseMemory(name, parts, nbytes(trained))


def _selection(model: PreTrainedModel, config: SparseConfig, workload: Workload, *, name: str) -> PhaseMemory:
    """The sums of the largest part of the targets, beside the backward passes that they are of."""
    base = base_bytes(model, load_in_4bit=workload.load_in_4bit)
    total = sum(group.count for group in plan_groups(config, find_targets(config, model), model))
    # SpIEL's own would open a window beside it, which it does when its support is chosen.
    request = {name: getattr(config, name) for name in _REQUEST}
    own = OneShotConfig(**request, num_weights=total, criterion=config.criterion)
    tuned = get_peft_model(model, own, low_cpu_mem_usage=True)
    uses = resolve_criterion(config.criterion).uses
    parts = split_in_parts(targets_of_adapter(tuned, "default"), config.selection_passes)
    largest = max(parts, key=lambda part: sum(target.delta.numel for target in part))
    looked_up = [target.delta.numel for target in largest if isinstance(target.layer, Embedding)]
    sums = [GradientSums(t.name, t.delta, uses) for t in largest if not isinstance(t.layer, Embedding)]
    for one in sums:
        one.delta.indices = one.delta.indices.to("meta")
        one.delta.observer = one
    _take_out_embeddings(tuned)
    _checkpoint(model, workload)

    def end_batch() -> None:
        tuned.zero_grad()
        for one in sums:
            one.end_batch("a batch")

    step = measure_step(
        tuned, _loss_of(model, tuned, workload), first_update=end_batch, update=end_batch, device_type=workload.device
    )
    means = sum(use != WEIGHT for use in uses)
    heads = nbytes(p for p in tuned.parameters() if p.requires_grad)
    return PhaseMemory(
        name,
        {
            "base weights": base,
            **({"heads": heads} if heads else {}),
            "sums of gradients": step.kept + 4 * (1 + means) * sum(looked_up),
            "weights that lead": _CHOSEN_BYTES * total,
            "gradients": step.gradients,
            "activations": step.activations,
            "temporaries": step.temporaries,
        },
        0,
    )


def _measure_inputs(tuned: nn.Module) -> list[nn.Parameter]:
    """Have the inputs of linear layers measured, as `fitted_rate` does at first; the values whose steps it scales."""
    fitted = [delta for _, layer, which, delta in iter_deltas(tuned) if isinstance(layer, Linear) and which == "weight"]
    for delta in fitted:
        delta.meter = InputMeter()
    return [delta.values for delta in fitted]


def _static(config: SparseConfig, model: nn.Module) -> SparseConfig:
    """A config of the same request whose support is there at once: sizes are all that matters here."""
    # Weights on the meta device cannot be ranked, and how the total falls to tensors makes little difference.
    planned = Allocation(find_targets(config, model)) if config.selected_by == WEIGHTS else allocate(config, model)
    if planned.counts is None:
        total = sum(group.count for group in plan_groups(config, planned.targets, model))
        return _rand_of(config, num_weights=total)
    static = _rand_of(config, counts=planned.counts, num_weights=max(1, sum(planned.counts.values())))
    static.asks_for_counts = True
    return static


def _rand_of(config: SparseConfig, **answer: Any) -> RandConfig:
    return RandConfig(**{name: getattr(config, name) for name in _REQUEST}, **answer)


# A step


def _measure(
    model: PreTrainedModel,
    tuned: nn.Module,
    optimizer: PlannedOptimizer,
    workload: Workload,
    *,
    unseen: Iterable[nn.Parameter] = (),
    is_resident: bool = False,
    watch: Callable[[], object] | None = None,
    scaled: Sequence[nn.Parameter] = (),
) -> StepMemory:
    _checkpoint(model, workload)
    hidden = list(unseen)

    def first_update() -> None:
        for values in hidden:
            values.grad = torch.empty_like(values)
        optimizer.first_step()

    def scaled_step() -> None:
        """What scaling a step takes: the values from before it, and how far it moved them."""
        before = [values.detach().clone() for values in scaled]
        if optimizer.takes_memory:
            optimizer.step()
        torch._foreach_sub([values.detach() for values in scaled], before)

    return measure_step(
        tuned,
        _loss_of(model, tuned, workload),
        first_update=first_update,
        update=scaled_step if scaled else optimizer.step if optimizer.takes_memory else None,
        watch=watch,
        keep_gradients=workload.gradient_accumulation,
        around=resident(tuned) if is_resident else nullcontext(),
        device_type=workload.device,
    )


def _checkpoint(model: PreTrainedModel, workload: Workload) -> None:
    """Recompute activations, if the workload does."""
    if not workload.gradient_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing.")
    # Its name from transformers 5.24 on, which warns of the older one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _parts_of(step: StepMemory, optimizer: PlannedOptimizer) -> dict[str, int]:
    return {
        "optimizer states": optimizer.state_bytes(),
        # The original entries of the weights that resident mode writes to.
        "originals": step.kept - optimizer.booked_bytes(),
        "gradients": step.gradients,
        "activations": step.activations,
        "temporaries": step.temporaries,
    }


def _loss_of(model: PreTrainedModel, tuned: nn.Module, workload: Workload) -> Callable[[], Tensor]:
    known = inspect.signature(model.forward).parameters
    if "input_ids" not in known:
        raise ConfigError(f"{type(model).__name__} takes no input_ids: only models of text can be planned.")
    shape = (workload.batch_size, workload.sequence_length)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    per_example = torch.zeros(workload.batch_size, dtype=torch.long, device="meta")
    if "start_positions" in known:
        inputs |= {"start_positions": per_example, "end_positions": per_example}
    elif "labels" in known:
        inputs["labels"] = per_example if "SequenceClassification" in type(model).__name__ else ids
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids

    def loss() -> Tensor:
        output = tuned(**inputs)
        return output.loss if getattr(output, "loss", None) is not None else output[0].sum()

    return loss


def _take_out_embeddings(tuned: nn.Module) -> None:
    for name, module in list(tuned.named_modules()):
        if isinstance(module, Embedding):
            parent, _, child = name.rpartition(".")
            base = module.get_base_layer()
            setattr(tuned.get_submodule(parent), child, base)
            # The backward pass goes all the way down, as it does for the delta.
            base.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
