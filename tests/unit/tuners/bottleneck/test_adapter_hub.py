"""AdapterHub's files into a model: heads and their labels, hub ids, modes, names, T5."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, get_peft_model

from peft_sparse import (
    BottleneckConfig,
    RandConfig,
    extract_adapter,
    inspect_adapter,
    load_adapter_hub,
    merge_checkpoint,
    save_adapter_hub,
)
from peft_sparse.checkpoints import adapter_files
from peft_sparse.checkpoints.adapter_hub import Place, place_of
from peft_sparse.errors import ConfigError, FormatError
from tests.support.adapter_hub import IDS, LAYERS, WIDTH, bert, bottleneck, flexible_head, tensors, write_hub

pytestmark = pytest.mark.filterwarnings("ignore")

LABELS = {"B-PER": 0, "I-PER": 1, "O": 2}
OTHER_ORDER = {"O": 0, "B-PER": 1, "I-PER": 2}
TAGGING = flexible_head([(3, WIDTH)], head_type="tagging", label2id=LABELS)


def tagger(labels=None):
    names = {} if labels is None else {"id2label": {i: label for label, i in labels.items()}, "label2id": labels}
    return bert("BertForTokenClassification", num_labels=3, **names)


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


# ---- modes, names, architectures -----------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_takes_the_models_mode(training, tmp_path):
    folder = write_hub(tmp_path, config={"dropout": 0.5})
    model = load_adapter_hub(bert().train(training), folder)
    assert {module.training for module in model.modules()} == {training}
    model = load_adapter_hub(model, folder, adapter_name="second")
    assert {module.training for module in model.modules()} == {training}
    if not training:
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_new_adapter_takes_the_mode_too():
    model = get_peft_model(bert(), BottleneckConfig(bottleneck_size=4, dropout=0.5, init_weights=False))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS)[0], model(input_ids=IDS)[0])
        assert not torch.equal(model.train()(input_ids=IDS)[0], model(input_ids=IDS)[0])


BAD_NAMES = [
    "../evil",
    "/tmp/evil",
    "a/b",
    "a\\b",
    "..",
    "",
    "a\0b",
    "keys",
    "values",
    "forward",
    "training",
    "x" * 300,
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_not_a_path(name, tmp_path):
    folder = write_hub(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "name": name}))
    torch.save({k.replace(".qu.", f".{name}."): v for k, v in tensors().items()}, folder / "pytorch_adapter.bin")
    with pytest.raises(FormatError):
        load_adapter_hub(bert(), folder)
    with pytest.raises(FormatError, match="name"):
        load_adapter_hub(bert(), write_hub(tmp_path / "plain"), adapter_name=name or "a/b")


def test_another_name_opens_a_file_whose_own_is_a_path(tmp_path):
    model = load_adapter_hub(bert(), write_hub(tmp_path / "a", name="nli@ukp/mnli"), adapter_name="nli")
    model.save_pretrained(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "b" / "nli" / "adapter_config.json").is_file()


def test_a_taken_name_is_refused(tmp_path):
    model = load_adapter_hub(bert(), write_hub(tmp_path))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match="the model has an adapter 'qu' already"):
        load_adapter_hub(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_another_architecture_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        load_adapter_hub(bert(), write_hub(tmp_path / "a"))
        assert not caplog.records
        load_adapter_hub(bert(), write_hub(tmp_path / "b", model_type="roberta"))
    assert "was trained on a model of type 'roberta'" in caplog.text


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def write_t5(folder: Path, *, cross: bool) -> Path:
    holders = {"encoder": ["layer.0.attention_adapters", "layer.1.output_adapters"]}
    middle = ["layer.1.attention_adapters"] if cross else []
    holders["decoder"] = ["layer.0.attention_adapters", *middle, "layer.2.output_adapters"]
    generator, found = torch.Generator().manual_seed(3), {}
    for stack, paths in holders.items():
        for layer in range(2):
            for path in paths:
                found |= bottleneck(f"transformer.{stack}.block.{layer}.{path}.adapters.qu", generator)
    config = {"original_ln_before": False, "mh_adapter": True, "cross_adapter": cross}
    return write_hub(folder, config=config, change=lambda _: found, model_type="t5")


@pytest.mark.parametrize("cross", [False, True])
def test_t5_houlsby_files_map_by_sublayer(cross, tmp_path):
    folder = write_t5(tmp_path / "a", cross=cross)
    model = load_adapter_hub(t5(), folder)
    file = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    for stack, sublayer, holder in [("encoder", 0, "attention"), ("encoder", 1, "output"), ("decoder", 2, "output")]:
        for layer in range(2):
            path = f"{stack}.block.{layer}.layer.{sublayer}"
            site = model.base_model.model.get_submodule(f"{path}.dropout").bottleneck_adapters["qu"]
            key = f"transformer.{path}.{holder}_adapters.adapters.qu.adapter_down.0.weight"
            assert torch.equal(site.down.weight, file[key]), key
    crossing = model.base_model.model.decoder.block[0].layer[1].dropout
    assert hasattr(crossing, "bottleneck_adapters") is cross
    # f + A(f), before the residual: by hand, at one site.
    with torch.no_grad():
        site = model.base_model.model.encoder.block[0].layer[0].dropout
        x = torch.randn(2, 3, WIDTH)
        prefix = "transformer.encoder.block.0.layer.0.attention_adapters.adapters.qu"
        down, down_bias, up, up_bias = (
            file[f"{prefix}.{p}"]
            for p in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
        )
        torch.testing.assert_close(site(x), x + (x @ down.T + down_bias).relu() @ up.T + up_bias)
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path / "b")
        again = PeftModel.from_pretrained(t5(), tmp_path / "b" / "qu").eval()
        assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("transformer.decoder.block.3.layer.1.attention_adapters", Place("decoder", 3, "cross")),
        ("decoder.block.3.layer.0.dropout", Place("decoder", 3, "attention")),
        ("encoder.block.3.layer.1.DenseReluDense", Place("", 3, "output")),
        ("encoder.block.3.layer.2.output_adapters", None),
        ("bert.encoder.layer.11.attention.output", Place("", 11, "attention")),
        ("model.decoder.layers.0.encoder_attn.out_proj", Place("decoder", 0, "cross")),
        ("encoder.layer." + "1" * 9000, None),
    ],
)
def test_places(path, place):
    assert place_of(path) == place


def test_parallel_adapters_of_a_pre_norm_model_are_refused(tmp_path):
    config = {"original_ln_before": False, "is_parallel": True}
    base = transformers.GPT2Model(transformers.GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=LAYERS, n_head=2))
    with pytest.raises(FormatError, match="reads the residual before the norm"):
        load_adapter_hub(base, write_hub(tmp_path, config=config))
    load_adapter_hub(bert(), tmp_path)


# ---- the Hub -------------------------------------------------------------------------------------


def test_ids_of_the_hub_load(tmp_path, monkeypatch):
    local = write_hub(tmp_path / "cache", head=TAGGING)
    asked = []

    def download(repo, filename, *, subfolder=None, revision=None):
        asked.append((repo, subfolder, revision, filename))
        if not (local / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(local / filename)

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    model = load_adapter_hub(tagger(), "AdapterHub/bert-ner@v1", with_head=True)
    expected = load_adapter_hub(tagger(), local, with_head=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert asked[0] == ("AdapterHub/bert-ner", None, "v1", "adapter_config.json")
    asked.clear()
    load_adapter_hub(bert(), "AdapterHub/bert-ner/folder")
    assert {name for _, folder, _, name in asked if folder == "folder"} == {
        "adapter_config.json",
        "adapter.safetensors",
        "pytorch_adapter.bin",
    }, "the head was not asked for"


def test_neither_a_folder_nor_an_id(tmp_path, monkeypatch):
    def download(repo, filename, **kwargs):
        raise EntryNotFoundError(filename)

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    with pytest.raises(ConfigError, match="There is no folder"):
        load_adapter_hub(bert(), "nobody/nothing")
    with pytest.raises(ConfigError, match="no id of the Hub"):
        load_adapter_hub(bert(), str(tmp_path / "missing folder"))


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


def test_only_a_bottleneck_adapter_is_written(tmp_path):
    model = load_adapter_hub(bert(), write_hub(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"must be a bottleneck adapter, one of \['qu'\], got 'default'"):
        save_adapter_hub(model, tmp_path / "b")
    sparse = get_peft_model(bert(), RandConfig(density=0.1, target_modules=["query"]))
    with pytest.raises(ConfigError, match="must be a bottleneck adapter, and this model has none, got 'default'"):
        save_adapter_hub(sparse, tmp_path / "b")
    assert not (tmp_path / "b").exists()


DOORS = {
    "hub": "load_adapter_hub",
    "composable": "peft-sparse import .* composable-sft|composable-sft .* peft-sparse import",
    "spiel": "SpIEL fork .* peft-sparse import",
    "rosa": "RoSA .* peft-sparse import",
}


@pytest.mark.parametrize("kind", DOORS)
def test_refusals_lead_to_the_right_door(kind, tmp_path):
    folder = tmp_path / kind
    if kind == "hub":
        write_hub(folder)
    else:
        folder.mkdir()
    if kind == "composable":
        torch.save({}, folder / "pytorch_diff.bin")
    elif kind != "hub":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": {"spiel": "SFT", "rosa": "ROSA"}[kind]}))
    bert().save_pretrained(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    readers = [
        lambda: inspect_adapter(folder),
        lambda: merge_checkpoint(base, [folder], out),
        lambda: extract_adapter(base, folder, out, density=0.1),
    ]
    if kind != "hub":
        readers.append(lambda: load_adapter_hub(bert(), folder))
    for reader in readers:
        with pytest.raises(FormatError, match=DOORS[kind]) as refusal:
            reader()
        assert "again" not in str(refusal.value)


# ---- round trip ----------------------------------------------------------------------------------


def test_a_file_comes_back_with_its_head(tmp_path):
    model = load_adapter_hub(tagger(), write_hub(tmp_path / "a", head=TAGGING), with_head=True)
    save_adapter_hub(model, tmp_path / "b", adapter_name="qu", with_head=True)
    shutil.rmtree(tmp_path / "a")
    again = load_adapter_hub(tagger(OTHER_ORDER), tmp_path / "b", with_head=True)
    expected = by_label(model)
    assert all(torch.equal(scores, expected[label]) for label, scores in by_label(again).items())
