"""Algorithm 1 of the LT-SFT paper with any method: language adapters, and a task adapter above the source's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from _adapters import METHODS, Request
from _tasks import Task
from peft import PeftModel, get_peft_model
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from peft_sparse import (
    LanguageSwitch,
    MultiSourceCollator,
    MultiSourceDataset,
    Source,
    SparseTrainer,
    batches_of_an_epoch,
    language_below_task,
    sparse_trainer,
)

TASK = "task"


@dataclass(frozen=True)
class Schedule:
    """Length and peak learning rate of a training run; the dense phase of a two-phase method has its own.

    Attributes:
        dense_rate: None for that of the rest.
    """

    steps: int
    dense_steps: int
    batch_size: int
    rate: float
    density: float
    max_length: int
    l1: float = 0.0
    dense_rate: float | None = None


class Workshop:
    """Trains the adapters of one method.

    Args:
        base: folder or id of the encoder.
        tokenizer: its own.
        method: name of the method.
        seed: of heads, orders and random supports.
        output: folder of what is saved.
    """

    # The trainer of raw text, without its phases, and further arguments of runs on rows of one language.
    language_trainer: ClassVar[type[Trainer]] = Trainer
    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: str, tokenizer: Any, method: str, *, seed: int, output: Path) -> None:
        self.base, self.tokenizer, self.method = base, tokenizer, METHODS[method]
        self.seed, self.output = seed, output

    # ---- languages ---------------------------------------------------------------------------------

    def language(self, code: str, text: Sequence[str], schedule: Schedule) -> Path:
        """A language adapter from raw text, by masked language modelling. The head that predicts words stays behind."""
        folder = self.output / f"language-{code}"
        set_seed(self.seed)
        model, loading = AutoModelForMaskedLM.from_pretrained(self.base, output_loading_info=True)
        rows, collator = self.rows(text, schedule.max_length), DataCollatorForLanguageModeling(self.tokenizer)
        if loading["missing_keys"]:
            # No head that predicts words: it is fitted first, with all else frozen.
            model.base_model.requires_grad_(False)
            self._fit(model, rows, collator, schedule, trainer=self.language_trainer, rate=10 * schedule.rate)
            model.requires_grad_(True)
        tuned = get_peft_model(model, self._config(model, schedule, head=[], seed=self.seed + 1000))
        self._fit(tuned, rows, collator, schedule, trainer=sparse_trainer(self.language_trainer))
        tuned.save_pretrained(folder)
        return folder

    def rows(self, text: Sequence[str], longest: int) -> list[dict]:
        """Raw text as a trainer takes it; of a long line, all of its pieces."""
        cut = {"truncation": True, "max_length": longest, "return_overflowing_tokens": True}
        return [{"input_ids": ids} for ids in self.tokenizer(list(text), **cut)["input_ids"]]

    # ---- the task ----------------------------------------------------------------------------------

    def task(
        self,
        task: Task,
        sources: Mapping[str, Source],
        labels: list[str] | None,
        languages: Mapping[str, Path],
        schedule: Schedule,
        *,
        trainer: Callable[..., Trainer] = SparseTrainer,
    ) -> Path:
        """The task adapter, trained with the adapter of each batch's language active and frozen below it."""
        model = self._task_model(task, labels)
        # Before there are adapters in it: configs name its layers.
        config = self._task_config(model, schedule)
        first, *rest = languages or [None]
        if first is None:
            tuned = get_peft_model(model, config, adapter_name=TASK)
        else:
            tuned = PeftModel.from_pretrained(model, languages[first], adapter_name=first)
            for code in rest:
                tuned.load_adapter(languages[code], adapter_name=code)
            tuned.add_adapter(TASK, config)
        activate = language_below_task(
            {one.language: one.language if languages else None for one in sources.values()}, TASK
        )
        activate(tuned, next(iter(sources.values())).language)
        if len(sources) == 1:
            rows = next(iter(sources.values())).examples
            self._fit(tuned, rows, task.collator(self.tokenizer), schedule, trainer=trainer)
        else:
            batches = MultiSourceDataset(
                sources, num_batches=max(schedule.steps, schedule.dense_steps), batch_size=schedule.batch_size,
                exponent=1.0, seed=self.seed, draw="exact",
            )  # fmt: skip
            collator = MultiSourceCollator(task.collator(self.tokenizer))
            with LanguageSwitch(tuned, batches.languages, activate=activate, sources=batches.names) as switch:
                self._fit(tuned, batches, collator, schedule, trainer=trainer, callbacks=[switch])
        tuned.save_pretrained(self.output, selected_adapters=[TASK])
        return self.output / TASK

    def composed(self, task: Task, labels: list[str] | None, adapter: Path, languages: Mapping[str, Path]) -> PeftModel:
        """The task adapter in a new model, with the languages' beside it."""
        tuned = PeftModel.from_pretrained(self._task_model(task, labels), adapter, adapter_name=TASK)
        for code, folder in languages.items():
            tuned.load_adapter(folder, adapter_name=code)
        return tuned

    def _task_model(self, task: Task, labels: list[str] | None) -> Any:
        set_seed(self.seed)
        return task.load(self.base, labels)

    def _task_config(self, model: Any, schedule: Schedule) -> Any:
        prefix = f"{model.base_model_prefix}."
        head = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(prefix)}
        pooler = [f"{prefix}pooler"] if getattr(model.base_model, "pooler", None) is not None else []
        return self._config(model, schedule, head=[*sorted(head), *pooler], seed=self.seed)

    def _config(self, model: Any, schedule: Schedule, *, head: list[str], seed: int) -> Any:
        return self.method.config(Request(model, schedule.density, schedule.l1, head, seed))

    # ---- both --------------------------------------------------------------------------------------

    def _fit(
        self,
        model: Any,
        rows: Any,
        collator: Any,
        schedule: Schedule,
        *,
        trainer: Callable[..., Trainer] = SparseTrainer,
        rate: float | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        is_mixed = isinstance(rows, MultiSourceDataset)
        args = TrainingArguments(
            output_dir=str(self.output / "run"), max_steps=schedule.steps,
            per_device_train_batch_size=1 if is_mixed else schedule.batch_size,
            learning_rate=schedule.rate * self.method.rate_factor if rate is None else rate,
            weight_decay=0.0, logging_steps=max(1, schedule.steps // 2), save_strategy="no", report_to="none",
            seed=self.seed, dataloader_pin_memory=torch.cuda.is_available(), **({} if is_mixed else self.arguments),
        )  # fmt: skip
        phases = [getattr(config, "first_phase", None) for config in getattr(model, "peft_config", {}).values()]
        dense = {}
        if "dense" in phases:
            own_rate = {} if schedule.dense_rate is None else {"learning_rate": schedule.dense_rate}
            dense = {"dense_args": {"max_steps": schedule.dense_steps, **own_rate}}
        trainer(
            model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks), **dense
        ).train()


def use(model: PeftModel, language: str | None) -> None:
    """The task adapter, above a language's if there is one."""
    model.base_model.set_adapter([TASK] if language is None else [language, TASK])


def steps_of(sources: Mapping[str, Source], *, batch_size: int, epochs: int) -> int:
    """Optimizer steps of some epochs."""
    return epochs * sum(batches_of_an_epoch(sources, batch_size=batch_size).values())
