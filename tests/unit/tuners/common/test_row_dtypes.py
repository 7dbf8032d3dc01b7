"""Rows of trained tokens over a base model in bfloat16: float32, as PEFT holds LoRA's, so that small updates count."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.adapters import TYPES, config
from tests.support.models import IDS, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [1, 3, 5]


def rows_of(model):
    return model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]


@pytest.mark.parametrize("kind", TYPES)
def test_small_updates_of_rows_are_not_rounded_away(kind, tmp_path):
    base = llama().to(torch.bfloat16)
    own = base.get_input_embeddings().weight.detach()[ROWS].clone()
    model = get_peft_model(base, config(kind, trainable_token_indices=ROWS))
    assert rows_of(model).dtype == torch.float32
    assert torch.equal(rows_of(model).to(torch.bfloat16), own)
    optimizer = torch.optim.SGD([rows_of(model)], lr=1.0)
    for _ in range(64):
        # A sixteenth of what bfloat16 tells apart, for each weight.
        rows_of(model).grad = -own.float() / 2**12
        optimizer.step()
    expected = own.float() * (1 + 64 / 2**12)
    torch.testing.assert_close(rows_of(model).detach(), expected)
    found = logits(model)
    assert found.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path).eval()
    assert torch.equal(rows_of(again), rows_of(model))
    assert torch.equal(logits(again), found)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_start_and_train_in_the_dtype_of_those_beside_lora(kind):
    def trained(settings):
        model = get_peft_model(llama().to(torch.bfloat16), settings)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return rows_of(model)

    rows, other = (
        trained(config(kind, trainable_token_indices=ROWS)),
        trained(LoraConfig(target_modules=["q_proj"], trainable_token_indices=ROWS)),
    )
    assert rows.grad.dtype == other.grad.dtype == torch.float32
    assert torch.equal(rows, other)
    assert rows.grad.abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("kind", TYPES)
def test_without_autocast_rows_keep_the_dtype_of_the_model(kind):
    base = llama().to(torch.bfloat16)
    model = get_peft_model(base, config(kind, trainable_token_indices=ROWS), autocast_adapter_dtype=False)
    assert rows_of(model).dtype == torch.bfloat16
