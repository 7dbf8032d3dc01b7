from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from peft_sparse import AdaSftConfig, ConfigError, FormatError, SpielAGConfig, start_weight_phase
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from tests.support.models import bert, llama

IDS = torch.tensor([[3, 5, 7, 9], [4, 4, 11, 22]])


def make_llama(*, tied=False, dtype=torch.float32):
    return llama(
        vocab_size=23, hidden_size=8, intermediate_size=12, initializer_range=0.3, tie_word_embeddings=tied
    ).to(dtype)


def make_bert():
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return bert(BertForSequenceClassification, num_labels=3, **sizes)


def make(*names, base=None, phase="weights", **config):
    base = make_llama() if base is None else base
    names = names or ("default",)
    model = get_peft_model(base, AdaSftConfig(phase=phase, **config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, AdaSftConfig(phase=phase, **config))
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        for _, _, masked in iter_masked(model, name):
            for parameter in masked.parameters():
                parameter.data = 0.3 * torch.randn(masked.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model, **arguments):
    return model(input_ids=IDS, **arguments).logits


# ---- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial_mask": 1.0}, r"initial_mask must be in \(0, 1\), got 1.0: a sigmoid reaches neither end"),
        ({"initial_mask": 0}, r"initial_mask must be in \(0, 1\), got 0"),
        ({"initial_mask": True}, r"initial_mask must be in \(0, 1\), got True"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"budget": "even"}, r"budget must be one of 'uniform', .* or \{regex: share\}, got 'even'"),
        ({"target_modules": "all"}, r'masks linear layers only: target_modules="all-linear"'),
        ({"target_modules": "("}, r"target_modules: '\(' is not a valid regular expression"),
        ({"layers_pattern": "h"}, r"layers_pattern='h' needs layers_to_transform"),
        ({"phase": "third"}, r"phase must be one of \['mask', 'weights', 'composed'\], got 'third'"),
    ],
)
def test_values_that_no_run_can_honour(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdaSftConfig(**fields)


def test_what_the_user_wrote_stays_as_written():
    config = AdaSftConfig(target_modules=["q_proj"])
    before = copy.deepcopy(config)
    model = get_peft_model(make_llama(), config)
    start_weight_phase(model)
    assert config == before
    assert model.peft_config["default"].phase == "weights"


# ---- what can be masked ----------------------------------------------------------------------------------------------


class Odd(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_only_plain_linear_layers_are_masked():
    model = nn.ModuleDict(
        {"emb": nn.Embedding(4, 3), "norm": nn.LayerNorm(3), "odd": Odd(3, 3), "lin": nn.Linear(3, 3)}
    )
    for name, kind in (("emb", "Embedding"), ("norm", "LayerNorm"), ("odd", "Odd")):
        with pytest.raises(
            ConfigError, match=rf"target module {name} of type {kind} is not supported.*exclude_modules"
        ):
            get_peft_model(model, AdaSftConfig(target_modules=["lin", name]))
        assert type(model["lin"]) is nn.Linear, "refused before the first module was touched"
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ConfigError, match=r"out_proj of type NonDynamicallyQuantizableLinear is not supported"):
        get_peft_model(attention, AdaSftConfig(target_modules=["out_proj"]))


def test_a_quantised_base_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"lin": nn.Linear(64, 64), "packed": bnb.nn.Linear4bit(64, 64)})
    with pytest.raises(ConfigError, match=r"packed is quantised \(Linear4bit\).*SpielAGConfig"):
        get_peft_model(model, AdaSftConfig(target_modules=["lin", "packed"]))
    assert type(model["lin"]) is nn.Linear


