"""Which parameters a config targets, and how many weights of each."""

from __future__ import annotations

import time

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    LotteryTicketConfig,
    RandConfig,
    SparseConfig,
    iter_deltas,
    start_dense_phase,
)
from tests.support import models

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 30}


def llama(**fields) -> nn.Module:
    return models.llama(num_hidden_layers=3, num_key_value_heads=2, **fields)


def bert(cls=BertForSequenceClassification) -> nn.Module:
    return models.bert(cls, num_hidden_layers=3)


def counts(model: nn.Module, **fields) -> dict[str, int]:
    tuned = get_peft_model(model, RandConfig(**{"density": 0.5, **fields}))
    return {name: delta.count for name, _, _, delta in iter_deltas(tuned)}


def test_all_linear_is_the_default_and_leaves_the_head_out():
    names = set(counts(llama()))
    assert names == set(counts(llama(), target_modules="all-linear"))
    assert len(names) == 3 * 7
    assert not any("lm_head" in name or "norm" in name or "embed" in name for name in names)


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForMaskedLM])
def test_all_is_every_parameter_of_the_base_model_without_the_head(cls):
    base = bert(cls)
    expected = {f"bert.{name}" for name, _ in base.bert.named_parameters()}
    assert set(counts(base, target_modules="all")) == expected
    assert any("LayerNorm.bias" in name for name in expected)


def test_all_on_a_module_of_ones_own():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    assert set(counts(net, target_modules="all")) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}


def test_names_regex_biases_norms_and_parameters():
    assert set(counts(bert(), target_modules=["query"])) == {
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(3)
    }
    assert len(counts(bert(), target_modules=["query"], target_biases=True)) == 6
    assert set(counts(bert(), target_modules=r".*layer\.1\..*\.(key|value)")) == {
        f"bert.encoder.layer.1.attention.self.{name}.weight" for name in ("key", "value")
    }
    norms = counts(bert(), target_modules=[], target_norms=True)
    assert len(norms) == 7
    assert all("LayerNorm.weight" in name for name in norms)
    assert len(counts(bert(), target_modules=[], target_norms=True, target_biases=True)) == 14
    assert set(counts(bert(), target_norms=True)) == norms.keys() | counts(bert()).keys()
    assert set(counts(bert(), target_parameters=["pooler.dense.bias", "word_embeddings.weight"])) == {
        "bert.embeddings.word_embeddings.weight",
        "bert.pooler.dense.bias",
    }


NORMLESS = [
    (bert, {"target_modules": "all"}),
    (bert, {"target_modules": r"bert\..*(LayerNorm|query|dense)", "target_biases": True}),
    (bert, {"target_parameters": ["bias"]}),
    (llama, {"target_modules": "all"}),
    (llama, {"target_modules": "all-linear"}),
]


@pytest.mark.parametrize(("make", "fields"), NORMLESS)
def test_target_norms_false_leaves_exactly_the_norms_out(make, fields):
    everything = set(counts(make(), **fields))
    without = set(counts(make(), **fields, target_norms=False))
    assert everything - without == {name for name in everything if "norm" in name.lower()}
    assert set(counts(make(), **fields, target_norms=None)) == everything


def test_target_norms_false_holds_in_both_phases_and_in_the_number_of_weights():
    model = bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = LotteryTicketConfig(density=0.5, target_modules="all", target_norms=False)
    tuned = get_peft_model(model, config)
    with start_dense_phase(tuned) as phase:
        trained = {target.name for target in phase.targets}
        assert not any(p.requires_grad for name, p in tuned.named_parameters() if "LayerNorm" in name)
        for target in phase.targets:
            target.parameter.data.add_(1.0)
        phase.select()
    expected = {n for n in before if n.startswith("bert.") and "LayerNorm" not in n}
    assert trained == expected
    numel = sum(before[name].numel() for name in expected)
    assert sum(delta.count for _, _, _, delta in iter_deltas(tuned)) == round(0.5 * numel)


