"""AdapterHub's files into a model: hub ids, modes, names, T5, and which door is which file's."""

from __future__ import annotations

import json
import logging
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
from tests.support.adapter_hub import IDS, LAYERS, TAGGING, WIDTH, bert, bottleneck, tagger, tensors, write_hub

pytestmark = pytest.mark.filterwarnings("ignore")

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


def test_only_a_bottleneck_adapter_is_written(tmp_path):
    model = load_adapter_hub(bert(), write_hub(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"must be a bottleneck adapter, one of \['qu'\], got 'default'"):
        save_adapter_hub(model, tmp_path / "b")
    sparse = get_peft_model(bert(), RandConfig(density=0.1, target_modules=["query"]))
    with pytest.raises(ConfigError, match="must be a bottleneck adapter, and this model has none, got 'default'"):
        save_adapter_hub(sparse, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": r".*layer\.\d+\.output\.dense", "placement": "output"},
            r"layer\.0\.output\.LayerNorm it is None, and there 'norm'",
        ),
        (
            {"target_modules": ["output.LayerNorm"], "placement": "norm"},
            r"layer\.0\.attention\.output\.LayerNorm it is 'norm', and there None",
        ),
        (
            {"kind": "houlsby", "exclude_modules": ["attention.output.dropout"]},
            r"layer\.0\.attention\.output\.dropout it is None, and there 'output'",
        ),
    ],
)
def test_an_adapter_at_places_of_its_own_is_not_written_as_one_of_the_librarys(fields, message, tmp_path):
    model = get_peft_model(bert(), BottleneckConfig(bottleneck_size=2, **fields))
    with pytest.raises(FormatError, match=f"lies where the adapters library has none of its kind: .*{message}"):
        save_adapter_hub(model, tmp_path / "b")
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


def test_trained_tokens_have_no_place_there(tmp_path):
    model = get_peft_model(bert(), BottleneckConfig(trainable_token_indices=[3]))
    with pytest.raises(FormatError, match=r"rows of trained tokens \(trainable_token_indices\).*save_pretrained"):
        save_adapter_hub(model, tmp_path / "there")
    assert not (tmp_path / "there").exists()
