"""Languages of a few made-up words, and models small enough to train on them many times."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback

from peft_sparse import (
    LanguageSwitch,
    MultiSourceCollator,
    MultiSourceDataset,
    RandConfig,
    SparseConfig,
    language_below_task,
)
from tests.support.training import make_args, make_bert

SIZES = {"eng": 12, "ind": 5, "quy": 3}


def make_sources(sizes: dict[str, int] = SIZES) -> dict[str, list[dict[str, Any]]]:
    """Labelled rows of six ids; the second id is the language's number, the third the row's."""
    generator = torch.Generator().manual_seed(1)
    sources: dict[str, list[dict[str, Any]]] = {}
    for place, (language, size) in enumerate(sizes.items()):
        ids = torch.randint(0, 40, (size, 6), generator=generator)
        ids[:, 1], ids[:, 2] = place, torch.arange(size)
        sources[language] = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]
    return sources


def stack(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collates, and adds a number drawn from torch's generator, as masks would be."""
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in examples]) for name in examples[0]}
    batch["attention_mask"] = (torch.rand(batch["input_ids"].shape) > 0.3).long()
    return batch


def make_languages_and_task(task: SparseConfig | None = None) -> PeftModel:
    """Three frozen language adapters of different content, and a task adapter with a head, which trains."""
    task = task or RandConfig(num_weights=100, modules_to_save=["classifier"])
    model = get_peft_model(make_bert(), task, adapter_name="task")
    for seed, language in enumerate(SIZES):
        model.add_adapter(f"{language}-adapter", RandConfig(num_weights=100, init_weights=False, seed=seed))
    model.set_adapter("task")
    return model


class Seen(TrainerCallback):
    """Keeps what the model was given in training: (language, ids, mask drawn while collating)."""

    def __init__(self, model: PeftModel) -> None:
        self.batches: list[tuple[str, Tensor, Tensor]] = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True)

    def _keep(self, model: PeftModel, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.batches.append((kwargs["language"], kwargs["input_ids"].clone(), kwargs["attention_mask"].clone()))


def train_languages(folder: Any, *, resume: bool = False, trainer_class: type = Trainer, **changes: Any) -> Any:
    """A trained trainer; `trainer.seen` are its batches, `trainer.switch` its LanguageSwitch."""
    model = make_languages_and_task(changes.pop("task", None))
    batches = MultiSourceDataset(make_sources(), num_batches=16, batch_size=4, seed=3)
    seen = Seen(model)
    adapters = {language: f"{language}-adapter" for language in SIZES}
    switch = LanguageSwitch(model, batches.languages, activate=language_below_task(adapters, "task"))
    settings: dict[str, Any] = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, **changes}
    trainer = trainer_class(
        model=model,
        args=make_args(folder, **settings),
        train_dataset=batches,
        data_collator=MultiSourceCollator(stack),
        callbacks=[switch],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume else None)
    trainer.seen, trainer.switch = seen.batches, switch
    return trainer
