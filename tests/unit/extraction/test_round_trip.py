"""From a fine-tuned checkpoint to an adapter and back: the whole difference gives the tuned model, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse import Extraction, extract_adapter, iter_deltas
from tests.support.checkpoints import (
    IDS,
    SIZES,
    assert_same_weights,
    bits,
    output,
    save,
    saved_deltas,
    tiny_bert,
    tiny_classifier,
    tiny_llama,
    tune,
)
from tests.support.models import bert

EVERYTHING = [{"density": 1.0}, {"num_weights": "changed"}]


def extract(base, tuned, folder, **request) -> Extraction:
    """Both are saved, the tuned one in several shards."""
    paths = save(base, folder / "base"), save(tuned, folder / "tuned", max_shard_size="4KB")
    assert len(list((folder / "tuned").glob("*.safetensors"))) > 2
    return extract_adapter(*paths, folder / "adapter", **request)


def merged(kind, folder, **options):
    base = kind.from_pretrained(folder / "base", **options)
    return PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()


@pytest.mark.parametrize("request_", EVERYTHING, ids=["density", "changed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_whole_difference_is_the_tuned_model(tmp_path, dtype, request_):
    base = tiny_llama(dtype)
    tuned = tune(base, share=0.5)
    found = extract(base, tuned, tmp_path, **request_)
    assert_same_weights(merged(LlamaForCausalLM, tmp_path), tuned)
    differing = sum(
        int((a != b).sum()) for a, b in zip(base.state_dict().values(), tuned.state_dict().values(), strict=True)
    )
    assert found.total.differing == differing
    assert found.total.count == (found.total.size if "density" in request_ else differing)
    assert (found.inexact, found.total.share_kept) == (0, pytest.approx(1.0))


@pytest.mark.parametrize("values_dtype", [None, "float32", "float64"])
def test_weights_that_change_sign_need_float64(tmp_path, values_dtype):
    base = tiny_llama()
    tuned = tune(base, scale=0.2)
    found = extract(base, tuned, tmp_path, density=1.0, values_dtype=values_dtype)
    model = merged(LlamaForCausalLM, tmp_path)
    wrong = sum(
        int((a != b).sum()) for a, b in zip(model.state_dict().values(), tuned.state_dict().values(), strict=True)
    )
    assert wrong == found.inexact
    assert (wrong > 0) == (values_dtype == "float32")
    assert found.values_dtype == ("float32" if values_dtype == "float32" else "float64")


def test_zeros_of_both_signs_and_subnormals(tmp_path):
    base = tiny_llama()
    tuned = copy.deepcopy(base)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e38, -1e38, 1.0])
    rows = base.model.layers[0].mlp.up_proj.weight.data, tuned.model.layers[0].mlp.up_proj.weight.data
    for weight, pattern in zip(rows, (special[:, None].expand(8, 8), special[None].expand(8, 8)), strict=True):
        weight[:8, :8] = pattern
    found = extract(base, tuned, tmp_path, num_weights="changed", values_dtype="float64")
    there = merged(LlamaForCausalLM, tmp_path).model.layers[0].mlp.up_proj.weight.data
    # Beside 1, 1e-45 and 1e-40 are lost, and beside 1e38 even 1; what comes of that is counted.
    assert found.inexact == int((there != rows[1]).sum()) == 11
    right = there == rows[1]
    lost_sign = (rows[1] == 0) & rows[1].signbit() & ~(rows[0] == 0)
    same = (bits(there) == bits(rows[1])).view(-1, 4).all(1).view(there.shape)
    assert torch.equal(same | lost_sign | ~right | (rows[1] == 0), torch.ones_like(same))
    assert torch.equal(same[right & (rows[1] != 0)], torch.ones(int((right & (rows[1] != 0)).sum()), dtype=torch.bool))


def test_minus_zero_stays_where_nothing_changed(tmp_path):
    base = tiny_llama()
    base.model.layers[1].mlp.down_proj.weight.data[0] = -0.0
    tuned = copy.deepcopy(base)
    tuned.model.layers[0].mlp.down_proj.weight.data += 0.5
    extract(base, tuned, tmp_path, density=1.0)
    assert_same_weights(merged(LlamaForCausalLM, tmp_path), tuned)


def test_a_tied_output_layer_follows_its_embedding(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    tuned = tune(base)
    found = extract(base, tuned, tmp_path, density=1.0)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(output(model), output(LlamaForCausalLM.from_pretrained(tmp_path / "tuned")))
    sizes = {kept.name: kept.size for kept in found.tensors}
    assert sizes["lm_head.weight"] == sizes["model.embed_tokens.weight"] == 30 * 16
    model = model.merge_and_unload()
    assert torch.equal(model.lm_head.weight, tuned.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, tuned.lm_head.weight)


def test_an_output_layer_can_be_left_out(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    found = extract(base, tune(base), tmp_path, density=1.0, exclude_modules=["lm_head"])
    assert "lm_head.weight" not in {kept.name for kept in found.tensors}
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(model.base_model.model.lm_head.weight, base.lm_head.weight)


def test_embeddings_that_share_a_matrix_are_listed_once(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    base = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    tuned = tune(base)
    found = extract(base, tuned, tmp_path, density=1.0)
    model = PeftModel.from_pretrained(
        T5ForConditionalGeneration.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    reloaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "tuned").eval()
    with torch.no_grad():
        outputs = [m.eval()(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, reloaded)]
    assert torch.equal(*outputs)
    embeddings = {kept.name for kept in found.tensors if "embed" in kept.name or "shared" in kept.name}
    assert embeddings == {"shared.weight"}


@pytest.mark.parametrize("request_", EVERYTHING, ids=["density", "changed"])
def test_a_head_that_the_base_lacks_is_saved_whole(tmp_path, request_):
    base, classifier = tiny_bert(), tiny_classifier()
    classifier.bert.load_state_dict(base.state_dict())
    tuned = tune(classifier)
    found = extract(base, tuned, tmp_path, **request_)
    assert found.heads == ("classifier",)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(output(model), output(reloaded))
    assert_same_weights(model.merge_and_unload(), tuned)


def test_head_and_pooler_over_a_masked_language_model(tmp_path):
    torch.manual_seed(0)
    base, classifier = bert(**SIZES, max_position_embeddings=512), tiny_classifier()
    classifier.bert.load_state_dict(base.bert.state_dict(), strict=False)
    tuned = tune(classifier)
    found = extract(base, tuned, tmp_path, density=1.0)
    assert set(found.heads) == {"classifier", "bert.pooler"}
    assert_same_weights(merged(BertForSequenceClassification, tmp_path, num_labels=3), tuned)


def test_a_classifier_over_a_language_model(tmp_path):
    base = tiny_llama()
    torch.manual_seed(2)
    classifier = LlamaForSequenceClassification(type(base.config)(**SIZES, num_labels=4, pad_token_id=0))
    classifier.model.load_state_dict(base.model.state_dict())
    tuned = tune(classifier)
    found = extract(base, tuned, tmp_path, density=1.0)
    assert found.heads == ("score",)
    model = merged(LlamaForSequenceClassification, tmp_path, num_labels=4, pad_token_id=0)
    assert_same_weights(model, tuned)


def test_both_have_a_classifier(tmp_path):
    # PEFT trains and saves the head of this task whole whatever the config says, so it is no sparse target.
    base = tiny_classifier()
    tuned = tune(base)
    found = extract(base, tuned, tmp_path, density=1.0)
    assert found.heads == ("classifier",)
    assert_same_weights(merged(BertForSequenceClassification, tmp_path, num_labels=3), tuned)


def test_a_bare_model_out_of_a_headed_base(tmp_path):
    torch.manual_seed(0)
    base = tiny_classifier()
    tuned = tune(base.bert)
    found = extract(base, tuned, tmp_path, density=1.0)
    assert found.heads == ()
    assert_same_weights(merged(type(tuned), tmp_path), tuned)


@pytest.mark.parametrize(("of_base", "of_tuned"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_different_dtypes_meet_in_the_wider_one(tmp_path, of_base, of_tuned):
    base = tiny_llama(of_base)
    tuned = tune(base.float()).to(of_tuned)
    base = base.to(of_base)
    extract(base, tuned, tmp_path, density=1.0)
    assert_same_weights(merged(LlamaForCausalLM, tmp_path, dtype=torch.float32), tuned.float())
    if of_base == torch.bfloat16:
        # As it is stored: the sums are rounded once more, and to the same as the tuned weights would be.
        assert_same_weights(merged(LlamaForCausalLM, tmp_path), tuned.to(torch.bfloat16))


def test_the_file_is_a_normal_adapter(tmp_path):
    base = tiny_llama()
    found = extract(base, tune(base), tmp_path, density=0.1, values_dtype="bfloat16")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert found.file_size == file.stat().st_size
    deltas = saved_deltas(file)
    assert {name: delta.count for name, delta in deltas.items()} == {k.name: k.count for k in found.tensors if k.count}
    assert {tensor.dtype for key, tensor in load_file(file).items() if key.endswith("values")} == {torch.bfloat16}
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    config = model.peft_config["default"]
    assert (config.method, config.density, config.budget, config.task_type) == ("fixed", 0.1, "global", "CAUSAL_LM")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert config.provenance == {
        "tuned": str(tmp_path / "tuned"),
        "criterion": "change",
        "share_kept": pytest.approx(found.total.share_kept, abs=1e-6),
    }
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Extracted without training from `tuned`" in card
    assert str(tmp_path) not in card
    assert f"{found.total.share_kept:.1%} of the squared difference" in card
    assert sum(delta.count for _, _, _, delta in iter_deltas(model, "default")) == found.total.count
