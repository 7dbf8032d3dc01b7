"""Adapters of a model whose vocabulary was reduced: they follow it, or are refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertForSequenceClassification,
    BertModel,
)

from peft_sparse import AdaSftConfig, BottleneckConfig, ConfigError, FormatError, RandConfig
from peft_sparse.distillation import reduce_adapter, reduce_vocabulary
from tests.support.tokenizers import (
    TEXTS,
    ids_of,
    make_bert,
    make_llama,
)

CONFIGS = {
    "sparse": lambda: RandConfig(num_weights=900, init_weights=False, target_modules="all"),
    "sparse with a head": lambda: RandConfig(
        num_weights=200,
        init_weights=False,
        target_modules=["word_embeddings", "query"],
        modules_to_save=["predictions"],
    ),
    "token rows": lambda: RandConfig(
        num_weights=50,
        init_weights=False,
        target_modules=["query"],
        trainable_token_indices={"word_embeddings": [1, 3, 20]},
    ),
    "ada": lambda: AdaSftConfig(density=0.1, target_modules=["query"]),
    "bottleneck": lambda: BottleneckConfig(invertible="nice", init_weights=False),
    "lora": lambda: LoraConfig(target_modules=["word_embeddings", "query"], init_lora_weights=False),
    "lora with token rows": lambda: LoraConfig(
        target_modules=["query"], init_lora_weights=False, trainable_token_indices={"word_embeddings": [0, 7, 9, 15]}
    ),
}


@pytest.mark.parametrize("kind", [RandConfig, LoraConfig])
def test_rows_of_tokens_that_all_went_leave_the_adapter_and_no_adapter_is_reduced_twice(kind, bert, reduced, tmp_path):
    gone = sorted({*range(20)} - {*reduced.kept.tolist()})[:2]
    fields = {"density": 0.3, "init_weights": False} if kind is RandConfig else {"init_lora_weights": False}
    base = make_bert(bert[0].config.vocab_size)
    adapted = get_peft_model(base, kind(target_modules=["query"], trainable_token_indices=gone, **fields)).eval()
    adapted.save_pretrained(tmp_path / "whole")
    found = reduce_adapter(tmp_path / "whole", tmp_path / "adapter", vocabulary=reduced)
    assert (sum(found.kept.values()), found.num_lost) == (0, 2 * 16)
    small = reduce_vocabulary(make_bert(bert[0].config.vocab_size), bert[1], texts=TEXTS).model
    served = PeftModel.from_pretrained(small, tmp_path / "adapter").eval()
    ids = ids_of(reduced.tokenizer, TEXTS[1]).input_ids
    with torch.no_grad():
        # PEFT computes the output matrix of a tied model without its bias where rows are trained: hidden states.
        own, whole = (one.base_model.model.bert for one in (served, adapted))
        assert torch.equal(own(ids).last_hidden_state, whole(reduced.kept[ids]).last_hidden_state)
    reduced.save_pretrained(tmp_path / "small")
    reduce_adapter(tmp_path / "whole", tmp_path / "again", vocabulary=tmp_path / "small")
    for one in ("again", "adapter") if kind is RandConfig else ("again",):
        with pytest.raises(FormatError, match="belongs to a reduced model already"):
            reduce_adapter(tmp_path / one, tmp_path / "twice", vocabulary=tmp_path / "small")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_serves_the_reduced_model(name, bert, reduced, tmp_path):
    model, tokenizer = bert
    torch.manual_seed(1)
    adapted = get_peft_model(make_bert(model.config.vocab_size), CONFIGS[name]()).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in key or "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "whole")
    reduced.save_pretrained(tmp_path / "small")
    found = reduce_adapter(tmp_path / "whole", tmp_path / "adapter", vocabulary=tmp_path / "small")
    small = reduce_vocabulary(make_bert(model.config.vocab_size), tokenizer, texts=TEXTS).model
    served = PeftModel.from_pretrained(small, tmp_path / "adapter").eval()
    ids = ids_of(reduced.tokenizer, TEXTS[1]).input_ids
    with torch.no_grad():
        old = adapted(reduced.kept[ids]).logits[..., reduced.kept]
        torch.testing.assert_close(served(ids).logits, old)
        assert not torch.allclose(old, model(reduced.kept[ids]).logits[..., reduced.kept]) or name == "ada"
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "small")
    if name in ("ada", "bottleneck"):
        assert found.kept == found.lost == {}
    else:
        assert found.num_lost > 0


def test_reduced_and_merged_is_merged_and_cut(bert, reduced, tmp_path):
    model, _ = bert
    adapted = get_peft_model(make_bert(model.config.vocab_size), CONFIGS["sparse"]())
    adapted.save_pretrained(tmp_path / "whole")
    found = reduce_adapter(tmp_path / "whole", tmp_path / "adapter", vocabulary=reduced)
    small = reduce_vocabulary(make_bert(model.config.vocab_size), bert[1], texts=TEXTS).model
    merged = PeftModel.from_pretrained(small, tmp_path / "adapter").merge_and_unload().state_dict()
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        cut = expected[name][reduced.kept] if name in reduced.rows.tensors else expected[name]
        assert torch.equal(tensor, cut), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    before = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["counts"]
    lost = {name: before[name] - count for name, count in config["counts"].items()}
    assert {name: count for name, count in lost.items() if count} == {n: c for n, c in found.lost.items() if c}
    assert config["provenance"] == {"tokens": len(reduced.kept), "tokens_before": reduced.rows.old_size}


def test_an_adapter_of_another_class_over_the_same_base_follows(bert, reduced, tmp_path):
    model, tokenizer = bert
    classifier = make_bert(model.config.vocab_size, cls=BertForSequenceClassification, num_labels=3)
    config = RandConfig(
        num_weights=300, init_weights=False, target_modules=["word_embeddings"], modules_to_save=["classifier"]
    )
    get_peft_model(classifier, config).save_pretrained(tmp_path / "whole")
    encoder = reduce_vocabulary(make_bert(model.config.vocab_size, cls=BertModel), tokenizer, texts=TEXTS)
    assert encoder.rows.tensors.keys() == {"embeddings.word_embeddings.weight"}
    by_encoder = reduce_adapter(tmp_path / "whole", tmp_path / "a", vocabulary=encoder)
    by_model = reduce_adapter(tmp_path / "whole", tmp_path / "b", vocabulary=reduced)
    assert by_encoder.lost == by_model.lost
    assert list(by_model.kept) == ["bert.embeddings.word_embeddings.weight"]


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_written(bert, reduced, tmp_path):
    other = get_peft_model(make_bert(bert[0].config.vocab_size + 5), CONFIGS["sparse"]())
    other.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        FormatError, match=r"word_embeddings\.weight' is of shape .* reduced from \d+ tokens: the adapter belongs"
    ):
        reduce_adapter(tmp_path / "whole", tmp_path / "out", vocabulary=reduced)
    with pytest.raises(ConfigError, match=r"has no reduced_vocabulary\.safetensors"):
        reduce_adapter(tmp_path / "whole", tmp_path / "out", vocabulary=tmp_path)
    with pytest.raises(ConfigError, match="is the adapter itself"):
        reduce_adapter(tmp_path / "whole", tmp_path / "whole", vocabulary=reduced, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


@pytest.mark.parametrize("where", ["object", "folder"])
def test_an_adapter_of_another_model_that_has_no_rows_of_the_vocabulary_is_refused(reduced, tmp_path, where):
    vocabulary = reduced
    if where == "folder":
        reduced.save_pretrained(vocabulary := tmp_path / "small")
    size = reduced.rows.old_size
    wide = make_bert(size, hidden_size=24, intermediate_size=24)
    for model, names, told in (
        (make_llama(size), "all-linear", "has no such tensor"),
        (wide, ["query", "key"], r"is of shape \(24, 24\), and the reduced model has one of \("),
    ):
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        get_peft_model(model, RandConfig(num_weights=50, target_modules=names)).save_pretrained(tmp_path / "whole")
        with pytest.raises(FormatError, match=rf"{told}.*belongs to another base model"):
            reduce_adapter(tmp_path / "whole", tmp_path / "out", vocabulary=vocabulary)
        assert not (tmp_path / "out").exists()
