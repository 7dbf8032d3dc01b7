"""A model, a data set and a trainer small enough to train many times in a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification, TrainerCallback, TrainingArguments

from peft_sparse import SparseConfig, iter_deltas
from peft_sparse.training.trainer.trainer import SparseTrainer
from tests.support.models import bert

VOCAB = 40


def make_bert(
    *, seed: int = 0, dropout: float = 0.1, dtype: torch.dtype = torch.float32, layers: int = 2
) -> BertForSequenceClassification:
    """A classifier of about 8,000 weights, with dropout on so that the state of the random generators matters."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = bert(
        BertForSequenceClassification,
        seed=seed,
        vocab_size=VOCAB,
        intermediate_size=32,
        num_labels=3,
        num_hidden_layers=layers,
        **rates,
    )
    return model.to(dtype).train()


def make_adapted(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.1, layers: int = 2, **config: Any
) -> PeftModel:
    """The classifier with an unselected lottery ticket of 200 weights and a trainable head."""
    ticket = {"method": "lottery_ticket", "num_weights": 200, "modules_to_save": ["classifier"]}
    base = make_bert(seed=seed, dtype=dtype, dropout=dropout, layers=layers)
    return get_peft_model(base, SparseConfig(**{**ticket, **config}))


class Labelled(torch.utils.data.Dataset):
    """Token ids whose first token says the class, more or less."""

    def __init__(self, size: int = 24, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, VOCAB, (size, 6), generator=generator)
        self.labels = self.ids[:, 0] % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(6, dtype=torch.long), "labels": self.labels[i]}


def make_args(folder: Any, *, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "learning_rate": 1e-2,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }
    return cls(output_dir=str(folder), **settings)


def make_trainer(
    folder: Any, *, model: PeftModel | None = None, dense_args: Any = None, mask_args: Any = None, **changes: Any
) -> Any:
    callbacks = changes.pop("callbacks", None)
    optimizers = changes.pop("optimizers", (None, None))
    return SparseTrainer(
        model=model if model is not None else make_adapted(),
        args=make_args(folder, **changes),
        train_dataset=Labelled(),
        eval_dataset=Labelled(8, seed=2),
        dense_args=dense_args,
        mask_args=mask_args,
        callbacks=callbacks,
        optimizers=optimizers,
    )


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class KillAt(TrainerCallback):
    """Ends a trainer's run before a step of a phase, after the checkpoint of the step before; or when a phase ends."""

    def __init__(self, phase: str, step: int | None = None) -> None:
        self.phase, self.step, self.trainer = phase, step, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._phase_name == self.phase and state.global_step == self.step:
            raise Killed

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._phase_name == self.phase and self.step is None:
            raise Killed


def base_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copies of all parameters but the adapters' values."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "sparse_ft_" not in n}


def deltas(model: PeftModel, adapter_name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter: (indices, values)} of an adapter."""
    found = iter_deltas(model, adapter_name)
    return {name: (d.indices.clone(), d.values.detach().clone()) for name, _, _, d in found}


def head(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the trained head's parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save.default" in n}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def assert_same_tensors(found: Any, expected: Any) -> None:
    """Equal bit for bit, key by key."""
    assert found.keys() == expected.keys()
    for name in expected:
        for a, b in zip(as_tuple(found[name]), as_tuple(expected[name]), strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


# The loss falls, so the first of its checkpoints is the "best" one.
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}


def assert_best_is_loaded(trainer: Any) -> None:
    """A run with `BEST` ends with the weights of its best checkpoint, and not with its last ones."""
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.max_steps
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
