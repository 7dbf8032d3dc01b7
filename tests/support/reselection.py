"""SpIEL on a tiny classifier, and on a layer that is used several times, in loops of a few lines."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sparse import SpielAGConfig, SpielMAConfig
from peft_sparse.training.spiel.reselector import iter_reselectors
from tests.support.training import make_bert

METHODS = [SpielAGConfig, SpielMAConfig]
QUICK = {"density": 0.05, "reselection_steps": 4, "estimation_steps": 2, "total_steps": 20}


def make(cls=SpielAGConfig, **fields):
    # One layer has six matrices: enough to move weights between, in tests that take hundreds of steps.
    model = make_bert(dropout=0.0, layers=1)
    return get_peft_model(model, cls(**{**QUICK, **fields}))


def driver(model):
    (found,) = iter_reselectors(model)
    return found


def batch(step: int, size: int = 4):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (size, 6), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def train(model, optimizer, steps, *, accumulate=1, clip=None):
    losses = []
    for step in steps:
        for micro in range(accumulate):
            loss = model(**batch(100 * step + micro)).loss / accumulate
            loss.backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def optimizer_of(model, cls=torch.optim.AdamW, lr=1e-2):
    return cls([p for p in model.parameters() if p.requires_grad], lr=lr)


FIELDS = {"density": 0.2, "reselection_steps": 6, "estimation_steps": 3, "total_steps": 60}


class Shared(nn.Module):
    """One layer, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 3)
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self._block(x) if self.reentrant is None else checkpoint(self._block, x, use_reentrant=self.reentrant)
        return self.outer(x)

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


def shared(cls: Any = SpielAGConfig, **fields: Any):
    torch.manual_seed(0)
    return get_peft_model(Shared(), cls(**{**FIELDS, "target_modules": ["inner", "outer"], **fields}))


def data(step: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()
