"""The methods that `instruction_tuning.py` compares: their configs, their training, and a picture of what SpIEL did."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import torch
from _instructions import collate
from peft import LoraConfig, PeftConfig
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from peft_sparse import (
    DeftXConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    SpielAGConfig,
    SpielMAConfig,
    iter_reselectors,
)


class Method(str, Enum):
    spiel_ag = "spiel_ag"
    spiel_ma = "spiel_ma"
    rand = "rand"
    half_random = "half_random"
    lottery_ticket = "lottery_ticket"
    deft_x = "deft_x"
    fisher = "fisher"
    lora = "lora"


# Those with a dense phase, which trains the base weights themselves.
TWO_PHASES = (Method.lottery_ticket, Method.deft_x)
# SM3, which SpIEL-MA trains with, divides by the root of a sum, not of a mean: its steps shrink, so they start larger.
LEARNING_RATES = {Method.spiel_ma: 8e-3, Method.half_random: 4e-3}
LEARNING_RATE = 2e-3


def adapter_config(method: Method, density: float, seed: int, model: torch.nn.Module) -> PeftConfig:
    """All methods train the same number of weights, in all linear layers but the output."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    # The thesis reselects every 20 updates in runs of thousands; the shorter the run, the more often.
    often = {"reselection_steps": 10, "estimation_steps": 3}
    if method is Method.spiel_ag:
        return SpielAGConfig(density=density, seed=seed, **often, **common)
    if method is Method.spiel_ma:
        return SpielMAConfig(density=density, seed=seed, **often, **common)
    if method is Method.rand:
        return RandConfig(density=density, seed=seed, **common)
    if method is Method.half_random:
        chosen = {"criterion": "gradient", "budget": "uniform", "selection_batches": 8}
        return OneShotConfig(density=density, seed=seed, random_share=0.5, **chosen, **common)
    if method is Method.lottery_ticket:
        return LotteryTicketConfig(density=density, **common)
    if method is Method.deft_x:
        return DeftXConfig(density=density, **common)
    if method is Method.fisher:
        return OneShotConfig(density=density, criterion="fisher", selection_batches=16, **common)
    output = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output]
    shapes = [(m.out_features, m.in_features) for m in linear]
    rank = max(1, round(density * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)))
    return LoraConfig(r=rank, lora_alpha=2 * rank, **common)


def four_bit(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation, what QLoRA uses, multiplied in the dtype of the dequantised weights."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def train(model, rows: list[dict], method: Method, dense_learning_rate: float, **settings) -> None:
    args = TrainingArguments(
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )
    common = {"model": model, "args": args, "train_dataset": rows, "data_collator": collate}
    if method is Method.lora:
        Trainer(**common).train()
    else:
        # A plain Trainer does for all without a dense phase or a criterion of gradients. Ours writes the weights in
        # place while it trains, so a step costs less, and picks the optimizer that SpIEL is made with.
        SparseTrainer(**common, dense_args={"learning_rate": dense_learning_rate}).train()


def plot_ages(model: torch.nn.Module, path: Path) -> bool:
    """Draw after which update the final weights were grown (thesis, figure 7.4); False if the method grows none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reselectors = list(iter_reselectors(model))
    if not reselectors:
        return False
    grown = torch.cat(list(reselectors[0].grown_at().values()))
    updates, counts = grown.unique(return_counts=True)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.bar([str(int(u)) if u else "start" for u in updates], (100 * counts / grown.numel()).tolist(), color="0.35")
    axes.set_xlabel("grown after update")
    axes.set_ylabel("% of the tuned weights")
    axes.set_title(f"{grown.numel():,} tuned weights by the update that grew them")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
