"""Heads of AdapterHub's files: their labels, layers and shapes, damage, and two heads at once."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from peft_sparse import BottleneckConfig, RandConfig, load_adapter_hub, save_adapter_hub
from peft_sparse.errors import FormatError
from tests.support.adapter_hub import (
    IDS,
    LABELS,
    LAYERS,
    OTHER_ORDER,
    TAGGING,
    WIDTH,
    bert,
    flexible_head,
    tagger,
    write_hub,
)

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- heads ---------------------------------------------------------------------------------------


@torch.no_grad()
def by_label(model) -> dict[str, torch.Tensor]:
    logits = model(input_ids=IDS).logits
    return {model.config.id2label[i]: logits[..., i] for i in range(logits.shape[-1])}


def test_labels_go_to_the_outputs_of_the_same_name(tmp_path):
    folder = write_hub(tmp_path, head=TAGGING)
    named = by_label(load_adapter_hub(tagger(OTHER_ORDER), folder, with_head=True))
    model = load_adapter_hub(tagger(LABELS), folder, with_head=True)
    assert torch.equal(model.base_model.model.classifier.modules_to_save["qu"].bias, TAGGING[1]["heads.qu.1.bias"])
    for label, scores in by_label(model).items():
        assert torch.equal(named[label], scores), label


def test_a_model_without_names_takes_the_labels_of_the_file(tmp_path):
    base = tagger()
    model = load_adapter_hub(base, write_hub(tmp_path, head=TAGGING), with_head=True)
    assert base.config.id2label == {0: "B-PER", 1: "I-PER", 2: "O"}
    assert model.config.label2id == LABELS


def test_other_labels_are_refused_and_change_nothing(tmp_path):
    base = tagger({"x": 0, "y": 1, "z": 2})
    before = (dict(base.config.id2label), list(base.state_dict()))
    with pytest.raises(FormatError, match=r"labels of the file's head, \['B-PER', 'I-PER', 'O'\], are not those"):
        load_adapter_hub(base, write_hub(tmp_path, head=TAGGING), with_head=True)
    assert (dict(base.config.id2label), list(base.state_dict())) == before


@pytest.mark.parametrize(
    "labels", [{"a": 0, "b": 0, "c": 1}, {"a": 0, "b": 1}, {"a": 1, "b": 2, "c": 3}, {"a": "x", "b": 1, "c": 2}, [1, 2]]
)
def test_labels_that_number_nothing_are_refused(labels, tmp_path):
    head = flexible_head([(3, WIDTH)], head_type="tagging", label2id=labels)
    with pytest.raises(FormatError, match="label2id"):
        load_adapter_hub(tagger(), write_hub(tmp_path, head=head), with_head=True)


def test_a_head_without_labels_warns_where_the_model_has_names(tmp_path, caplog):
    head = flexible_head([(3, WIDTH)], head_type="tagging")
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        load_adapter_hub(tagger(LABELS), write_hub(tmp_path, head=head), with_head=True)
    assert "do not say what its labels are" in caplog.text


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        ("BertForSequenceClassification", {"classifier": (2, WIDTH)}),
        ("BertForTokenClassification", {"classifier": (2, WIDTH)}),
        ("BertForQuestionAnswering", {"qa_outputs": (2, WIDTH)}),
        ("RobertaForSequenceClassification", {"classifier.dense": (WIDTH, WIDTH), "classifier.out_proj": (2, WIDTH)}),
        ("DistilBertForSequenceClassification", {"pre_classifier": (WIDTH, WIDTH), "classifier": (2, WIDTH)}),
    ],
)
def test_static_heads_of_old_files(cls, names, tmp_path):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    model_type = "bert"
    base = bert(cls) if cls.startswith("Bert") else None
    if cls.startswith("Roberta"):
        model_type = "roberta"
        base = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=100, **sizes))
    elif cls.startswith("Distil"):
        model_type, old = "distilbert", {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 64}
        config = transformers.DistilBertConfig(vocab_size=100, **old)
        base = transformers.DistilBertForSequenceClassification(config)
    head = {f"{layer}.weight": torch.randn(shape) for layer, shape in reversed(names.items())}
    head |= {f"{layer}.bias": torch.randn(shape[0]) for layer, shape in names.items()}
    about = {"model_class": cls, "num_labels": 2, "label2id": {"neg": 0, "pos": 1}}
    folder = write_hub(tmp_path, head=(about, head), model_type=model_type)
    model = load_adapter_hub(base.eval(), folder, with_head=True)
    own = dict(model.named_parameters())
    for key, tensor in head.items():
        found = [p for n, p in own.items() if "modules_to_save.qu" in n and n.endswith(key.rpartition(".")[2])]
        assert any(torch.equal(p, tensor) for p in found), key
    if "Question" not in cls:
        assert base.config.id2label == {0: "neg", 1: "pos"}


def test_two_layers_go_into_berts_pooler_and_classifier(tmp_path):
    head = flexible_head([(WIDTH, WIDTH), (2, WIDTH)], head_type="classification", use_pooler=False)
    folder = write_hub(tmp_path / "a", head=head)
    model = load_adapter_hub(bert("BertForSequenceClassification"), folder, with_head=True)
    assert model.peft_config["qu"].modules_to_save == ["pooler", "classifier"]
    plain = load_adapter_hub(bert(), folder)
    with torch.no_grad():
        first = plain(input_ids=IDS).last_hidden_state[:, 0]
        one, one_bias, two, two_bias = head[1].values()
        expected = torch.tanh(first @ one.T + one_bias) @ two.T + two_bias
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path / "b")
        again = PeftModel.from_pretrained(bert("BertForSequenceClassification"), tmp_path / "b" / "qu")
        assert torch.equal(again.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("change", [{"use_pooler": True}, {"activation_function": "gelu"}, {"head_type": "tagging"}])
def test_two_layers_that_compute_something_else_are_refused(change, tmp_path):
    config = {"head_type": "classification", "use_pooler": False, **change}
    head = flexible_head([(WIDTH, WIDTH), (2, WIDTH)], **config)
    with pytest.raises(FormatError, match="has no counterpart in BertForSequenceClassification"):
        load_adapter_hub(bert("BertForSequenceClassification"), write_hub(tmp_path, head=head), with_head=True)


def test_a_head_without_bias_has_none(tmp_path):
    about, head = flexible_head([(3, WIDTH)], head_type="tagging")
    del head["heads.qu.1.bias"]
    base = tagger()
    torch.nn.init.ones_(base.classifier.bias)
    model = load_adapter_hub(base, write_hub(tmp_path, head=(about, head)), with_head=True)
    assert not model.base_model.model.classifier.modules_to_save["qu"].bias.any()


def test_another_number_of_labels_says_what_to_do(tmp_path):
    base = bert("BertForTokenClassification", num_labels=5)
    with pytest.raises(FormatError, match="make the model with num_labels=3"):
        load_adapter_hub(base, write_hub(tmp_path, head=TAGGING), with_head=True)


def test_a_damaged_head_is_read_only_when_asked_for(tmp_path):
    folder = write_hub(tmp_path, head=TAGGING)
    (folder / "pytorch_model_head.bin").write_bytes(b"damaged")
    (folder / "head_config.json").write_text("{")
    load_adapter_hub(bert(), folder)
    with pytest.raises(FormatError):
        load_adapter_hub(tagger(), folder, with_head=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k.replace(".qu.", ".en."): v for k, v in t.items()}, "of another head than that of 'qu'"),
        (lambda t: {**t, "heads.qu.4.weight": torch.ones(3, 3)}, "has no counterpart"),
        (lambda t: {**t, "heads.qu.2.LayerNorm": torch.ones(3)}, "no part of a head of linear layers"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "NaN"),
        (lambda t: {k: v.long() for k, v in t.items()}, "floating-point"),
        (lambda t: {k: v for k, v in t.items() if "bias" in k}, "without its weight"),
        (lambda t: {}, "holds no head"),
    ],
)
def test_heads_that_contradict_their_config(change, message, tmp_path):
    base = tagger()
    with pytest.raises(FormatError, match=message):
        load_adapter_hub(base, write_hub(tmp_path, head=(TAGGING[0], change(dict(TAGGING[1])))), with_head=True)
    assert not hasattr(base, "peft_config")


# ---- two heads at once ---------------------------------------------------------------------------


def with_two_heads(config):
    model = get_peft_model(
        bert("BertForSequenceClassification"), config(task_type="SEQ_CLS"), adapter_name="lang"
    ).eval()
    model.add_adapter("task", config(task_type="SEQ_CLS"))
    model.add_adapter("more", config(task_type="SEQ_CLS"))
    with torch.no_grad():
        for number, name in enumerate(("lang", "task", "more")):
            model.base_model.model.classifier.modules_to_save[name].bias += 10.0 * (number + 1)
    return model


@pytest.mark.parametrize(
    "config",
    [
        lambda **more: BottleneckConfig(bottleneck_size=4, init_weights=False, **more),
        lambda **more: RandConfig(density=0.1, target_modules=["query"], init_weights=False, **more),
    ],
    ids=["bottleneck", "sparse"],
)
def test_the_last_adapters_head_acts(config, caplog):
    model = with_two_heads(config)
    head, hidden = model.base_model.model.classifier, []
    head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="peft_sparse"):
        for names in (["lang", "task"], ["task", "lang"], ["lang", "task", "more"]):
            model.base_model.set_adapter(names)
            assert model.base_model.active_adapters == names
            hidden.clear()
            logits = model(input_ids=IDS).logits
            assert torch.equal(logits, head.modules_to_save[names[-1]](hidden[0]))
        assert "'lang' has a head of its own, but that of 'more' acts" in caplog.text
        # What is left stays a stack when the adapter whose head acted goes.
        model.delete_adapter("more")
        assert model.base_model.active_adapters == ["lang", "task"]
        assert head.active_adapters == ["task"]
        assert model(input_ids=IDS).logits.mean() > 15


# ---- round trip ----------------------------------------------------------------------------------


def test_a_file_comes_back_with_its_head(tmp_path):
    model = load_adapter_hub(tagger(), write_hub(tmp_path / "a", head=TAGGING), with_head=True)
    save_adapter_hub(model, tmp_path / "b", adapter_name="qu", with_head=True)
    shutil.rmtree(tmp_path / "a")
    again = load_adapter_hub(tagger(OTHER_ORDER), tmp_path / "b", with_head=True)
    expected = by_label(model)
    assert all(torch.equal(scores, expected[label]) for label, scores in by_label(again).items())
