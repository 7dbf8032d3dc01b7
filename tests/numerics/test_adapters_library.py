"""Bottleneck adapters compute what the `adapters` library computes with the same files, and write files it wrote.

The library is not needed here: see fixtures/make_adapters_library.py.
"""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_sparse import BottleneckConfig, FormatError, iter_bottlenecks, load_adapter_hub, save_adapter_hub
from peft_sparse.checkpoints.adapter_hub import read_adapter_hub
from peft_sparse.tuners.bottleneck.invertible import Nice
from tests.support.adapters_library import ADAPTERS, MODELS, ROOT, STACKS, base_model, expected

pytestmark = pytest.mark.filterwarnings("ignore")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # Logits are of size 10; the library and transformers sum in another order.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_single_and_stacked_adapters(name):
    wanted = expected(name)
    ids = wanted["input_ids"]
    model = base_model(name)
    close(logits(model, ids), wanted["base"])
    for adapter in ADAPTERS:
        model = load_adapter_hub(model, ROOT / name / adapter)
    for setup in (*ADAPTERS, *STACKS):
        model.base_model.set_adapter(setup.split("+"))
        close(logits(model, ids), wanted[setup])
        assert (wanted[setup] - wanted["base"]).abs().max() > 0.5, "a lost adapter would go unnoticed"
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base_model(name), ids))


def test_the_comparison_notices_another_order_and_a_coupling_that_is_not_undone(monkeypatch):
    wanted = expected("bert")
    ids = wanted["input_ids"]
    model = load_adapter_hub(base_model("bert"), ROOT / "bert" / "language")
    model = load_adapter_hub(model, ROOT / "bert" / "pfeiffer")
    model.base_model.set_adapter(["pfeiffer", "language"])
    with pytest.raises(AssertionError):
        close(logits(model, ids), wanted["language+pfeiffer"])
    model.base_model.set_adapter(["language", "pfeiffer"])
    close(logits(model, ids), wanted["language+pfeiffer"])
    monkeypatch.setattr(Nice, "inverse", lambda self, y: y)
    with pytest.raises(AssertionError):
        close(logits(model, ids), wanted["language+pfeiffer"])


def test_head_of_two_layers(tmp_path):
    wanted = expected("bert-with-head")
    file = read_adapter_hub(ROOT / "bert-with-head" / "task")
    assert (file.head["head_type"], [tuple(w.shape) for w, _ in file.head_tensors]) == (
        "classification",
        [(16, 16), (3, 16)],
    )
    # BertForSequenceClassification has one layer behind the pooler: no place for this head.
    base = base_model("bert-with-head", "AutoModelForSequenceClassification")
    with pytest.raises(FormatError, match=r"head of adapter 'task' .* has no counterpart in BertForSequenceClassif"):
        load_adapter_hub(base, ROOT / "bert-with-head" / "task", with_head=True)
    assert not hasattr(base, "peft_config")
    model = load_adapter_hub(base_model("bert-with-head", "AutoModel"), ROOT / "bert-with-head" / "task").eval()
    with torch.no_grad():
        hidden = model(input_ids=wanted["input_ids"]).last_hidden_state[:, 0]
        (first, first_bias), (second, second_bias) = file.head_tensors
        found = torch.tanh(hidden @ first.T + first_bias) @ second.T + second_bias
    close(found, wanted["task"])


def test_head_into_the_models_own():
    # The classifier of XLM-R and RoBERTa computes the two layers of the library's head.
    folder = ROOT / "bert-with-head" / "task"
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = transformers.RobertaConfig(vocab_size=24, num_labels=3, **sizes)
    model = load_adapter_hub(transformers.RobertaForSequenceClassification(config), folder, with_head=True)
    file = read_adapter_hub(folder)
    head = model.base_model.model.classifier.modules_to_save["task"]
    assert torch.equal(head.dense.weight, file.head_tensors[0][0])
    assert torch.equal(head.out_proj.bias, file.head_tensors[1][1])
    assert model.peft_config["task"].modules_to_save == ["classifier"]


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "electra", "distilbert"])
def test_head_only_where_the_same_is_computed(model_type):
    # The file's head has a tanh. ELECTRA's classifier has the same shapes and a gelu, DistilBERT's another module.
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    if model_type == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=24, num_labels=3, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    folder = ROOT / "bert-with-head" / "task"
    if model_type in ("electra", "distilbert"):
        with pytest.raises(FormatError, match=r"use_pooler=False, tanh\) has no counterpart in "):
            load_adapter_hub(model, folder, with_head=True)
        assert not hasattr(model, "peft_config")
    else:
        load_adapter_hub(model, folder, with_head=True)


