"""Multi-source training in several processes: the function runs in each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from peft_sparse import LanguageSwitch, MultiSourceCollator, MultiSourceDataset, iter_deltas
from tests.support.distributed.adapters import found_in, make_adapted
from tests.support.distributed.trainers import pretend_accelerators
from tests.support.distributed.training import rank_and_world
from tests.support.languages import Seen, make_sources, stack, train_languages
from tests.support.training import make_args, make_bert


def train(folder: str, *, resume: bool = False) -> dict[str, Any]:
    """Eight updates, with a checkpoint after five."""
    _, world = rank_and_world()
    trainer = train_languages(
        Path(folder),
        resume=resume,
        save_strategy="steps",
        save_steps=5,
        ddp_backend="gloo" if world > 1 else None,
        average_tokens_across_devices=False,
    )
    logs = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "seen": [(language, ids) for language, ids, _ in trainer.seen],
        "counts": {key: value for key, value in logs[-1].items() if key.startswith("batches/")},
        "own": trainer.switch.counts,
        "values": {name: delta.held_values.detach() for name, _, _, delta in iter_deltas(trainer.model, "task")},
    }


def train_generator(folder: str, *, resume: bool = False, fsdp: bool = False) -> dict[str, Any]:
    """A hypernetwork, eight updates of two batches in all processes together, with a checkpoint after five."""
    _, world = rank_and_world()
    more: dict[str, Any] = {}
    if fsdp and world > 1:
        pretend_accelerators()
        settings = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": "FULL_STATE_DICT"}
        more = {"fsdp": True, "fsdp_config": settings}
    model = make_adapted("MAD-G-LS", make_bert(dropout=0.0, dtype=torch.float64))
    batches = MultiSourceDataset(make_sources({"eng": 12, "ace": 5, "quy": 3}), num_batches=16, batch_size=4, seed=3)
    seen = Seen(model)
    switch = LanguageSwitch(model, batches.languages)
    args = make_args(
        folder,
        save_strategy="steps",
        save_steps=5,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2 // world,
        ddp_backend="gloo" if world > 1 else None,
        # Every language reaches all of the hypernetwork.
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        **more,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=batches,
        data_collator=MultiSourceCollator(stack),
        callbacks=[switch],
    )
    # The loss is a mean over each batch, however many there are in a step.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-5" if resume else None)
    logs = [record for record in trainer.state.log_history if "loss" in record]
    config = json.loads(Path(folder, "checkpoint-8", "first", "adapter_config.json").read_text())
    return {
        "seen": seen.batches,
        "counts": {key: value for key, value in logs[-1].items() if key.startswith("batches/")},
        "own": switch.counts,
        "values": {key: value for key, value in found_in(trainer.model).items() if "gradient" not in key},
        "saved languages": sorted(config["saved_typology"]["vectors"]),
        "wrapper": type(trainer.model_wrapped).__name__,
    }
