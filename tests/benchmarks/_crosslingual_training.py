"""Training and composition in the cross-lingual benchmark: each adapter once, into a folder."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from _bench_runs import DEVICE, train, write_whole
from _crosslingual_data import Source, Task, language_collator, language_loss, read_text
from _crosslingual_methods import FULL, METHODS, Request
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from peft_sparse import LotteryTicketConfig, SparseTrainer, start_dense_phase


@dataclass(frozen=True)
class Corpus:
    """What an adapter is trained on: the labelled rows, or the raw text of a language.

    Attributes:
        name: "task" or a language.
        rows: to train on.
        collator: of its batches.
        load: the model to train, of a method and a seed.
        steps: in each phase.
        dense_rate: learning rate of the shared dense phase.
        budget: the layer budget of SC-SFT.
    """

    name: str
    rows: list[dict]
    collator: Any
    load: Callable[[str, int], nn.Module]
    steps: int
    dense_rate: float
    budget: str


class Bench:
    """Trains adapters into a folder, each once, and composes them.

    Args:
        options: of the command line.
        task: the labelled rows.
        source: where they come from.
        tokenizer: the model's.
        folder: what was trained with the same settings before is found there.
        advance: called after each optimizer step.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        task: Task,
        source: Source,
        tokenizer,
        *,
        folder: Path,
        advance: Callable[[], None],
    ) -> None:
        self.options, self.tokenizer, self.folder, self.advance = options, tokenizer, folder, advance
        self._labels = len(task.labels)
        collator = DataCollatorWithPadding(tokenizer)
        self.task = Corpus(
            "task",
            task.train,
            collator,
            self.task_model,
            options.task_steps,
            options.rates[FULL][0],
            source.budget,
        )
        self.source = source.language
        self._texts: dict[str, tuple[list[dict], list[dict]]] = {}
        self._start_losses: dict[str, float] = {}

    # ---- models ----------------------------------------------------------------------------------------

    def classifier(self, seed: int) -> nn.Module:
        """The pretrained model with a head drawn by the seed."""
        set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            self.options.model, num_labels=self._labels, dtype=torch.float32
        ).to(DEVICE)

    def has_source_adapter(self, name: str) -> bool:
        """Whether a method's task adapters are trained above the source language's adapter."""
        return not self.options.bare and METHODS[name].language_rate is not None

    def task_model(self, name: str, seed: int) -> nn.Module:
        """What a task adapter is trained on: the classifier with the source language's adapter, which is frozen.

        It is merged: training above a frozen adapter and on the weights that it makes is the same function.
        """
        model = self.classifier(seed)
        if not self.has_source_adapter(name):
            return model
        adapter = self.language_adapter(name, self.source)
        if name == FULL:
            _overwrite(model, load_file(adapter))
            return model
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()

    def language_adapter(self, name: str, language: str) -> Path:
        """A method's adapter of a language, of the first seed."""
        return self.adapter(name, self.language(language), METHODS[name].language_rate or 0.0, self.options.seeds[0])

    @cached_property
    def head(self) -> list[str]:
        """What reads the encoder out: the modules outside it, and its pooler. They train whole with every method."""
        model = self.classifier(0)
        prefix = model.base_model_prefix
        own = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")}
        pooler = getattr(model.base_model, "pooler", None)
        return sorted(own) + ([f"{prefix}.pooler"] if pooler is not None else [])

    def language(self, name: str) -> Corpus:
        return Corpus(
            name,
            self._text(name)[0],
            language_collator(self.tokenizer, masked=self.masks),
            lambda method, seed: self.language_model(name),
            self.options.language_steps,
            METHODS[FULL].language_rate or 0.0,
            "sc_sft_mlm",
        )

    @cached_property
    def masks(self) -> bool:
        """Whether the model learns a language by masked language modelling; else it predicts the next token."""
        return type(AutoConfig.from_pretrained(self.options.model)) in MODEL_FOR_MASKED_LM_MAPPING

    def language_model(self, language: str) -> nn.Module:
        """The pretrained model with a head that predicts words: its own, or one fitted to the language, once for all
        methods, with everything else frozen.
        """
        set_seed(self.options.seeds[0])
        auto = AutoModelForMaskedLM if self.masks else AutoModelForCausalLM
        model, loading = auto.from_pretrained(self.options.model, dtype=torch.float32, output_loading_info=True)
        if not loading["missing_keys"]:
            return model.to(DEVICE)
        model.base_model.requires_grad_(False)
        path = self.folder / "heads" / f"{language}.safetensors"
        if not path.exists():
            collator = language_collator(self.tokenizer, masked=self.masks)
            self._fit(model, self._text(language)[0], collator, self.options.head_steps, 1e-3, 0)
            head = {name: tensor.detach().cpu() for name, tensor in model.named_parameters() if tensor.requires_grad}
            write_whole(path, partial(save_file, head))
        model.load_state_dict(load_file(path), strict=False)
        return model.requires_grad_(True).to(DEVICE)

    def start_loss(self, language: str) -> float:
        """Held-out loss of the language model that the adapters of a language start from."""
        if language not in self._start_losses:
            model = self.language_model(language)
            self._start_losses[language] = self._held_out_loss(model, language)
        return self._start_losses[language]

    def language_loss(self, language: str, name: str, adapter: Path) -> float:
        """The same with a method's language adapter."""
        model = self.language_model(language)
        if name == FULL:
            # The dense phase trains the input embeddings alone: the output matrix stays as it was.
            output = model.get_output_embeddings()
            output.weight = nn.Parameter(output.weight.detach().clone())
            _overwrite(model, load_file(adapter))
        else:
            model = PeftModel.from_pretrained(model, adapter)
        return self._held_out_loss(model, language)

    def _held_out_loss(self, model: nn.Module, language: str) -> float:
        return language_loss(model, self._text(language)[1], self.tokenizer, masked=self.masks)

    def _text(self, language: str) -> tuple[list[dict], list[dict]]:
        if language not in self._texts:
            self._texts[language] = read_text(
                Path(self.options.data), language, self.tokenizer, length=self.options.max_length
            )
        return self._texts[language]

    # ---- training --------------------------------------------------------------------------------------

    def adapter(self, name: str, corpus: Corpus, rate: float, seed: int) -> Path:
        """The adapter of a method; trained now if it is not in the folder."""
        method = METHODS[name]
        if method.config is None:
            return self._dense(corpus, seed, name)
        path = self.folder / corpus.name / f"{name}_{rate:g}_{seed}"
        if not path.exists():
            model = corpus.load(name, seed)
            # LoRA draws its matrices; how much loading drew depends on what was there already.
            set_seed(seed)
            tuned = get_peft_model(model, method.config(self._request(model, corpus, seed)))
            if method.selects:
                self._select(tuned, self._dense(corpus, seed, name))
            trainer = partial(SparseTrainer, mask_args=method.mask_args or None) if method.is_ours else Trainer
            self._fit(tuned, corpus.rows, corpus.collator, corpus.steps, rate, seed, trainer=trainer)
            write_whole(path, tuned.save_pretrained)
        return path

    def _dense(self, corpus: Corpus, seed: int, name: str) -> Path:
        """The weights after the dense phase, which is full fine-tuning. Three methods select by what it changed.

        They share it, but where each has an adapter of its own below it.
        """
        below = name if corpus.name == self.task.name and self.has_source_adapter(name) else FULL
        above = "" if below == FULL else f"_above_{below}"
        path = self.folder / corpus.name / f"{FULL}_{corpus.dense_rate:g}_{seed}{above}.safetensors"
        if not path.exists():
            model = corpus.load(name, seed)
            start = time.process_time()
            config = LotteryTicketConfig(**self._request(model, corpus, seed).everything)
            tuned = get_peft_model(model, config)
            with start_dense_phase(tuned) as phase:
                self._fit(tuned, corpus.rows, corpus.collator, corpus.steps, corpus.dense_rate, seed)
                found = {target.name: target.parameter for target in phase.targets}
                found.update({_plain(n): p for n, p in phase.others.items() if "modules_to_save" in n})
                tensors = {name: tensor.detach().cpu() for name, tensor in found.items()}
                seconds = {"seconds": str(time.process_time() - start)}
                write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=seconds))
        return path

    def dense_seconds(self, name: str, corpus: Corpus, seed: int) -> float:
        """Processor time of the dense phase that a method shares; 0 for one that has none."""
        method = METHODS[name]
        if not method.selects and method.config is not None:
            return 0.0
        with safe_open(self._dense(corpus, seed, name), framework="pt") as file:
            return float(file.metadata()["seconds"])

    @torch.no_grad()
    def _select(self, tuned: PeftModel, dense: Path) -> None:
        """Put the weights of the finished dense phase into one of this adapter's own, and let its config choose."""
        weights = load_file(dense)
        with start_dense_phase(tuned) as phase:
            for target in phase.targets:
                target.parameter.copy_(weights[target.name])
            phase.select()

    def _request(self, model: nn.Module, corpus: Corpus, seed: int) -> Request:
        head = self.head if corpus.name == self.task.name else []
        prefix = f"{model.base_model_prefix}."
        inside = {name: m for name, m in model.named_modules() if name.startswith(prefix) and not _under(name, head)}
        linear = {name: m for name, m in inside.items() if isinstance(m, nn.Linear)}
        per_rank = sum(m.in_features + m.out_features for m in linear.values())
        # Without the pooler also where it is no head, so that language and task adapters are of one size.
        own = [p for name, p in model.named_parameters() if name.startswith(prefix) and not _under(name, self.head)]
        total = sum(p.numel() for p in own)
        rank = max(1, round(self.options.density * total / per_rank))
        return Request(
            count=rank * per_rank,
            rank=rank,
            # Supports of task and language are drawn independently.
            seed=seed if corpus.name == self.task.name else 1000 + seed,
            head=head,
            linear=list(linear),
            outside=f"(?!{re.escape(prefix)}).*",
            budget=corpus.budget,
        )

    def _fit(
        self, model: nn.Module, rows: list[dict], collator, steps: int, rate: float, seed: int, *, trainer=Trainer
    ) -> None:
        common = {"batch_size": self.options.batch_size, "advance": self.advance, "trainer": trainer}
        how = {**common, "train_sampling_strategy": "group_by_length"}
        train(model, rows, collator, steps=steps, rate=rate, seed=seed, **how)

    # ---- results ---------------------------------------------------------------------------------------

    def with_task(self, name: str, adapter: Path) -> nn.Module:
        """The classifier that a task adapter makes, above the source language's adapter if it was trained so."""
        model = self.task_model(name, 0)
        if name == FULL:
            _overwrite(model, load_file(adapter))
            return model
        return PeftModel.from_pretrained(model, adapter)

    def with_both(self, name: str, task: Path, language: Path) -> nn.Module:
        """The classifier with both changes added to the pretrained weights."""
        model = self.classifier(0)
        if name == FULL:
            start, moved = dict(self.task_model(name, 0).named_parameters()), load_file(language)
            sums = load_file(task)
            for parameter in moved:
                sums[parameter] += moved[parameter] - start[parameter].detach().cpu()
            _overwrite(model, sums)
            return model
        if not METHODS[name].is_ours:
            # LoRA's `add_weighted_adapter` carries no head over; one merged, the other on top is the same sum.
            merged = PeftModel.from_pretrained(model, language).merge_and_unload()
            return PeftModel.from_pretrained(merged, task)
        model = PeftModel.from_pretrained(model, task, adapter_name="task")
        model.load_adapter(language, adapter_name="language")
        model.add_weighted_adapter(["task", "language"], [1.0, 1.0], "both", head_from="task")
        model.set_adapter("both")
        return model

    def trained(self, name: str, adapter: Path) -> int:
        """How many weights a task adapter tunes, those of the head aside."""
        tuned = self.with_task(name, adapter)
        if name != FULL:
            tuned.set_adapter("default")
            return sum(p.numel() for n, p in tuned.named_parameters() if p.requires_grad and "modules_to_save" not in n)
        return sum(p.numel() for n, p in tuned.named_parameters() if not _under(n, self.head))


def _under(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _plain(name: str) -> str:
    """A head's parameter as the model without PEFT calls it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@torch.no_grad()
def _overwrite(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
