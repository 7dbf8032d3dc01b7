"""Heads and rows of trained tokens, where adapters are merged, added up and saved that are not the active ones."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import ConfigError
from tests.support.adapters import TYPES, adapted, config
from tests.support.models import IDS, bert, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")
HEAD = {"modules_to_save": ["lm_head"]}
ROWS = {"trainable_token_indices": list(range(20))}
WEIGHTS = ("SPARSE_FT", "ADA_SFT")


def with_own(kind, own, *, shared=False):
    """A model with adapters "a" and "b", both with heads or rows of their own if `shared`, else "b" alone."""
    model = adapted(kind, llama(), "a", **(own if shared else {}))
    model.add_adapter("b", config(kind, **own))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "modules_to_save." in name or "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter)
    return model.eval()


def outputs(model):
    """{active adapters: logits}; the first of them is active afterwards."""
    found = {}
    for names in (["b"], ["a"]):
        model.set_adapter(names)
        found[names[0]] = logits(model)
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["one has it", "both have it"])
@pytest.mark.parametrize("own", [HEAD, ROWS], ids=["head", "rows"])
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_merged_for_good_brings_its_own_along(kind, own, shared):
    model = with_own(kind, own, shared=shared)
    wanted = outputs(model)
    assert (wanted["a"] - wanted["b"]).abs().max() > 0.1
    for name in "ab":
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        torch.testing.assert_close(logits(merged), wanted[name])
    model.set_adapter("b")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["a"])), wanted["a"])


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_other_tokens_are_merged_together_and_those_of_the_same_are_refused(kind):
    model = with_own(kind, {"trainable_token_indices": [1, 3, 5]})
    model.add_adapter("c", config(kind, trainable_token_indices=[2, 4]))
    model.add_adapter("d", config(kind, trainable_token_indices=[2]))
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta
    rows["c"].data += 1
    expected = llama().get_input_embeddings().weight.detach().clone()
    expected[[1, 3, 5]], expected[[2, 4]] = rows["b"].detach().clone(), rows["c"].detach().clone()
    before = logits(model)
    with pytest.raises(ValueError, match="Token indices"):
        model.merge_and_unload(adapter_names=["c", "d"])
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload(adapter_names=["a", "b", "c"])
    assert torch.equal(merged.get_input_embeddings().weight, expected)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_not_merged_under_the_head_of_another(kind, caplog):
    model = with_own(kind, HEAD, shared=True)
    wanted = outputs(model)
    with pytest.raises(ConfigError, match=r"weights of 'b' under the head of 'a'.*set_adapter\('b'\) first"):
        model.merge_adapter(["b"])
    assert torch.equal(logits(model), wanted["a"]), "nothing is merged"
    model.set_adapter("b")
    model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), wanted["b"])
    model.unmerge_adapter()
    model.delete_adapter("a")
    model.add_adapter("a", config(kind))
    with caplog.at_level(logging.WARNING, "peft_sparse"):
        model.merge_adapter(["a"])
    assert "heads and token rows of ['b'], which is active, go on acting" in caplog.text


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_adapter_without_rows_is_merged_beside_one_that_has_them(kind):
    model = with_own(kind, ROWS)
    wanted = outputs(model)
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model), wanted["a"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted["a"])


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "MAD_G"])
def test_a_sum_gets_the_rows_of_trained_tokens(kind):
    model = with_own(kind, ROWS, shared=True)
    wanted = outputs(model)
    with pytest.raises(ConfigError, match=r"\['a', 'b'\] all have heads or token rows"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["a"], [1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), wanted["a"])
    model.add_weighted_adapter(["a", "b"], [0.0, 1.0], "other", head_from="b")
    model.set_adapter("other")
    if kind == "SPARSE_FT":
        torch.testing.assert_close(logits(model), wanted["b"])


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_without_rows_is_saved_and_loaded_beside_one_that_has_them(kind, tmp_path):
    model = with_own(kind, ROWS)
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "b", adapter_name="b").eval()
    loaded.load_adapter(tmp_path / "a", "a")
    for name in "ba":
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), wanted[name])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_layers_without_the_merged_adapter_do_not_compute_with_the_active_one(kind):
    model = adapted(kind, llama(), "a")
    model.add_adapter("b", config(kind, target_modules=["q_proj"]))
    wanted = outputs(model)
    for twin in (model, copy.deepcopy(model)):
        twin.merge_adapter(["b"], safe_merge=True)
        torch.testing.assert_close(logits(twin), wanted["b"])
        twin.unmerge_adapter()
        assert torch.equal(logits(twin), wanted["a"])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_merged_rows_of_trained_tokens_go_with_their_adapter(kind):
    model = with_own(kind, ROWS)
    wanted = outputs(model)
    model.set_adapter("b")
    model.merge_adapter()
    model.set_adapter("a")
    assert torch.equal(logits(model), wanted["a"])
    model.set_adapter("b")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted["b"])
    assert torch.equal(logits(model.unload()), logits(llama()))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_embeddings_beside_a_saved_adapter_have_nothing_merged_into_them(kind, tmp_path):
    model = adapted(kind, llama(), target_modules=["lm_head", "down_proj"])
    wanted = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(model), wanted)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_adapters_with_and_without_a_head_and_rows_share_a_batch(kind):
    model = with_own(kind, HEAD)
    model.add_adapter("c", config(kind, **ROWS))
    model.get_input_embeddings().token_adapter.trainable_tokens_delta["c"].data += 1
    model.eval()
    found = outputs(model)
    model.set_adapter("c")
    found |= {"c": logits(model), "__base__": logits(llama())}
    names = ["c", "a", "__base__", "b"]
    ids = IDS[:1].expand(len(names), -1)
    with torch.no_grad():
        together = model(input_ids=ids, adapter_names=names).logits
    for row, name in zip(together, names, strict=True):
        torch.testing.assert_close(row, found[name][0])


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_that_is_added_or_loaded_leaves_the_active_one_as_it_is(kind, tie, tmp_path):
    model = adapted(kind, llama(tie_word_embeddings=tie), "a", "b", **ROWS)
    for name in "ab":
        model.get_input_embeddings().token_adapter.trainable_tokens_delta[name].data += 1
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    plain = adapted(kind, llama(tie_word_embeddings=tie), "c")
    expected = logits(plain)
    trains = [name for name, p in plain.named_parameters() if p.requires_grad]
    plain.load_adapter(tmp_path / "a", "a")
    assert torch.equal(logits(plain.eval()), expected)
    plain.load_adapter(tmp_path / "b", "b")
    assert torch.equal(logits(plain.eval()), expected)
    assert [name for name, p in plain.named_parameters() if p.requires_grad] == trains
    for name in "ab":
        plain.set_adapter(name)
        assert torch.equal(logits(plain), wanted[name])


@pytest.mark.parametrize("kind", TYPES)
def test_a_tied_output_matrix_keeps_its_bias_beside_trained_rows(kind, tmp_path):
    # PEFT's own layer computes it without.
    def base():
        model = bert()
        model.cls.predictions.bias.data.normal_(generator=torch.Generator().manual_seed(0))
        return model

    plain = base()
    plain.bert.embeddings.word_embeddings.weight.data[[1, 7]] += 1.0
    # As it starts an adapter changes next to nothing.
    model = get_peft_model(base(), config(kind, init_weights=True, trainable_token_indices=[1, 7])).eval()
    next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).data += 1.0
    found = logits(model)
    torch.testing.assert_close(found, logits(plain), atol=1e-3, rtol=0)
    assert torch.equal(logits(copy.deepcopy(model)), found)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), found)
    torch.testing.assert_close(logits(model.merge_and_unload()), found)
