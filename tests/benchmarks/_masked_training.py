"""Masked language modelling for benchmarks: only the masked tokens reach the output matrix, the dearest of all."""

from __future__ import annotations

import torch
from _bench_runs import FAST_BFLOAT16
from _crosslingual_data import MASKED, batches
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer


def masked_nll(model: nn.Module, batch: dict) -> tuple[Tensor, int]:
    """(sum of the losses, number) of the masked tokens."""
    labels = batch.pop("labels")
    masked = labels >= 0
    output = model.get_output_embeddings()
    handle = output.register_forward_pre_hook(lambda _, args: (args[0][masked],))
    try:
        logits = model(**batch).logits
    finally:
        handle.remove()
    return nn.functional.cross_entropy(logits.float(), labels[masked], reduction="sum"), int(masked.sum())


class MaskedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, count = masked_nll(model, dict(inputs))
        return loss / max(1, count)


@torch.no_grad()
def masked_loss(model: nn.Module, rows: list[dict], tokenizer, *, masked: float = MASKED) -> float:
    """Mean loss per masked token (nats), the same tokens masked in every call."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=masked, seed=0)
    for _, batch in batches(rows, collate, device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=FAST_BFLOAT16):
            found, tokens = masked_nll(model, batch)
        total, count = total + float(found), count + tokens
    return total / max(1, count)