def test_norms_that_are_named_and_left_out_are_refused():
    for fields in ({"target_modules": ["query", "LayerNorm"]}, {"target_parameters": ["LayerNorm.bias"]}):
        with pytest.raises(ConfigError, match=r"target_norms=False leaves all norms out, and .* 'LayerNorm"):
            counts(bert(), **fields, target_norms=False)
        assert any("LayerNorm" in name for name in counts(bert(), **fields))


@pytest.mark.parametrize("name", ["target_norms", "target_biases"])
def test_switches_of_targets_are_true_or_false(name):
    with pytest.raises(ConfigError, match=rf"{name} must be one of \[True, False.*got 'no'"):
        RandConfig(density=0.5, **{name: "no"})


def test_excluded_saved_and_left_out_layers():
    names = counts(bert(), target_modules="all", exclude_modules=["word_embeddings", "pooler.dense"])
    assert not any("word_embeddings" in name or "pooler" in name for name in names)
    names = counts(bert(), target_modules="all", exclude_modules=r"bert\.embeddings\..*")
    assert not any("embeddings" in name for name in names)
    names = counts(llama(), layers_to_transform=[0, 2], target_norms=True, target_modules="all-linear")
    assert {name.split(".")[2] for name in names} == {"0", "2"}
    names = counts(llama(), layers_to_transform=1, layers_pattern="layers")
    assert {name.split(".")[2] for name in names} == {"1"}
    tuned = get_peft_model(bert(), RandConfig(density=0.5, target_modules="all", modules_to_save=["pooler"]))
    assert not any("pooler" in name for name, _, _, _ in iter_deltas(tuned))


@pytest.mark.parametrize("make", [lambda **fields: RandConfig(density=0.5, **fields), AdaSftConfig])
def test_layers_that_there_are_not_are_refused_beside_those_that_there_are(make):
    for layers, message in (
        ([0, -1], "there is no layer -1; layers count from 0 to 2"),
        ([1, 3], "there is no layer 3; layers count"),
        (7, "there is no layer 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_peft_model(llama(), make(layers_to_transform=layers, target_modules="all-linear"))


def test_gpt2_conv1d_is_linear():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8))
    assert {name.split(".", 3)[3] for name in counts(model)} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nothing"]}, r"Target modules \['nothing'\] not found"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "No modules were targeted for adaptation"),
        (
            {"target_modules": ["self_attn"]},
            r"3 of the targeted modules.*exclude_modules=\['self_attn'\](.|\n)*LlamaAttention is not supported",
        ),
        ({"target_parameters": ["q_proj.scale"]}, r"no parameter of the model ends with 'q_proj\.scale'"),
        ({"num_weights": 10**9, "density": None}, "asks for 1000000000 weights, but the targeted tensors hold"),
        ({"budget": {"layers.0": 1.0}}, "matches none of the budget groups"),
        ({"budget": {"layers.0": 0.5, "layers": 0.5}}, "budget groups overlap"),
        ({"budget": {"layers": 0.9, "embed": 0.1}}, r"budget groups \['embed'\] match no targeted parameter"),
        (
            {"budget": {r"layers\.0": 0.98, r"layers\.[12]": 0.02}},
            r"budget group .* holds \d+ weights, but its share 0.98",
        ),
        ({"method": "fixed"}, 'method="fixed" has no way to select'),
    ],
)
def test_errors_leave_the_model_untouched(fields, message):
    base = llama()
    before = {name: type(module) for name, module in base.named_modules()}
    config = SparseConfig(**{"density": 0.5, **fields})
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_a_refused_second_adapter_leaves_the_first_alone():
    model = get_peft_model(llama(), RandConfig(density=0.1))
    x = torch.arange(5)[None]
    before = model(x).logits
    with pytest.raises(ConfigError, match="no parameter of the model ends with"):
        model.add_adapter("second", RandConfig(density=0.1, target_parameters=["absent"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x).logits, before)


def test_an_embedding_that_is_read_and_never_called_acts():
    fields = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
    base = DebertaV2Model(DebertaV2Config(**SMALL, **fields)).eval()
    x = torch.arange(2, 8)[None]
    before = base(x).last_hidden_state
    target = {"target_modules": ["rel_embeddings"], "density": 0.5, "init_weights": False}
    tuned = get_peft_model(base, RandConfig(**target)).eval()
    after = tuned(x).last_hidden_state
    assert not torch.equal(after, before)
    assert torch.equal(after, tuned.merge_and_unload()(x).last_hidden_state)


def test_a_module_whose_parent_reads_its_weight_is_refused():
    with pytest.raises(ConfigError, match="out_proj of type NonDynamicallyQuantizableLinear is not supported"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2, 8), RandConfig(density=0.5, target_modules=["out_proj"]))


