"""Per batch, the language of the batch is activated in the model, and batches are counted per language."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import ConfigError
from ...tuners.common.adapter_config import refuse_transformers_verbs
from ...tuners.madg.model import look_up_languages
from .multisource import LANGUAGE

_STATE = "batches_per_language"


class LanguageSwitch(TrainerCallback):
    """Before each forward, activates the language that the batch names under "language"; counts batches of training.

    It acts from the moment it is made until `remove`, or the end of a `with` block, in a loop of your own as in any
    trainer. Give it to a trainer as a callback as well, and logs get "batches/<language>": how many batches of each
    language were trained on so far, in all processes, and through checkpoints.

    Args:
        model: whose forward is watched: the PeftModel that the trainer gets.
        languages: the names that batches of training have: `MultiSourceDataset.languages`.
        sources: names of the sources, `MultiSourceDataset.names`, to count batches of these as well.
        activate: called as activate(model, language) before the forward, which then does not get "language";
            `language_below_task` makes one. None for a model that takes `language` itself, as MAD-G does, whose active
            adapters have the vectors of all `languages` saved with them then: another process may see other languages
            than the one that writes the files.

    Attributes:
        counts: {language: batches of training}, of this process; the sources' beside them.

    Raises:
        ConfigError: a MAD-G adapter has no vector for one of the languages; or, in the forward, a batch without a
            language, or with an unknown one in training.

    Source: thesis 3.3.3: in each step a batch of one language, under whose language adapter the task adapter trains.
    """

    def __init__(
        self,
        model: nn.Module,
        languages: Iterable[str],
        *,
        activate: Callable[[Any, str], object] | None = None,
        sources: Iterable[str] = (),
    ) -> None:
        self._languages = tuple(dict.fromkeys(languages))
        self.counts = dict.fromkeys((*self._languages, *sources), 0)
        self._activate = activate
        if activate is None:
            look_up_languages(model, self._languages)
        self._before: dict[str, int] = {}
        self._totals: dict[str, int] = dict(self.counts)
        self._now: str | None = None
        self._handles = [model.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        if activate is not None:
            self._handles.append(model.register_forward_hook(self._watch_backward))

    def remove(self) -> None:
        """Stop. What is active in the model stays so."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> LanguageSwitch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _on_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        language = kwargs.get(LANGUAGE)
        if language is None:
            raise ConfigError(
                f"the batch has no {LANGUAGE!r}, got {sorted(kwargs)}: collate it with MultiSourceCollator, and wrap "
                "data for evaluation with evaluation_batches"
            )
        if model.training:
            if language not in self._languages:
                raise ConfigError(f"language must be one of {sorted(self._languages)} in training, got {language!r}")
            self.counts[language] += 1
            source = getattr(language, "source", None)
            if source in self.counts and source != language:
                self.counts[source] += 1
        if self._activate is None:
            return args, kwargs
        self._activate(model, language)
        self._now = language
        return args, {key: value for key, value in kwargs.items() if key != LANGUAGE}

    def _watch_backward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Layers that gradient checkpointing computes again must find the language of their forward active."""
        if not (torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())):
            return
        language = self._now

        def check(gradient: torch.Tensor) -> None:
            if self._now != language:
                raise ConfigError(
                    f"gradient checkpointing computes layers of a batch in {language!r} again, and {self._now!r} is "
                    "active: several forwards in different languages came before their backward. Run the backward of "
                    "each batch before the next forward."
                )

        for one in output.values() if isinstance(output, Mapping) else [output]:
            if isinstance(one, torch.Tensor) and one.requires_grad:
                one.register_hook(check)

    # ---- as a callback -------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(_STATE, {}) if state.global_step else {}
        self._before = {language: int(saved.get(language, 0)) for language in self.counts}
        self.counts = dict.fromkeys(self.counts, 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The flags are the same in every process, so all of them come here together.
        if control.should_log or control.should_save:
            self._add_up(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._add_up(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        found = {f"batches/{language}": count for language, count in self._totals.items()}
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None and "loss" in record:
                record.update(found)

    def _add_up(self, args: TrainingArguments, state: TrainerState) -> None:
        counts = torch.tensor(list(self.counts.values()))
        if dist.is_initialized():
            counts = counts.to(args.device)
            dist.all_reduce(counts)
        self._totals = {
            language: self._before.get(language, 0) + count
            for language, count in zip(self.counts, counts.tolist(), strict=True)
        }
        state.stateful_callbacks[_STATE] = dict(self._totals)


def language_below_task(adapters: Mapping[str, str | None], task: str) -> Callable[[PeftModel, str], None]:
    """An `activate` for `LanguageSwitch`: the batch's language adapter, frozen, and the task adapter, which trains.

    Args:
        adapters: {language: name of its adapter in the model}; None for one without, under which the task adapter is
            alone (thesis 6.3.1).
        task: name of the task adapter.

    Returns:
        activate(model, language); raises ConfigError for a language without an adapter, and for a model that has its
        adapters by transformers' own verbs.
    """
    known = dict(adapters)

    def activate(model: PeftModel, language: str) -> None:
        if language not in known:
            raise ConfigError(f"language must be one that has an adapter ({sorted(known)}), got {language!r}")
        refuse_transformers_verbs(model)
        below = known[language]
        wanted = [task] if below is None else [below, task]
        if list(model.active_adapters) != wanted:
            model.base_model.set_adapter(wanted)
        if below is not None:
            # Also where somebody else has activated both, which lets both train.
            model.base_model.set_requires_grad(below, requires_grad=False)

    return activate
