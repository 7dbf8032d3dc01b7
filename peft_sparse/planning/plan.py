"""How much memory a training will need, before the model is there: from its config alone."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints.architecture import class_name_of, read_config, skeleton
from ..checkpoints.tasks import BASE_CLASSES
from ..checks import check_one_of, check_whole
from ..errors import ConfigError, SparseError
from ..tuners.common.config import WeightConfig
from ..tuners.common.target_checks import warned_once
from .optimizer import OPTIMIZERS
from .phases import PhaseMemory, Workload, phases_of

DEVICES = ("cuda", "cpu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` found.

    Attributes:
        model: name of the model.
        method: "rand", "spiel_ag", ...; PEFT's type in lower case for its own methods; "full" without any.
        num_trained: weights that are tuned (in the sparse phase, for methods of two phases).
        workload: what was planned for.
        phases: in the order in which they come.
        ways_to_less: the options of `plan_memory` that were not taken, are possible with this model and method, and
            save memory: "gradient_checkpointing", "load_in_4bit".
    """

    model: str
    method: str
    num_trained: int
    workload: Workload
    phases: tuple[PhaseMemory, ...]
    ways_to_less: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes that the run needs at most."""
        return max(phase.total for phase in self.phases)

    def fits(self, limit: int) -> bool:
        """Whether the peak stays below a number of bytes. Fragmentation and CUDA's own context come on top of it."""
        return self.peak <= limit

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        phases = [
            {
                "name": phase.name,
                "total": phase.total,
                "parts": dict(phase.parts),
                "all_gradients": phase.all_gradients,
                "host": dict(phase.host),
            }
            for phase in self.phases
        ]
        workload = {**dataclasses.asdict(self.workload), "dtype": str(self.workload.dtype).removeprefix("torch.")}
        return {
            "model": self.model,
            "method": self.method,
            "num_trained": self.num_trained,
            "peak": self.peak,
            "workload": workload,
            "phases": phases,
        }


def plan_memory(
    model: str | os.PathLike[str] | PretrainedConfig,
    config: PeftConfig | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation: bool = False,
    load_in_4bit: bool = False,
    optimizer: str | None = None,
    device: str = "cuda",
    task_type: str | None = None,
) -> MemoryPlan:
    """Say how much memory a training run will need, and for what.

    Nothing is guessed: the model is made on the meta device, with the adapter in it, and takes real training steps
    there, whose every allocation is booked. That needs the model's config alone, and no weights.

    Args:
        model: a directory or a repository on the Hub, or a config of transformers.
        config: the adapter's; None for full fine-tuning.
        batch_size: examples in a micro-batch, per device.
        sequence_length: tokens in an example.
        dtype: of the base weights; the config's own if None, or float32.
        gradient_checkpointing: activations inside of layers are computed again in the backward pass.
        gradient_accumulation: several micro-batches make an update, so that gradients are there during forwards.
        load_in_4bit: linear weights are quantised by bitsandbytes (NF4); `dtype` is what they compute in.
        optimizer: one of `OPTIMIZERS`; the one that `SparseTrainer` takes for the method if None.
        device: "cuda" or "cpu", whose kernels are assumed.
        task_type: PEFT's name of the task; the config's own, or else the class that the model's config names.

    Raises:
        ConfigError: an argument out of range, a model that cannot be made or takes no text, or a method that has no way
            to train it, or whose step depends on data (says what torch or PEFT says).

    Cost: a few seconds; no memory to speak of.

    What is not in it: CUDA's context (some hundred MB), fragmentation, workspaces of libraries inside of a kernel, and
    what other processes take. Nor autocast: the model is taken to compute in the dtype of its weights, adapters in
    theirs (LoRA's copies of its inputs in float32 over weights of 16 bits). Nor what PEFT's
    `prepare_model_for_kbit_training` widens to float32 of a model in 4 bits: embeddings, norms and the head.
    """
    workload = Workload(
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype or torch.float32,
        gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation=gradient_accumulation,
        load_in_4bit=load_in_4bit,
        optimizer=optimizer,
        device=device,
    )
    _check(workload)
    is_config = isinstance(model, PretrainedConfig)
    base = copy.deepcopy(model) if is_config else read_config(model)
    base.use_cache = False  # as in transformers' trainer
    _name_padding(base)
    own_dtype = base.dtype if base.dtype in _DTYPES else torch.float32
    workload = dataclasses.replace(workload, dtype=dtype or own_dtype)
    if task_type is not None:
        check_one_of("task_type", task_type, BASE_CLASSES)
    class_name = class_name_of(base, task_type=task_type or getattr(config, "task_type", None))

    can_checkpoint = False

    def make() -> PreTrainedModel:
        nonlocal can_checkpoint
        made = skeleton(base, class_name).to(workload.dtype).train()
        _check_length(made, sequence_length)
        can_checkpoint = made.supports_gradient_checkpointing
        return made

    takes_4bit = config is not None and getattr(config, "takes_quantised_base", True)
    if load_in_4bit and not takes_4bit:
        raise ConfigError(
            f"load_in_4bit=True and {_method_of(config)!r} do not go together: the weights themselves train in it. "
            "Take a method without a dense phase, such as 'spiel_ag', or an unquantised model."
        )
    num_trained, phases = _dry_run(make, config, workload)
    ways = {
        "gradient_checkpointing": not gradient_checkpointing and can_checkpoint,
        "load_in_4bit": not load_in_4bit and takes_4bit,
    }
    return MemoryPlan(
        model=base.name_or_path or class_name if is_config else os.fspath(model),
        method=_method_of(config),
        num_trained=num_trained,
        workload=workload,
        phases=tuple(phases),
        ways_to_less=tuple(name for name, is_possible in ways.items() if is_possible),
    )


def _name_padding(base: PretrainedConfig) -> None:
    """Let a model that knows no padding take a batch: classifiers look for the last token before it."""
    text = base.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0


def _dry_run(
    make: Callable[[], PreTrainedModel], config: PeftConfig | None, workload: Workload
) -> tuple[int, list[PhaseMemory]]:
    try:
        with warned_once(), warnings.catch_warnings():
            # Of names that transformers itself and PEFT still use.
            warnings.simplefilter("ignore", FutureWarning)
            return phases_of(make, config, workload)
    except SparseError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{_method_of(config)!r} cannot be planned for this model: making it, or a step of it without data, fails "
            f"with {type(error).__name__}: {error}"
        ) from error


def _check(workload: Workload) -> None:
    for name in ("batch_size", "sequence_length"):
        check_whole(name, getattr(workload, name))
    if workload.dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {[str(d) for d in _DTYPES]}, got {workload.dtype}.")
    if workload.optimizer is not None:
        check_one_of("optimizer", workload.optimizer, OPTIMIZERS)
    check_one_of("device", workload.device, DEVICES)


def _check_length(model: PreTrainedModel, sequence_length: int) -> None:
    """Refuse more tokens than the model has positions for: on the meta device nothing would fail."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    # Tables like RoBERTa's begin to count behind the padding's row.
    tables = [m for name, m in model.named_modules() if "position" in name.rpartition(".")[2]]
    limits += [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if known and sequence_length > min(known):
        raise ConfigError(
            f"sequence_length must be at most {min(known)}, the positions of this model (max_position_embeddings), got "
            f"{sequence_length}. To plan for a longer context, give a config that has more of them."
        )


def _method_of(config: PeftConfig | None) -> str:
    if isinstance(config, WeightConfig):
        return config.label
    return "full" if config is None else str(getattr(config.peft_type, "value", config.peft_type)).lower()
