"""How the thesis trains each task, as data. Learning rates fall linearly to 0, without warm-up and weight decay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One task of the chapters.

    Attributes:
        epochs: of the sparse phase, or of a method with one phase.
        dense_epochs: of LT-SFT's dense phase, which overfits to the source language sooner.
        batch_size: rows in a step.
        rate: peak learning rate.
        density: share of the encoder's weights in the task adapter.
        max_length: in subwords.
        source: where this is from.
    """

    epochs: int
    dense_epochs: int
    batch_size: int
    rate: float
    density: float = 0.08
    max_length: int = 256
    source: str = "thesis, section 4.4.3"


# 14,155,776 weights are 8 % of multilingual BERT; the sections count the same number for XLM-R.
RECIPES = {
    "pos": Recipe(epochs=10, dense_epochs=3, batch_size=8, rate=5e-5),
    "ner": Recipe(epochs=10, dense_epochs=3, batch_size=8, rate=5e-5),
    "dp": Recipe(epochs=10, dense_epochs=3, batch_size=8, rate=5e-5),
    "nli": Recipe(epochs=5, dense_epochs=5, batch_size=32, rate=2e-5),
    "qa": Recipe(epochs=5, dense_epochs=5, batch_size=12, rate=3e-5, max_length=384),
    "sentiment": Recipe(epochs=10, dense_epochs=3, batch_size=16, rate=2e-5, source="thesis, section 6.4.2"),
}


@dataclass(frozen=True)
class LanguageRecipe:
    """Language adapters: masked language modelling with norms frozen.

    Attributes:
        steps: of each phase; the authors take the lesser of 100 epochs and 100,000 steps, and at least 30,000.
        batch_size, rate, max_length: as in `Recipe`.
        density: 7,667,712 weights of multilingual BERT.
        l1: lambda of the penalty lambda/N * sum |delta|, in both phases.
        source: where this is from.
    """

    steps: int = 30_000
    batch_size: int = 8
    rate: float = 5e-5
    max_length: int = 256
    density: float = 0.043
    l1: float = 0.1
    source: str = "thesis, section 4.4.2"


LANGUAGE = LanguageRecipe()
