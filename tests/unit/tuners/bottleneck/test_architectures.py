"""Bottleneck adapters in every architecture of the table, and in ones that it does not know."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_sparse import BottleneckConfig, ConfigError, iter_bottlenecks
from peft_sparse.tuners.bottleneck.iteration import iter_layers
from peft_sparse.tuners.bottleneck.placement import ANATOMIES

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, LAYERS, SIZE = 16, 2, 3
IDS = torch.tensor([[3, 5, 7, 9, 2], [4, 4, 11, 22, 2]])
_IDS = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **_IDS,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {**_ENCODER, **_QUIET, "max_position_embeddings": 20}
_LLAMA = {**_ENCODER, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
_T5 = {**_IDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 20, "num_layers": LAYERS, "num_heads": 2, "dropout_rate": 0.0}
_T5["decoder_start_token_id"] = 0
_BART = {
    **_IDS,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "dropout": 0.0,
    "init_std": 0.2,
}
_GPT2 = {**_IDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "initializer_range": 0.2}
_DISTIL = {"vocab_size": 30, "dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 20, "dropout": 0.0}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# {model_type: (stem of its classes, fields of its config, what `AutoModelFor...` makes of it)}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("Bert", _BERT, "MaskedLM"),
    "roberta": ("Roberta", _BERT, "MaskedLM"),
    "xlm-roberta": ("XLMRoberta", _BERT, "MaskedLM"),
    "camembert": ("Camembert", _BERT, "MaskedLM"),
    "electra": ("Electra", {**_BERT, "embedding_size": 12}, "MaskedLM"),
    "deberta": ("Deberta", _DEBERTA, "MaskedLM"),
    "deberta-v2": ("DebertaV2", _DEBERTA, "MaskedLM"),
    "distilbert": ("DistilBert", {**_DISTIL, "attention_dropout": 0.0, "initializer_range": 0.2}, "MaskedLM"),
    "albert": ("Albert", {**_BERT, "embedding_size": 12}, "MaskedLM"),
    "modernbert": ("ModernBert", {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2}, "MaskedLM"),
    "llama": ("Llama", _LLAMA, "CausalLM"),
    "mistral": ("Mistral", _LLAMA, "CausalLM"),
    "qwen2": ("Qwen2", _LLAMA, "CausalLM"),
    "qwen3": ("Qwen3", _LLAMA, "CausalLM"),
    "gemma": ("Gemma", _LLAMA, "CausalLM"),
    "gemma2": ("Gemma2", _LLAMA, "CausalLM"),
    "gemma3_text": ("Gemma3Text", _LLAMA, "CausalLM"),
    "gpt2": ("GPT2", {**_GPT2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}, "CausalLM"),
    "t5": ("T5", _T5, "Seq2SeqLM"),
    "mt5": ("MT5", _T5, "Seq2SeqLM"),
    "bart": ("Bart", _BART, "Seq2SeqLM"),
}
ENCODER_DECODERS = ("t5", "mt5", "bart")
NO_PARALLEL = ("albert", "bart")
# (pfeiffer, houlsby): how many adapters a model of two layers gets.
COUNTS = dict.fromkeys(MODELS, (LAYERS, 2 * LAYERS))
COUNTS |= {"albert": (1, 2), **dict.fromkeys(ENCODER_DECODERS, (2 * LAYERS, 2 * LAYERS + 3 * LAYERS))}


@cache
def _original(name: str) -> nn.Module:
    stem, fields, task = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**fields)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    assert model.config.model_type == name
    return model.eval()


def base_model(name: str) -> nn.Module:
    return copy.deepcopy(_original(name))


def logits(model: nn.Module, name: str) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if name in ENCODER_DECODERS else {}
    return model(input_ids=IDS, **extra).logits


def test_every_architecture_of_the_table_is_tried():
    # A multimodal Gemma 3 has the layers of the text model.
    assert ANATOMIES.keys() - {"gemma3"} == MODELS.keys()


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("name", MODELS)
def test_on_differs_off_is_the_base_model(name, kind):
    if kind == "parallel" and name in NO_PARALLEL:
        with pytest.raises(ConfigError, match=rf"kind='parallel' is not known for '{name}'"):
            get_peft_model(base_model(name), BottleneckConfig(kind=kind))
        return
    base = base_model(name)
    with torch.no_grad():
        plain = logits(base, name)
    # Not relu: three units that are zero for all tokens would have no gradient.
    config = BottleneckConfig(kind=kind, bottleneck_size=SIZE, init_weights=False, activation="gelu")
    model = get_peft_model(base, config).eval()
    sites = dict(iter_bottlenecks(model))
    assert len(sites) == (COUNTS[name][1] if kind == "houlsby" else COUNTS[name][0])
    for module in sites.values():
        assert sum(p.numel() for p in module.parameters()) == 2 * WIDTH * SIZE + WIDTH + SIZE
    found = logits(model, name)
    assert (found - plain).abs().max() > 1e-3
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(logits(model, name), plain)
    found.square().sum().backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(".bottleneck_adapters." in key for key in trained)
    baked = model.merge_and_unload()
    torch.testing.assert_close(logits(baked, name), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("name", MODELS)
def test_every_adapter_acts(name, kind):
    # One at a time: a site whose module the model never calls would not show among others.
    model = get_peft_model(base_model(name), BottleneckConfig(kind=kind, bottleneck_size=SIZE, init="identity")).eval()
    with torch.no_grad():
        plain = logits(model, name)
        for path, module in iter_bottlenecks(model):
            module.up.bias[0] = 3.0
            assert (logits(model, name) - plain).abs().max() > 1e-4, path
            module.up.bias[0] = 0.0
        assert torch.equal(logits(model, name), plain)


@pytest.mark.parametrize("name", MODELS)
def test_invertible(name):
    config = BottleneckConfig(bottleneck_size=SIZE, invertible="nice", init="identity")
    base = base_model(name)
    if name in ENCODER_DECODERS:
        with pytest.raises(ConfigError, match=r"invertible='nice': it is not known which module .* invertible_module="):
            get_peft_model(base, config)
        return
    with torch.no_grad():
        plain = logits(base, name)
        model = get_peft_model(base, config).eval()
        [coupling] = [layer for _, layer in iter_layers(model) if "invertible" in layer.placements.values()]
        for parameter in coupling.bottleneck_adapters["default"].parameters():
            parameter.normal_(std=0.3)
        found = logits(model, name)
        assert (found - plain).abs().max() > 1e-3
        # Its inverse acts before the output embeddings: without it the logits are others.
        for handle in coupling.hooks.pop("inverse"):
            handle.remove()
        assert (logits(model, name) - found).abs().max() > 1e-3


def test_layers_of_a_base_model_without_head():
    sizes = {**_BERT, "num_hidden_layers": 4}
    for fields, wanted in (
        ({}, [0, 1, 2, 3]),
        ({"leave_out": [-1]}, [0, 1, 2]),
        ({"leave_out": [3, 0]}, [1, 2]),
        ({"layers_to_transform": [1, 2], "leave_out": [-2]}, [1]),
        ({"layers_to_transform": 3}, [3]),
        # The last layer is the model's, also where it is no target.
        ({"leave_out": [-1], "exclude_modules": r"encoder\.layer\.3\..*"}, [0, 1, 2]),
    ):
        model = get_peft_model(transformers.BertModel(transformers.BertConfig(**sizes)), BottleneckConfig(**fields))
        assert [path for path, _ in iter_bottlenecks(model)] == [f"encoder.layer.{i}.output.LayerNorm" for i in wanted]


def test_both_stacks_count_their_layers_from_zero():
    model = get_peft_model(base_model("t5"), BottleneckConfig(leave_out=[-1]))
    assert [path for path, _ in iter_bottlenecks(model)] == [
        "encoder.block.0.layer.1.DenseReluDense",
        "decoder.block.0.layer.2.DenseReluDense",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [7]}, r"there is no layer 7; layers count from 0 to 1"),
        (
            {"layers_to_transform": [0, -1]},
            r"there is no layer -1; layers .* \(or from the end, in leave_out",
        ),
        ({"leave_out": [-3]}, r"there is no layer -3"),
        ({"leave_out": [0, 1]}, r"leave_out=\[0, 1\] leave no layer"),
        ({"target_modules": ["nothing"]}, r"target_modules=\['nothing'\] matches no module .* norms \['attention.out"),
        ({"exclude_modules": ["LayerNorm"]}, "matches no module"),
        ({"invertible": "nice", "invertible_module": "dropout"}, "must match exactly one module"),
        ({"target_modules": ["attention.self"]}, "placement"),
    ],
)
def test_what_a_model_cannot_have_is_refused_before_it_is_touched(fields, message):
    base = base_model("bert")
    before = [name for name, _ in base.named_modules()]
    if message == "placement":
        # The attention of BERT gives no norm: it is taken for the feed-forward of a block.
        model = get_peft_model(base, BottleneckConfig(**fields))
        assert {layer.placements["default"] for _, layer in iter_layers(model)} == {"block"}
        return
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, BottleneckConfig(**fields))
    assert [name for name, _ in base.named_modules()] == before
    model = get_peft_model(base, BottleneckConfig(), adapter_name="good")
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("bad", BottleneckConfig(**fields))
    assert list(model.base_model.peft_config) == ["good"]
    model(input_ids=IDS)


def _opt() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "ffn_dim": 20, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**_IDS, **sizes, word_embed_proj_dim=WIDTH)).eval()


def test_an_unknown_architecture_says_what_to_name():
    with pytest.raises(
        ConfigError, match=r"in 'opt' \(known: .*Name the modules with target_modules: .* modules \[.*'fc2'.*'self_attn"
    ):
        get_peft_model(_opt(), BottleneckConfig())
    with pytest.raises(ConfigError, match="placement='block' needs target_modules"):
        BottleneckConfig(placement="block")


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"target_modules": ["fc2"]}, "block"),
        ({"target_modules": ["fc2"], "kind": "houlsby"}, "output"),
        ({"target_modules": r".*layers\.\d+\.fc2", "kind": "houlsby", "placement": "output"}, "output"),
    ],
)
def test_an_unknown_architecture_with_its_modules_named(fields, change):
    model = get_peft_model(_opt(), BottleneckConfig(bottleneck_size=SIZE, init_weights=False, **fields)).eval()
    assert {layer.placements["default"] for _, layer in iter_layers(model)} == {change}
    # The same by hand.
    twin = _opt()
    for path, module in iter_bottlenecks(model):
        target = twin.get_submodule(path)
        if change == "block":
            target = twin.get_submodule(path.rpartition(".")[0])

        def adapt(module_, args, output, adapter=module):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + adapter.up(torch.relu(adapter.down(hidden)))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        target.register_forward_hook(adapt)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=0, atol=1e-5)


def test_a_model_that_is_no_transformer():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ConfigError, match="in 'Sequential'"):
        get_peft_model(net, BottleneckConfig())
    x = torch.randn(3, 4)
    plain = net(x).detach()
    config = BottleneckConfig(kind="houlsby", target_modules=["2"], bottleneck_size=SIZE, init_weights=False)
    model = get_peft_model(net, config)
    [(path, adapter)] = iter_bottlenecks(model)
    assert path == "2"
    torch.testing.assert_close(model(x), plain + adapter.up(torch.relu(adapter.down(plain))))
    with pytest.raises(ConfigError, match="target module 1 of type ReLU does not say how wide its output is"):
        get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), BottleneckConfig(target_modules=["1"]))
