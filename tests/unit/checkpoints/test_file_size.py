"""Bytes per tuned weight of whole saved files, on the shapes of a small Llama."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import RandConfig, iter_deltas
from peft_sparse.checkpoints import native

MOST = {(0.01, "bfloat16"): 3.3, (0.01, "float32"): 5.3}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128))


def table_in_specification() -> dict[tuple[float, str], float]:
    text = Path(native.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    return {
        (float(d), dtype): float(v)
        for d, *sizes in rows
        for dtype, v in zip(("bfloat16", "float32"), sizes, strict=True)
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.05])
def test_bytes_per_weight(base, tmp_path, density, dtype):
    model = get_peft_model(base, RandConfig(density=density, values_dtype=dtype))
    count = sum(delta.count for _, _, _, delta in iter_deltas(model, "default"))
    assert count == round(density * sum(m.weight.numel() for n, m in base.named_modules() if n.endswith("base_layer")))
    assert {delta.values.dtype for _, _, _, delta in iter_deltas(model, "default")} == {getattr(torch, dtype)}
    model.save_pretrained(tmp_path)
    model.unload()
    measured = (tmp_path / native.SOURCE).stat().st_size / count
    assert measured <= MOST.get((density, dtype), float("inf"))
    assert measured == pytest.approx(table_in_specification()[density, dtype], abs=0.02)
