"""Masked language modelling in several languages: training, a loss that compares, and a picture of the losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from peft_sparse import LanguageSwitch, MultiSourceCollator, MultiSourceDataset, evaluation_batches

Text = dict[str, list[str]]


class MaskedLM:
    """Trains models on text, and measures them on held-out text, all on the same masks."""

    def __init__(self, tokenizer, held_out: Text, output: Path) -> None:
        self.tokenizer, self.output = tokenizer, output
        self.collate = MultiSourceCollator(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25))
        rows = {code: self.rows(sentences) for code, sentences in held_out.items()}
        self.held_out = {code: evaluation_batches({code: own}, batch_size=32) for code, own in rows.items()}

    def rows(self, sentences: list[str]) -> list[dict]:
        return [{"input_ids": ids} for ids in self.tokenizer(sentences, truncation=True, max_length=64)["input_ids"]]

    def fit(self, model, text: Text, *, steps: int, rate: float, activate: Callable | None) -> None:
        """Train on batches of 32 sentences of one language each; `activate` is `LanguageSwitch`'s."""
        sources = {code: self.rows(sentences) for code, sentences in text.items()}
        args = TrainingArguments(
            output_dir=str(self.output), max_steps=steps, per_device_train_batch_size=1, learning_rate=rate,
            warmup_steps=steps // 10, logging_steps=max(1, steps // 2), save_strategy="no", report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        batches = MultiSourceDataset(sources, num_batches=steps, batch_size=32)
        with LanguageSwitch(model, sources, activate=activate) as switch:
            common = {"model": model, "args": args, "train_dataset": batches, "data_collator": self.collate}
            Trainer(**common, callbacks=[switch]).train()

    @torch.no_grad()
    def loss(self, model, language: str) -> float:
        """Mean loss per masked token (nats) on a language's held-out text; NaN if that is too short to mask any."""
        model.eval()
        total, tokens = 0.0, 0
        for item in self.held_out[language]:
            batch = self.collate([item])
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "language"}
            count = int((inputs["labels"] != -100).sum())
            total += float(model(**inputs).loss) * count if count else 0.0
            tokens += count
        return total / tokens if tokens else float("nan")

    def encoder(self, base: str | Path, text: Text, *, steps: int, console: Console) -> torch.nn.Module:
        """The pretrained encoder. If its checkpoint lacks the head that predicts words, one is fitted and saved."""
        model, loading = AutoModelForMaskedLM.from_pretrained(base, output_loading_info=True)
        if not loading["missing_keys"]:
            return model
        console.print("the model comes without a head that predicts words: fitting one first, all else frozen")
        model.base_model.requires_grad_(False)
        self.fit(model, text, steps=steps, rate=1e-3, activate=one_for_all)
        # The adapters name the model that they belong to: the one with this head.
        model.save_pretrained(self.output / "encoder")
        self.tokenizer.save_pretrained(self.output / "encoder")
        return AutoModelForMaskedLM.from_pretrained(self.output / "encoder")


def one_for_all(model, language: str) -> None:
    """Nothing to activate: the model is the same whatever the language of the batch."""


def first_words(sentences: list[str], count: int) -> list[str]:
    """The first sentences, as many as hold `count` words."""
    taken: list[str] = []
    for sentence in sentences:
        if count <= 0:
            break
        taken.append(sentence)
        count -= len(sentence.split())
    return taken


def plot_losses(losses: dict[str, dict[str, float]], unseen: str, path: Path) -> None:
    """A row for each language, the unseen one on top, and in it a point for each way to adapt: {way: {code: loss}}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    codes = [*sorted({code for row in losses.values() for code in row} - {unseen}, reverse=True), unseen]
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.3 * len(codes)), layout="constrained")
    axes.axhspan(len(codes) - 1.5, len(codes) - 0.5, color="0.92")
    for (name, row), marker in zip(losses.items(), "os^Dv", strict=True):
        axes.scatter([*row.values()], [codes.index(code) for code in row], marker=marker, label=name)
    axes.set_yticks(range(len(codes)), [*codes[:-1], f"{unseen} (unseen)"])
    axes.set_xlabel("masked-LM loss on held-out text (nats per masked token)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
