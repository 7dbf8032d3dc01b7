"""Hugging Face trainers in several processes: every function runs in each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from peft_sparse import LotteryTicketConfig, OneShotConfig, SparseTrainer
from peft_sparse.distillation import Teacher, distilled_trainer, make_student
from peft_sparse.training.spiel import callback
from tests.support.distributed.training import make_config, rank_and_world, result
from tests.support.training import Labelled, make_args, make_bert, make_trainer


def pretend_accelerators() -> None:
    """Let accelerate think that each process has an accelerator: it offers FSDP to no others."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def train(
    folder: str,
    method: str,
    *,
    resume: bool = False,
    own_trainer: bool = False,
    fsdp: dict[str, Any] | None = None,
    double: bool = True,
    accumulate: int = 1,
    **fields: Any,
) -> dict[str, Any]:
    """Eight updates, with a checkpoint after five: between the two updates of a window."""
    _, world = rank_and_world()
    if method != "rand":
        fields["total_steps"] = None
    saved = []
    save_state = callback.save_state
    callback.save_state = lambda *args: (saved.append(1), save_state(*args))
    more: dict[str, Any] = {}
    if fsdp is not None and world > 1:
        pretend_accelerators()
        more = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], **fsdp}}
    base = make_bert(dropout=0.0, dtype=torch.float64 if double else torch.float32)
    args = make_args(
        folder,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=accumulate,
        save_strategy="steps",
        save_steps=5,
        ddp_backend="gloo" if world > 1 else None,
        # It is for losses that count tokens; a classifier's, which does not, would be multiplied by the processes.
        average_tokens_across_devices=False,
        **more,
    )
    trainer = (SparseTrainer if own_trainer else Trainer)(
        model=get_peft_model(base, make_config(method, **fields)), args=args, train_dataset=Labelled()
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-5" if resume else None)
    optimizer = trainer.optimizer
    found = result(trainer.model_wrapped, getattr(optimizer, "optimizer", optimizer))
    replaced = found.pop("replaced", None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "end": found,
        "replaced": replaced,
        "losses": losses,
        "wrapper": type(trainer.model_wrapped).__name__,
        "saved": len(saved),
        "initialized": dist.is_initialized(),
    }


class StopAt(TrainerCallback):
    """Ends the process in the middle of a phase."""

    def __init__(self, phase: str) -> None:
        self.phase, self.trainer = phase, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.trainer._phase_name == self.phase:
            raise SystemExit(f"stopped in the {self.phase} phase")


def train_lottery(folder: str, *, stop: str = "", resume: bool = False) -> dict[str, Any]:
    """LT-SFT's two phases in one trainer, the best model of each."""
    stopper = StopAt(stop)
    trainer = make_trainer(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        ddp_backend="gloo",
        dense_args={"max_steps": 4},
        callbacks=[stopper],
    )
    stopper.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return {**result(trainer.model), "wrapper": type(trainer.model_wrapped).__name__}


def train_one_shot(folder: str) -> dict[str, Any]:
    """A trainer that selects by the gradients of its own batches."""
    config = OneShotConfig(num_weights=200, selection_batches=3, modules_to_save=["classifier"])
    trainer = make_trainer(
        folder,
        model=get_peft_model(make_bert(), config),
        max_steps=3,
        per_device_train_batch_size=2,
        ddp_backend="gloo",
    )
    trainer.train()
    return {**result(trainer.model), "wrapper": type(trainer.model_wrapped).__name__}


def distil(folder: str) -> dict[str, Any]:
    """A lottery ticket that a teacher draws, two rows in each step of all processes together; and what DDP holds."""
    _, world = rank_and_world()
    student = make_student(make_bert(dropout=0.0, dtype=torch.float64), stride=2)
    config = LotteryTicketConfig(num_weights=60, target_modules="all", modules_to_save=["classifier"])
    teacher = Teacher(make_bert(seed=1, dropout=0.0, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    trainer = distilled_trainer(SparseTrainer)(
        model=get_peft_model(student, config, autocast_adapter_dtype=False),
        teacher=teacher,
        loss="teacher_forcing",
        args=make_args(
            folder,
            max_steps=3,
            per_device_train_batch_size=4 // world,
            ddp_backend="gloo" if world > 1 else None,
        ),
        train_dataset=Labelled(24),
        dense_args={"max_steps": 3},
    )
    trainer.train()
    records = [*trainer.dense_state.log_history, *trainer.state.log_history]
    terms = ("loss", "loss_attention", "loss_hidden", "loss_prediction")
    wrapped = {id(parameter) for parameter in trainer.model_wrapped.parameters()}
    return {
        "end": result(trainer.model),
        "logs": [{name: record[name] for name in terms} for record in records if "loss_hidden" in record],
        "wrapper": type(trainer.model_wrapped).__name__,
        "teacher is wrapped": any(id(parameter) in wrapped for parameter in teacher.model.parameters()),
        "teacher moved": any(not torch.equal(t, before[name]) for name, t in teacher.model.state_dict().items()),
    }
