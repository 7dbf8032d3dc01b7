"""TRL's trainer on a few sentences."""

from __future__ import annotations

import pytest

from tests.support.tokenizers import of_words
from tests.support.training import make_args


def trl_trainer(folder, model, **extra):
    trl = pytest.importorskip("trl", reason="tests TRL's own trainer: pip install 'peft-sparse[trl]'")
    from datasets import Dataset

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "old", "cat", "sees", "a", "red", "bird", "young", "dog"]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "seed": 42, "bf16": False, "max_length": 16}
    settings |= extra.pop("settings", {})
    return extra.pop("trainer", trl.SFTTrainer)(
        model=model,
        args=make_args(folder, cls=trl.SFTConfig, **settings),
        train_dataset=Dataset.from_dict({"text": ["the old cat sees a red bird", "a young dog sees the cat"] * 4}),
        processing_class=of_words(words, eos_token="<eos>"),
        **extra,
    )
