"""Batches of one language each, languages drawn with smoothed probabilities; any loader and any trainer takes them.

An item of the data set is a whole batch. So nothing has to be told to a trainer's sampler: however it orders, skips or
shares out items, no batch is torn apart or mixed, resuming skips exactly, and in several processes each draws batches,
and so languages, of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...checks import check_one_of, is_finite, nearest
from ...errors import ConfigError
from .mixture import DRAWS, EXACT, INDEPENDENT, BatchLanguage, Source, as_sources, exact_schedule

logger = logging.getLogger(__name__)

LANGUAGE = "language"


@dataclass(frozen=True)
class LanguageBatch:
    """Examples of one language, not collated yet.

    Attributes:
        language: its code; of a mixture of `Source`s a `BatchLanguage`.
        examples: as the source gives them, typically {"input_ids": [...], ...}.
        seed: for what is drawn at random when it is collated, such as masks.
        source: name of the source; empty in evaluation.
    """

    language: str
    examples: tuple[Any, ...]
    seed: int
    source: str = ""


def sampling_probabilities(
    sizes: Mapping[str, int],
    *,
    cap: int = 500_000,
    exponent: float = 0.5,
    upsampling: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """How often each language is drawn: proportional to upsampling * min(size, cap) ** exponent.

    Args:
        sizes: {language: number of examples}, each >= 1.
        cap: >= 1; what a language has beyond it does not make it more likely.
        exponent: in [0, 1]; 1 is proportional to size, 0 the same for all.
        upsampling: {language: factor}; 1 for those that it leaves out.

    Returns:
        {language: probability}, with sum 1.

    Raises:
        ConfigError: no languages, an empty one, a setting out of range, or a factor of a language that there is not.

    Source: thesis 3.4.2 (cap 500,000, exponent 0.5).
    """
    if not sizes or min(sizes.values()) < 1:
        raise ConfigError(f"every language must have at least one example, got {dict(sizes)}")
    if cap < 1:
        raise ConfigError(f"cap must be >= 1 examples, got {cap}")
    if not 0 <= exponent <= 1:
        raise ConfigError(f"exponent must be in [0, 1], got {exponent}")
    factors = upsampling or {}
    for name, factor in factors.items():
        if name not in sizes:
            raise ConfigError(f"upsampling names {name!r}, which is none of {sorted(sizes)}.{nearest(name, sizes)}")
        if not (is_finite(factor) and factor > 0):
            raise ConfigError(f"upsampling of {name!r} must be a number above 0, got {factor!r}.")
    weights = {name: factors.get(name, 1.0) * min(size, cap) ** exponent for name, size in sizes.items()}
    total = sum(weights.values())
    return {language: weight / total for language, weight in weights.items()}


class MultiSourceDataset(Dataset[LanguageBatch]):
    """`num_batches` batches of one language each: a map-style data set whose items are `LanguageBatch`es.

    Give it to any trainer with `per_device_train_batch_size=1` and `MultiSourceCollator`, or to a `DataLoader` with
    `batch_size=1`. Languages are drawn independently, with `sampling_probabilities`; the examples of a language come in
    random order, each once before any comes again. Item i depends on nothing but the arguments and i.

    A language may have several sources, such as a few labelled rows that count tenfold beside translated ones: give
    `Source`s under names of your own. A source is drawn with a probability proportional to
    upsampling * min(size, cap) ** exponent, so exponent=1 is thesis chapter 6. How much of each source there will be is
    said in the log (INFO).

    In several processes a trainer hands different items to different ranks: each step sees as many languages as there
    are ranks and gradients to accumulate. Adapters that are trained for one language each would get no gradient in some
    ranks then (DDP: `ddp_find_unused_parameters=True`); a generator, or a task adapter above frozen ones, always does.

    Args:
        sources: {language: examples}, each a sequence (list, `datasets.Dataset`, ...) with a length; or
            {name: Source}.
        num_batches: for the whole training: steps * gradient accumulation * processes. In a second epoch the same
            batches would come again, with the same masks.
        batch_size: examples in a batch.
        cap, exponent: of `sampling_probabilities`. Unlike in the thesis, examples beyond `cap` are drawn too.
        seed: of languages, orders and masks.
        draw: "independent", or "exact": every epoch has the same number of batches of each source,
            upsampling * ceil(size / batch_size) at exponent=1 (see `batches_of_an_epoch`), in random order. With few
            examples the difference matters.

    Attributes:
        sources: {name: examples}.
        names: of the sources [S], in their order; the languages, unless there are `Source`s.
        languages: those of the sources, each once.
        probabilities: {name: probability, or share of an epoch}.
        schedule: [num_batches] int16, which source each batch is of.

    Raises:
        ConfigError: an empty source, or a number out of range.

    Cost: 6 bytes per batch, and the order of each language's current pass, 8 bytes per example.
    Source: thesis 3.3.3 and 3.4.2; composable-sft's multi-source data set likewise gives batches of one source.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any] | Source],
        *,
        num_batches: int,
        batch_size: int,
        cap: int = 500_000,
        exponent: float = 0.5,
        seed: int = 0,
        draw: str = INDEPENDENT,
    ) -> None:
        check_one_of("draw", draw, DRAWS)
        for name, number in (("num_batches", num_batches), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError(f"{name} must be >= 1, got {number}")
        self._known = as_sources(sources)
        self.sources = {name: source.examples for name, source in self._known.items()}
        self.batch_size = batch_size
        self.seed = seed
        self.names = tuple(self.sources)
        self.languages = tuple(dict.fromkeys(source.language for source in self._known.values()))
        sizes = {name: len(examples) for name, examples in self.sources.items()}
        upsampling = {name: source.upsampling for name, source in self._known.items()}
        self.probabilities = sampling_probabilities(sizes, cap=cap, exponent=exponent, upsampling=upsampling)
        generator = _generator(seed, 0, 0)
        if draw == EXACT:
            self.schedule, self.probabilities = exact_schedule(
                self._known,
                num_batches=num_batches,
                batch_size=batch_size,
                cap=cap,
                exponent=exponent,
                generator=generator,
            )
        else:
            chances = torch.tensor([self.probabilities[name] for name in self.names], dtype=torch.float64)
            drawn = torch.multinomial(chances, num_batches, replacement=True, generator=generator)
            self.schedule = drawn.to(torch.int16)
        self._turns = torch.zeros(num_batches, dtype=torch.int32)
        for place in range(len(self.names)):
            own = self.schedule == place
            self._turns[own] = torch.arange(int(own.sum()), dtype=torch.int32)
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._log_counts()

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, item: int) -> LanguageBatch:
        place = int(self.schedule[item])
        name = self.names[place]
        examples = self.sources[name]
        language = self._known[name].language
        first = int(self._turns[item]) * self.batch_size
        chosen = []
        for position in range(first, first + self.batch_size):
            turn, index = divmod(position, len(examples))
            chosen.append(examples[int(self._order(place, turn)[index])])
        seed = _mixed(self.seed, 1, item % len(self))
        return LanguageBatch(BatchLanguage(language, name) if name != language else language, tuple(chosen), seed, name)

    @property
    def counts(self) -> dict[str, int]:
        """{name of a source: number of its batches}."""
        counts = torch.bincount(self.schedule.long(), minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _log_counts(self) -> None:
        """What the mixture comes to: nothing here oversamples in silence."""
        for name, count in self.counts.items():
            source = self._known[name]
            logger.info(
                "%s (%s, %s): %d examples, upsampling %g, %d of %d batches, each example %.2f times",
                name,
                source.language,
                source.origin,
                len(source.examples),
                source.upsampling,
                count,
                len(self),
                count * self.batch_size / len(source.examples),
            )

    def _order(self, place: int, turn: int) -> Tensor:
        """In which order a language's examples come when all of them come for the `turn`-th time."""
        kept = self._orders.get(place)
        if kept is None or kept[0] != turn:
            size = len(self.sources[self.names[place]])
            kept = turn, torch.randperm(size, generator=_generator(self.seed, 2 + place, turn))
            self._orders[place] = kept
        return kept[1]


def evaluation_batches(
    sources: Mapping[str, Sequence[Any] | Source], *, batch_size: int, seed: int = 0
) -> list[LanguageBatch]:
    """Every example once, in order, in batches of one language: an evaluation data set for `MultiSourceCollator`.

    Pass {language: evaluation_batches({language: rows}, ...)} as `eval_dataset` for a figure per language, and
    `per_device_eval_batch_size=1`. The last batch of a language may be smaller, and a trainer's loss is the mean over
    batches, whatever their size.

    Raises:
        ConfigError: a language without rows, or a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be >= 1, got {batch_size}")
    batches = []
    for place, source in enumerate(as_sources(sources).values()):
        rows = source.examples
        for first in range(0, len(rows), batch_size):
            examples = tuple(rows[index] for index in range(first, min(first + batch_size, len(rows))))
            batches.append(LanguageBatch(source.language, examples, _mixed(seed, place, first)))
    return batches


class MultiSourceCollator:
    """Collates a `LanguageBatch` with a collator of your choice, and adds its language under the key "language".

    For masked language modelling: `MultiSourceCollator(DataCollatorForLanguageModeling(tokenizer))`. While it works,
    torch's random numbers come from the batch's own seed, so that masks do not depend on what was drawn before, on the
    number of workers or on how far a loader reads ahead; a resumed training sees the masks that it would have seen.

    Args:
        collate: examples -> batch, a mapping of tensors.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[LanguageBatch]) -> dict[str, Any]:
        """Raises ConfigError if there is more than one batch, or something else."""
        if len(items) != 1 or not isinstance(items[0], LanguageBatch):
            raise ConfigError(
                "a batch must be one LanguageBatch, which has a size of its own: set per_device_train_batch_size=1 "
                "and per_device_eval_batch_size=1 (batch_size=1 of a DataLoader), and wrap data for evaluation with "
                f"evaluation_batches. Got {len(items)} items of {sorted({type(item).__name__ for item in items})}"
            )
        (batch,) = items
        state = torch.get_rng_state()
        # Not torch.manual_seed: it seeds accelerators too, whose state could only be put back by waiting for them.
        torch.default_generator.manual_seed(batch.seed)
        try:
            collated = dict(self.collate(list(batch.examples)))
        finally:
            torch.set_rng_state(state)
        return {**collated, LANGUAGE: batch.language}


def _mixed(*numbers: int) -> int:
    """A seed below 2**63 that depends on all of some numbers."""
    mixed = 0
    for number in numbers:
        # The steps of splitmix64.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*numbers))