@pytest.mark.parametrize("budget", ["uniform", "global", {r"layers\.0\.": 0.25, r"layers\.[12]\.": 0.75}])
@pytest.mark.parametrize("request_", [{"density": 0.0137}, {"num_weights": 777}, {"equivalent_rank": 2}])
def test_counts_sum_to_the_request_exactly(budget, request_):
    tuned = get_peft_model(llama(), RandConfig(budget=budget, **request_))
    deltas = {name: delta for name, _, _, delta in iter_deltas(tuned)}
    numel = sum(delta.numel for delta in deltas.values())
    rank_one = sum(sum(delta.shape) for delta in deltas.values())
    expected = {"density": round(0.0137 * numel), "num_weights": 777, "equivalent_rank": 2 * rank_one}[
        next(iter(request_))
    ]
    assert sum(delta.count for delta in deltas.values()) == expected
    assert tuned.get_nb_trainable_parameters()[0] == expected
    assert tuned.peft_config["default"].counts == {name: delta.count for name, delta in deltas.items()}
    if isinstance(budget, dict):
        first = sum(delta.count for name, delta in deltas.items() if "layers.0." in name)
        assert abs(first - 0.25 * expected) <= 1


def test_density_of_the_model_counts_every_parameter_once():
    base = llama(tie_word_embeddings=True)
    numel = sum(p.numel() for p in base.parameters())
    assert sum(counts(base, density=0.01, density_of="model").values()) == round(0.01 * numel)


def test_random_supports_depend_on_seed_and_name_alone():
    def supports(seed):
        tuned = get_peft_model(llama(), RandConfig(density=0.1, seed=seed))
        return {name: delta.indices for name, _, _, delta in iter_deltas(tuned)}

    first, again, other = supports(1), supports(1), supports(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    q, o = (first[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qo")
    assert not torch.equal(q, o)


def test_lottery_ticket_is_unselected_until_its_dense_phase():
    base = llama()
    x = torch.arange(5)[None]
    expected = base(x).logits
    tuned = get_peft_model(base, LotteryTicketConfig(density=0.1))
    assert tuned.peft_config["default"].counts is None
    assert {delta.count for _, _, _, delta in iter_deltas(tuned)} == {0}
    assert torch.equal(tuned(x).logits, expected)


@pytest.mark.parametrize("budget", ["uniform", "global", {"embed": 0.1, "layers|norm": 0.9}])
def test_a_billion_parameters_allocate_in_under_a_second(budget):
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
        )
    assert sum(p.numel() for p in base.parameters()) > 1e9
    start = time.process_time()
    tuned = get_peft_model(base, LotteryTicketConfig(density=0.01, target_modules="all", budget=budget))
    assert time.process_time() - start < 1
    assert tuned.peft_config["default"].counts is None


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_rescales_is_refused_by_name(setting):
    model = nn.Sequential(nn.Embedding(10, 4, **setting), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"module 0 rescales its rows .*exclude_modules=\['0'\]"):
        get_peft_model(model, RandConfig(density=0.5, target_modules=["0"]))
    assert type(model[0]) is nn.Embedding
