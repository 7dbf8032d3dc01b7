"""A student and its teacher in a trainer, on a few rows: what tests of distillation begin from."""

from __future__ import annotations

import torch
from transformers import (
    BertForSequenceClassification,
)

from peft_sparse.distillation import DistillationTrainer
from tests.support.tokenizers import make_bert
from tests.support.training import make_args

IDS = torch.tensor([[1, 5, 7, 9, 2], [4, 6, 8, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
LABELLED = {**BATCH, "labels": torch.tensor([0, 2])}


def rows(count: int = 8, *, labels: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        ids = torch.randint(1, 40, (5,), generator=generator)
        ids[5 - number % 3 :] = 0
        found.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
        if labels:
            found[-1]["labels"] = int(ids[0]) % 3
    return found


def make_trainer(folder, student, teacher, *, cls=DistillationTrainer, labels=False, dense_args=None, **changes):
    loss, layers = changes.pop("loss", "general"), changes.pop("layers", None)
    more = {} if dense_args is None else {"dense_args": dense_args}
    return cls(
        model=student, teacher=teacher, loss=loss, layers=layers, args=make_args(folder, **{"max_steps": 2, **changes}),
        train_dataset=rows(labels=labels), eval_dataset=rows(4, labels=labels), **more,
    )  # fmt: skip


def classifier(**changes):
    return make_bert(40, cls=BertForSequenceClassification, num_labels=3, **changes)