def test_a_refused_second_adapter_leaves_the_first_one_working():
    model = make()
    before = logits(model)
    with pytest.raises(ConfigError, match="embed_tokens of type Embedding is not supported"):
        model.add_adapter("second", AdaSftConfig(target_modules=["embed_tokens"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("sparse", SpielAGConfig(density=0.1))


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["mask", "weights", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_changes_no_bit_of_the_outputs_and_unmerging_none_of_the_weights(dtype, phase):
    base = make_llama(dtype=dtype)
    model = make("a", "b", base=copy.deepcopy(base), phase=phase)
    assert {p.dtype for _, _, masked in iter_masked(model, "a") for p in masked.parameters()} == {torch.float32}
    for names in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(names)
        alone = logits(model)
        assert not torch.equal(alone, logits(base))
        for _ in range(3):
            model.merge_adapter(safe_merge=True)
            assert torch.equal(logits(model), alone)
            model.unmerge_adapter()
            assert torch.equal(logits(model), alone)
    for name, parameter in base.named_parameters():
        own = model.base_model.model.get_parameter(
            name if "proj" not in name else name.replace(".weight", ".base_layer.weight")
        )
        assert torch.equal(own.view(torch.uint8), parameter.view(torch.uint8)), name
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), alone)
    assert {p.dtype for p in merged.parameters()} == {dtype}


def test_several_adapters_add_up_what_each_changes():
    base = make_llama().double()
    model = make("a", "b", base=copy.deepcopy(base))
    model.base_model.set_adapter(["a", "b"])
    twin = copy.deepcopy(base)
    for adapter in ("a", "b"):
        for name, layer, masked in iter_masked(model, adapter):
            weight = layer.original.detach()
            mask = torch.sigmoid(masked.scores.double() + torch.logit(torch.tensor(0.9, dtype=torch.float64))) / 0.9
            twin.get_parameter(name).data += (weight + masked.difference) * mask - weight
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-12, atol=1e-12)


def test_moving_a_merged_model_moves_what_unmerging_puts_back():
    base = make_llama()
    model = make(base=copy.deepcopy(base))
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base.double()), rtol=0, atol=0)


def test_a_tied_output_matrix_leaves_the_embedding_alone():
    base = make_llama(tied=True)
    model = make(base=copy.deepcopy(base), target_modules=["lm_head", "q_proj"])
    embedding = base.get_input_embeddings().weight
    alone = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), alone)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.unmerge_adapter()
    assert model.base_model.model.lm_head.base_layer.weight is model.get_input_embeddings().weight
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), alone)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)


# ---- composing -------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_is_the_sum_of_the_differences_of_weights():
    model = make("a", "b", "c")
    model.add_weighted_adapter(["a", "b", "c"], [0.5, -2.0, 1.0], "sum")
    assert model.peft_config["sum"].phase == "composed"
    for name, layer, masked in iter_masked(model, "sum"):
        weight = layer.original.detach().double()
        parts = [(layer.merged_weight([adapter]).double() - weight) for adapter in "abc"]
        expected = 0.5 * parts[0] - 2.0 * parts[1] + parts[2]
        assert torch.equal(masked.difference, expected.float()), name
        assert masked.scores is None
        assert not masked.difference.requires_grad
    assert model.active_adapters == ["a"]


def test_a_sum_of_one_adapter_computes_what_it_computes(tmp_path):
    model = make("a")
    with torch.no_grad():
        for _, layer, masked in iter_masked(model, "a"):
            # Masks between 1/2 and 1, and small differences: where float32 subtracts without rounding.
            masked.scores.clamp_(min=-1.0, max=0.0)
            masked.difference.copy_(1e-3 * layer.original)
    model.add_weighted_adapter(["a"], [1.0], "same")
    alone = logits(model)
    model.set_adapter("same")
    assert torch.equal(logits(model), alone)
    model.save_pretrained(tmp_path, selected_adapters=["same"])
    assert set(load_file(tmp_path / "same" / "adapter_model.safetensors")) == {
        f"base_model.model.{name.removesuffix('.weight')}.ada_sft_weight.difference"
        for name, _, _ in iter_masked(model, "same")
    }
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path / "same")), alone)


