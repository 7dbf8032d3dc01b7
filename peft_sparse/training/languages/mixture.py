"""Sources of training data that are mixed: how much of each, in which language, and the few rows of a language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import is_finite, is_whole
from ...errors import ConfigError

INDEPENDENT, EXACT = "independent", "exact"
DRAWS = (INDEPENDENT, EXACT)


@dataclass(frozen=True)
class Source:
    """Examples of one language and one origin, and how much they count in a mixture.

    Attributes:
        examples: a sequence with a length (list, `datasets.Dataset`, ...).
        language: whose adapter is active, and what the batch says under "language".
        upsampling: how often the examples count; thesis chapter 6 takes 10 for labelled rows of a target language.
        origin: where they come from, such as "gold" or "translated"; for logs alone.

    Raises:
        ConfigError: an upsampling that is no number above 0, or a language that is no text.
    """

    examples: Sequence[Any]
    language: str
    upsampling: float = 1.0
    origin: str = "gold"

    def __post_init__(self) -> None:
        if not (is_finite(self.upsampling) and self.upsampling > 0):
            raise ConfigError(f"upsampling must be a number above 0, got {self.upsampling!r}.")
        if not isinstance(self.language, str) or not self.language:
            raise ConfigError(f"language must be the code of a language, got {self.language!r}.")


class BatchLanguage(str):
    """The language of a batch: a text, which also knows the source that the batch was drawn from.

    Attributes:
        source: name of the source.
    """

    source: str

    def __new__(cls, language: str, source: str) -> BatchLanguage:
        made = super().__new__(cls, language)
        made.source = source
        return made

    def __reduce__(self) -> tuple[type[BatchLanguage], tuple[str, str]]:
        return type(self), (str(self), self.source)


def batches_of_an_epoch(sources: Mapping[str, Source | Sequence[Any]], *, batch_size: int) -> dict[str, int]:
    """How many batches of each source an epoch has: upsampling * ceil(examples / batch size), rounded.

    For `num_batches` of a `MultiSourceDataset`: epochs * the sum of these.

    Args:
        sources: {name: source}.
        batch_size: examples in a batch, >= 1.

    Raises:
        ConfigError: a source without examples, or a batch size below 1.

    Source: thesis 6.3.1; unified-xlt's job files for the factor 10.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be >= 1, got {batch_size}")
    known = as_sources(sources)
    return {name: max(1, round(one.upsampling * _batches(one, batch_size))) for name, one in known.items()}


def as_sources(sources: Mapping[str, Source | Sequence[Any]]) -> dict[str, Source]:
    """Sources, of which plain sequences are those of the language that they are called by.

    Raises:
        ConfigError: there is none, or one has no examples.
    """
    found = {name: one if isinstance(one, Source) else Source(one, name) for name, one in sources.items()}
    sizes = {name: len(one.examples) for name, one in found.items()}
    if not sizes or min(sizes.values()) < 1:
        raise ConfigError(f"every language must have at least one example, got {sizes}")
    return found


def exact_schedule(
    sources: Mapping[str, Source],
    *,
    num_batches: int,
    batch_size: int,
    cap: int,
    exponent: float,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Epochs in each of which every source has exactly its number of batches, in random order.

    Args:
        sources: {name: source}.
        num_batches: of the schedule; the last epoch may be cut.
        batch_size, cap, exponent: as of a `MultiSourceDataset`.
        generator: of the orders.

    Returns:
        [num_batches] int16 places of the sources; {name: its share of an epoch}.
    """
    length = sum(batches_of_an_epoch(sources, batch_size=batch_size).values())
    weights = {
        name: one.upsampling * math.ceil(min(len(one.examples), cap) / batch_size) ** exponent
        for name, one in sources.items()
    }
    counts = apportioned(list(weights.values()), length)
    epoch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    epochs = [epoch[torch.randperm(length, generator=generator)] for _ in range(math.ceil(num_batches / length))]
    shares = {name: count / length for name, count in zip(sources, counts, strict=True)}
    return torch.cat(epochs)[:num_batches].to(torch.int16), shares


def apportioned(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers with a given sum, as nearly proportional to the weights as can be (largest remainders)."""
    shares = [weight * total / sum(weights) for weight in weights]
    counts = [math.floor(share + 1e-9) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


def few_shot(rows: Sequence[Any], k: int, *, seed: int = 0, stratify: str | None = None) -> Sequence[Any]:
    """K rows drawn at random, in their order; with one seed and no `stratify` those of a smaller K are among them.

    The authors of thesis chapter 6 took the first K rows instead.

    Args:
        rows: a sequence, or a `datasets.Dataset`, which stays one.
        k: how many rows, at least 1.
        seed: of the draw.
        stratify: name of a field; each of its values gets its share of the K rows (largest remainders).

    Returns:
        the rows.

    Raises:
        ConfigError: more rows are asked for than there are, or a row has no such field.
    """
    if not is_whole(k) or not 1 <= k <= len(rows):
        raise ConfigError(f"k must be in 1..{len(rows)}, the number of rows there are, got {k!r}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if stratify is None:
        chosen = order[:k]
    else:
        groups: dict[Any, list[int]] = {}
        for index in order:
            row = rows[index]
            if not isinstance(row, Mapping) or stratify not in row:
                raise ConfigError(f"stratify: row {index} has no field {stratify!r}.")
            groups.setdefault(row[stratify], []).append(index)
        # In the order of the values, so that ties fall the same way whatever was drawn.
        ordered = [groups[value] for value in sorted(groups, key=repr)]
        counts = apportioned([len(group) for group in ordered], k)
        chosen = [index for group, count in zip(ordered, counts, strict=True) for index in group[:count]]
    chosen.sort()
    return rows.select(chosen) if hasattr(rows, "select") else [rows[index] for index in chosen]


def _batches(source: Source, batch_size: int) -> int:
    return math.ceil(len(source.examples) / batch_size)
