"""Tiny checkpoints on disk, adapters for them, and what merging has to give."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse import RandConfig, SparseDelta
from peft_sparse.checkpoints import native
from peft_sparse.checkpoints.shards import Checkpoint

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
BERT = BertConfig(**SMALL, max_position_embeddings=12)


def llama(**fields) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **fields))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    )


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "bert": lambda: BertForMaskedLM(BERT),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=12)),
    "t5": t5,
}


def save_base(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32, **options) -> Path:
    model.to(dtype).save_pretrained(folder / "base", **options)
    return folder / "base"


def save_adapter(folder: Path, base: nn.Module, name: str = "adapter", *, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    request = {"density": 0.3, "init_weights": False, "seed": seed, "target_modules": "all"}
    get_peft_model(base, RandConfig(**{**request, **fields})).save_pretrained(folder / name)
    return folder / name


def write_adapter(folder: Path, deltas: dict[str, SparseDelta], heads: dict | None = None, **config) -> Path:
    """An adapter that no model had to make."""
    folder.mkdir()
    save_file(native.build(deltas, heads), folder / native.SOURCE)
    counts = {name: delta.count for name, delta in deltas.items()}
    text = json.dumps({"peft_type": "SPARSE_FT", "method": "fixed", "num_weights": 1, "counts": counts, **config})
    (folder / "adapter_config.json").write_text(text)
    return folder


def one_weight(*shape: int) -> SparseDelta:
    return SparseDelta(torch.tensor([1], dtype=torch.int32), torch.tensor([0.5]), shape)


def load(model_class: type, base: Path, *adapters: Path, **options) -> PeftModel:
    model = model_class.from_pretrained(base, **options)
    for number, adapter in enumerate(adapters):
        if number == 0:
            model = PeftModel.from_pretrained(model, adapter, adapter_name="0")
        else:
            model.load_adapter(adapter, adapter_name=str(number))
    return model


def assert_same(folder: Path, merged: nn.Module, tmp_path: Path) -> None:
    """The files hold every tensor that saving the merged model gives, bit for bit."""
    merged.save_pretrained(tmp_path / "expected")
    found, expected = Checkpoint(folder), Checkpoint(tmp_path / "expected")
    assert set(expected.names()) <= set(found.names())
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.tensor(name), expected.tensor(name)), name
    for key in ("tie_word_embeddings", "architectures", "dtype"):
        assert found.config.get(key) == expected.config.get(key)