def test_adapters_on_different_layers_and_heads_compose():
    model = get_peft_model(
        make_bert(), AdaSftConfig(target_modules=["query"], modules_to_save=["classifier"], init_weights=False), "task"
    )
    model.add_adapter("language", AdaSftConfig(target_modules=["key"], init_weights=False))
    model.add_weighted_adapter(["task", "language"], [1.0, 1.0], "both")
    changes = {name: masked.change(layer.original) for name, layer, masked in iter_masked(model, "both")}
    assert [name.split(".")[-2] for name in changes] == ["query", "key"]
    for adapter in ("task", "language"):
        for name, layer, masked in iter_masked(model, adapter):
            assert torch.equal(changes[name], masked.change(layer.original))
    assert model.peft_config["both"].modules_to_save == ["classifier"]
    model.set_adapter("both")
    head = model.base_model.model.classifier.modules_to_save
    assert torch.equal(head["both"].weight, head["task"].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1.0], "x", "ties"), r"must be 'linear' for adapters of Ada-SFT, got 'ties'.*sparse_from_ada"),
        ((["a", "z"], [1.0, 1.0], "x"), r"adapters must name adapters of this model"),
        ((["a"], [1.0, 2.0], "x"), r"weights must hold one number per adapter, got 2 for 1"),
        ((["a"], [1.0], "b"), r"adapter_name 'b' is taken"),
    ],
)
def test_composing_what_cannot_be_composed(arguments, message):
    model = make("a", "b")
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["a", "b"]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("phase", ["mask", "weights", "composed"])
def test_what_is_saved_is_what_is_loaded(tmp_path, phase, lean):
    base = make_llama(dtype=torch.bfloat16)
    model = make("a", base=copy.deepcopy(base), phase=phase, initial_mask=0.7, from_identity=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", low_cpu_mem_usage=lean).eval()
    assert torch.equal(logits(loaded), expected)
    config = loaded.peft_config["default"]
    assert (config.phase, config.initial_mask, config.from_identity) == (phase, 0.7, False)
    for (_, _, found), (_, _, saved) in zip(iter_masked(loaded), iter_masked(model, "a"), strict=True):
        for one, other in zip(found.parameters(), saved.parameters(), strict=True):
            assert one.dtype is torch.float32
            assert torch.equal(one, other)


def test_a_file_brings_the_adapter_into_its_phase(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(make_llama(), AdaSftConfig())
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert fresh.peft_config["default"].phase == "weights"
    assert torch.equal(logits(fresh.eval()), logits(model))
    assert {n.rpartition(".")[2] for n, p in fresh.named_parameters() if p.requires_grad} == {"difference"}


def edited(tmp_path, change):
    make("a").save_pretrained(tmp_path)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return tmp_path / "a"


def first(tensors, kind="scores"):
    return sorted(name for name in tensors if name.endswith(kind))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(first(t)), r"tensor '.*down_proj.ada_sft_weight.scores' is missing"),
        (
            lambda t: t.update({"model.x.ada_sft_weight.scores": torch.ones(2)}),
            r"'model.x.ada_sft_weight.scores' has no place",
        ),
        (lambda t: t.update({first(t): torch.ones(2, 2)}), r"floating point of shape \(8, 12\), got .* shape \(2, 2\)"),
        (lambda t: t[first(t)].view(-1)[:1].fill_(torch.nan), r"holds values that are NaN or infinite"),
        (lambda t: [t.pop(n) for n in list(t)] and t.update(y=torch.ones(1)), r"must hold scores, .* found neither"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, change, message):
    folder = edited(tmp_path, change)
    base = make_llama()
    with pytest.raises(FormatError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert not any("ada_sft" in name for name, _ in base.named_modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = make("b")
    before = logits(model)
    with pytest.raises(FormatError, match=message):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["b"]
    assert torch.equal(logits(model), before)
    fresh = get_peft_model(make_llama(), AdaSftConfig())
    for there, outputs in ((model, before), (fresh, logits(make_llama()))):
        with pytest.raises(FormatError, match=message):
            there.load_adapter(folder, there.active_adapters[0], is_trainable=True)
        assert torch.equal(logits(there), outputs)
        assert any(parameter.requires_grad for parameter in there.parameters()), "an adapter that was there is kept"


def test_the_card_says_how_to_load_it(tmp_path):
    make().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.index("import peft_sparse") < text.index("# Model Card")
    assert "- ada-sft" in text
    assert "- Phase: `weights`" in text
    assert "changes a few" not in text


def test_an_adapter_of_another_type_is_told_apart(tmp_path):
    get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = make()
    with pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(tmp_path, "lora")
