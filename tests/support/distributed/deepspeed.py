"""DeepSpeed in several processes, on CPUs: every function runs in each of them."""

from __future__ import annotations

import os
from typing import Any

# Read when DeepSpeed is imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from peft import get_peft_model
from transformers import Trainer

from tests.support.distributed.refusals import told
from tests.support.distributed.training import batch, make_bert, make_config, make_optimizer, result
from tests.support.training import Labelled, make_args

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def zero(stage: int) -> dict[str, Any]:
    # Nothing stays in one piece between uses, however small.
    return {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}


def train(stage: int, method: str = "rand", steps: int = 7) -> dict[str, Any]:
    """A loop of one's own around an engine."""
    model = get_peft_model(make_bert(dropout=0.0), make_config(method, modules_to_save=None))
    config = {**CONFIG, "zero_optimization": zero(stage)}
    optimizer = make_optimizer("adamw", model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for step in range(steps):
        engine.backward(engine(**batch(100 * step)).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return result(engine)


def refuse(stage: int, method: str) -> tuple[str, str]:
    return told(lambda: train(stage, method))


def train_by_trainer(folder: str, stage: int, trainer_class: type = Trainer) -> dict[str, Any]:
    config = {**CONFIG, "zero_optimization": {**zero(stage), "stage3_gather_16bit_weights_on_model_save": True}}
    args = make_args(folder, max_steps=4, save_strategy="steps", save_steps=2, deepspeed=config, ddp_backend="gloo")
    model = get_peft_model(make_bert(dropout=0.0), make_config("rand"))
    trainer = trainer_class(model=model, args=args, train_dataset=Labelled())
    trainer.train()
    trainer.save_model()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return result(model)
