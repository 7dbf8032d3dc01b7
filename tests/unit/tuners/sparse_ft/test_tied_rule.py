"""Several deltas on one tied matrix: the live model, merging in memory and merging on disk follow one rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from peft_sparse import RandConfig, merge_checkpoint

IDS = torch.arange(10)[None]
EMBED = "embed_tokens"
TARGETS = [[EMBED], [f"encoder.{EMBED}"], [f"decoder.{EMBED}"], ["shared"], [EMBED, "lm_head"]]


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    return T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)).eval()


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


@pytest.mark.parametrize(("one", "other"), [*itertools.product(TARGETS[:4], TARGETS[:4]), (TARGETS[4], None)])
def test_one_rule(tmp_path, one, other):
    t5().save_pretrained(tmp_path / "base")
    config = {"density": 0.3, "init_weights": False}
    model = get_peft_model(t5(), RandConfig(**config, target_modules=one))
    model.save_pretrained(tmp_path / "one")
    names, folders = ["default"], [tmp_path / "one"]
    if other is not None:
        second = get_peft_model(t5(), RandConfig(**config, target_modules=other, seed=1))
        second.save_pretrained(tmp_path / "other")
        model.load_adapter(tmp_path / "other", "other")
        names, folders = ["default", "other"], [*folders, tmp_path / "other"]
        model.base_model.set_adapter(names)
    live = output(model.eval())
    merge_checkpoint(tmp_path / "base", folders, tmp_path / "merged")
    merged = model.merge_and_unload(adapter_names=names)
    on_disk = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(live, output(merged), atol=1e-5)
    found = dict(on_disk.named_parameters(remove_duplicate=False))
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        assert torch.equal(found[name], parameter), name
    assert torch.equal(output(on_disk), output(merged))
    assert not torch.allclose(live, output(t5()))
    # What was frozen for the adapter trains again.
    assert all(parameter.requires_grad for parameter in merged.parameters())