@pytest.mark.parametrize(
    ("cls", "config", "wanted"),
    [
        ("BertForSequenceClassification", "BertConfig", {"layers": 1, "use_pooler": True}),
        ("RobertaForSequenceClassification", "RobertaConfig", {"layers": 2, "use_pooler": False}),
        ("ElectraForSequenceClassification", "ElectraConfig", {"layers": 2, "activation_function": "gelu"}),
        ("BertForTokenClassification", "BertConfig", {"head_type": "tagging", "layers": 1}),
        ("DistilBertForQuestionAnswering", "DistilBertConfig", {"head_type": "question_answering", "layers": 1}),
    ],
)
def test_exported_head_comes_back(cls, config, wanted, tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    if config == "DistilBertConfig":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20}
    config = getattr(transformers, config)(vocab_size=24, id2label={0: "no", 1: "yes"}, **sizes)
    base = getattr(transformers, cls)(config)
    module = "qa_outputs" if "Question" in cls else "classifier"
    start = copy.deepcopy(base)
    model = get_peft_model(base, BottleneckConfig(bottleneck_size=4, modules_to_save=[module], init_weights=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    save_adapter_hub(model, tmp_path, with_head=True)
    head = read_adapter_hub(tmp_path).head
    assert head["label2id"] == {"no": 0, "yes": 1}
    assert {key: head[key] for key in wanted} == wanted
    # The library takes the head only under its own name of the class.
    file = json.loads((tmp_path / "head_config.json").read_text())
    assert file["model_class"] == f"{cls.partition('For')[0]}AdapterModel"
    again = load_adapter_hub(start, tmp_path, with_head=True).eval()
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        found, expected = again(input_ids=ids).to_tuple()[0], model.eval()(input_ids=ids).to_tuple()[0]
    assert torch.equal(found, expected)
    # Written again without it, the old head does not stay beside the new adapter.
    save_adapter_hub(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter.safetensors"}


def test_exported_head_is_the_librarys_own(tmp_path):
    import transformers

    folder = ROOT / "bert-with-head" / "task"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = transformers.RobertaConfig(vocab_size=24, id2label={0: "no", 1: "maybe", 2: "yes"}, **sizes)
    model = load_adapter_hub(transformers.RobertaForSequenceClassification(config), folder, with_head=True)
    save_adapter_hub(model, tmp_path, adapter_name="task", with_head=True)
    theirs = torch.load(folder / "pytorch_model_head.bin", weights_only=True)
    ours = load_file(tmp_path / "model_head.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (json.loads((place / "head_config.json").read_text()) for place in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert ours["config"] == theirs["config"]


def test_head_that_the_library_does_not_have(tmp_path):
    model = get_peft_model(base_model("bert"), BottleneckConfig(bottleneck_size=4))
    with pytest.raises(FormatError, match="head of BertForMaskedLM has no counterpart in the adapters library"):
        save_adapter_hub(model, tmp_path / "x", with_head=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_exported_files_are_the_librarys_own(name, adapter, tmp_path):
    model = load_adapter_hub(base_model(name), ROOT / name / adapter)
    save_adapter_hub(model, tmp_path, adapter_name=adapter)
    [path] = [p for p in (ROOT / name / adapter).iterdir() if p.suffix in (".bin", ".safetensors")]
    theirs = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
    ours = load_file(tmp_path / "adapter.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path, ROOT / name / adapter))
    assert {key: ours[key] for key in ("name", "hidden_size", "model_type", "version")} == {
        key: theirs[key] for key in ("name", "hidden_size", "model_type", "version")
    }
    for key, value in ours["config"].items():
        assert value == theirs["config"][key] or key == "init_weights", key
    again = load_adapter_hub(base_model(name), tmp_path)
    close(logits(again, expected(name)["input_ids"]), expected(name)[adapter])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 16, 20])
def test_exported_reduction_factor_gives_the_size_back(size, tmp_path):
    # The library has no field for the size: it computes int(width // reduction_factor).
    model = get_peft_model(base_model("bert"), BottleneckConfig(bottleneck_size=size))
    save_adapter_hub(model, tmp_path)
    factor = json.loads((tmp_path / "adapter_config.json").read_text())["config"]["reduction_factor"]
    assert int(16 // factor) == size


def test_legacy_names(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "bert" / "language", folder)
    weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    renamed = {
        key.replace("output.adapters", "output.layer_text_lang_adapters").replace(
            "invertible_adapters", "invertible_lang_adapters"
        ): tensor
        for key, tensor in weights.items()
    }
    assert renamed.keys().isdisjoint(weights)
    torch.save(renamed, folder / "pytorch_adapter.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["config"]["inv_adapter"], config["config"]["inv_adapter_reduction_factor"]
    config["config"]["invertible_adapter"] = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = load_adapter_hub(base_model("bert"), folder)
    close(logits(model, expected("bert")["input_ids"]), expected("bert")["language"])


def _edit_tensors(folder, change):
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({key: change(key, tensor) for key, tensor in tensors.items()}, path)


def test_an_invertible_adapter_of_another_shape_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(ROOT / "bert" / "language", folder)
    _edit_tensors(folder, lambda key, t: t[:2] if "invertible" in key else t)
    base = base_model("bert")
    with pytest.raises(FormatError, match=r"at bert.embeddings.dropout it has tensors of the shapes"):
        load_adapter_hub(base, folder)
    assert not hasattr(base, "peft_config")
    with pytest.raises(FormatError, match=r"adapter_name 'a\.b' has a dot"):
        load_adapter_hub(base, ROOT / "bert" / "language", adapter_name="a.b")


class _Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: torch.save({"x": _Bomb()}, f / "pytorch_adapter.bin"), "is not readable"),
        (lambda f: (f / "pytorch_adapter.bin").write_bytes(b"no"), "is not readable"),
        (lambda f: (f / "pytorch_adapter.bin").unlink(), r"holds none of adapter\.safetensors, pytorch_adapter\.bin"),
        (lambda f: (f / "adapter_config.json").unlink(), "does not exist"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r'must hold a "config" and a "name"'),
        (lambda f: torch.save({"roberta.loras.x.a": torch.ones(1)}, f / "pytorch_adapter.bin"), "is no part of"),
        (lambda f: torch.save({"x": "y"}, f / "pytorch_adapter.bin"), "must hold named tensors"),
        (lambda f: _edit(f, phm_layer=True), "phm_layer=True"),
        (lambda f: _edit(f, residual_before_ln="post_add"), "residual_before_ln='post_add'"),
        (lambda f: _edit(f, scaling="channel"), "scaling='channel'"),
        (lambda f: _edit(f, original_ln_before=False), "only the kinds pfeiffer"),
        (lambda f: _edit(f, leave_out=[0]), "too many"),
    ],
)
def test_refused_files_leave_the_model_alone(change, message, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(ROOT / "bert" / "pfeiffer", folder)
    change(folder)
    base = base_model("bert")
    before = list(base.state_dict())
    with pytest.raises(FormatError, match=message):
        load_adapter_hub(base, folder)
    assert list(base.state_dict()) == before
    assert not hasattr(base, "peft_config")


def test_a_model_of_another_width_or_architecture_is_refused(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(FormatError, match=r"does not fit this BertModel of width 8: at .* shapes .*\(4, 16\)"):
        load_adapter_hub(transformers.BertModel(config), ROOT / "bert" / "pfeiffer")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 24}
    model = load_adapter_hub(transformers.GPT2Model(transformers.GPT2Config(**sizes)), ROOT / "bert" / "pfeiffer")
    with pytest.raises(FormatError, match="adapters on 'gpt2' cannot be written for the adapters library"):
        save_adapter_hub(model, tmp_path / "x", adapter_name="pfeiffer")
    assert len(list(iter_bottlenecks(model, "pfeiffer"))) == 2
