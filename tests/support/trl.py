"""TRL's trainer on a few sentences."""

from __future__ import annotations

import pytest


def trl_trainer(folder, model, **extra):
    trl = pytest.importorskip("trl", reason="tests TRL's own trainer: pip install 'peft-sparse[trl]'")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "old", "cat", "sees", "a", "red", "bird", "young", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "max_length": 16,
        **extra.pop("settings", {}),
    }
    return extra.pop("trainer", trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_dict({"text": ["the old cat sees a red bird", "a young dog sees the cat"] * 4}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        **extra,
    )
