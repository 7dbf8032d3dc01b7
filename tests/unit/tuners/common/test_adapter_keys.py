"""Names of adapters and of their tensors: files hold everything whatever the adapters are called and the base is in."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_sparse import ConfigError, FormatError, RandConfig, iter_deltas
from peft_sparse.core.names import unwrapped, without_adapter
from tests.support.keys import CONFIGS, llama

IDS = torch.arange(10)[None]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**shape, vocab_size=32, max_position_embeddings=16)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        ("base_model.model.a.0.sparse_ft_weight.0.values", "0", "base_model.model.a.0.sparse_ft_weight.values"),
        ("base_model.model._orig_mod.a.ada_sft_weight.mlp.scores", "mlp", "base_model.model.a.ada_sft_weight.scores"),
        ("module.base_model.model.module.a.bottleneck_adapters.x.up.bias", "x",
         "base_model.model.a.bottleneck_adapters.up.bias"),
        ("a._fsdp_wrapped_module.b.mad_g_generators.b.generator", "b", "a.b.mad_g_generators.generator"),
        ("h.modules_to_save.default.weight", "default", "h.weight"),
        ("h.modules_to_save.modules_to_save.weight", "modules_to_save", "h.weight"),
        ("q.sparse_ft_weight.sparse_ft_weight.values", "sparse_ft_weight", "q.sparse_ft_weight.values"),
        ("e.token_adapter.trainable_tokens_delta.default", "default", "e.token_adapter.trainable_tokens_delta"),
        ("default.q.weight", "default", "default.q.weight"),
    ],
)  # fmt: skip
def test_a_name_is_taken_out_of_its_place_alone(key, name, expected):
    assert without_adapter(key, name) == expected
    assert unwrapped(expected) == expected


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("names", [("0", "1"), ("mlp", "layers"), ("weight", "base_layer"), ("model", "base_model")])
def test_adapters_called_like_parts_of_paths_are_saved_whole(tmp_path, kind, names):
    model = get_peft_model(llama(), CONFIGS[kind](), adapter_name=names[0])
    model.add_adapter(names[1], CONFIGS[kind]())
    model.eval()
    for name in names:
        model.set_adapter(name)
        output(model)  # MAD-G saves the vectors of the languages that were used
    model.save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=names[0]).eval()
        assert torch.equal(output(loaded), output(model))
        assert not torch.equal(output(loaded), output(llama()))


def test_heads_are_saved_whole_too(tmp_path):
    model = get_peft_model(bert(), RandConfig(density=0.1, task_type="SEQ_CLS", init_weights=False), adapter_name="a")
    model.add_adapter("weight", RandConfig(density=0.1, task_type="SEQ_CLS", init_weights=False))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["a"].weight.add_(1)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(bert(), tmp_path / "a").eval()), output(model))


def test_adding_such_an_adapter_leaves_what_trains_alone():
    model = get_peft_model(llama(), CONFIGS["sparse"]())
    model.set_requires_grad("default", requires_grad=False)
    model.add_adapter("mlp", CONFIGS["sparse"]())
    assert not any(delta.values.requires_grad for _, _, _, delta in iter_deltas(model, "default"))


def test_an_average_of_weights_is_not_filled_up_from_the_model():
    model = get_peft_model(llama(), CONFIGS["sparse"]())
    model.add_adapter("mlp", CONFIGS["sparse"]())
    average = {key: t * 0.5 if key.endswith("values") else t for key, t in model.state_dict().items()}
    with pytest.raises(FormatError, match="lost some of its tensors"):
        get_peft_model_state_dict(model, state_dict=average)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "name", ["values", "keys", "items", "forward", "a.b", "", "..", "/tmp/x", "__base__", "_orig_mod", "_extra_state"]
)
def test_names_that_cannot_work_are_refused_before_the_model_is_touched(kind, name):
    base = llama()
    before = [type(module) for module in base.modules()]
    with pytest.raises(ConfigError, match="adapter_name"):
        get_peft_model(base, CONFIGS[kind](), adapter_name=name)
    assert [type(module) for module in base.modules()] == before
    model = get_peft_model(base, CONFIGS[kind]())
    with pytest.raises(ConfigError, match="adapter_name"):
        model.add_adapter(name, CONFIGS[kind]())
    assert list(model.peft_config) == ["default"]


def test_a_name_that_a_head_has_is_refused():
    with pytest.raises(ConfigError, match="'my_classifier' ends like 'classifier'"):
        get_peft_model(bert(), RandConfig(density=0.1, task_type="SEQ_CLS"), adapter_name="my_classifier")


@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_bases_and_plain_ones_exchange_files(tmp_path, kind):
    model = get_peft_model(torch.compile(llama(), backend="eager"), CONFIGS[kind]()).eval()
    want = output(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(llama(), tmp_path).eval()), want, atol=1e-6)
    compiled = PeftModel.from_pretrained(torch.compile(llama(), backend="eager"), tmp_path).eval()
    assert torch.equal(output(compiled), want)
    assert not torch.equal(want, output(llama()))


def test_new_tokens_of_a_tied_model_are_loaded(tmp_path):
    def base():
        model = llama(tie_word_embeddings=True, name_or_path=str(tmp_path / "base"))
        model.name_or_path = str(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(36)
        return model.eval()

    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    config = RandConfig(density=0.1, target_modules="all-linear", init_weights=False, trainable_token_indices=[2, 33])
    model = get_peft_model(base(), config).eval()
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].add_(1)
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(output(PeftModel.from_pretrained(base(), tmp_path / "a").eval()), output(model))


@pytest.mark.parametrize("kind", ["sparse", "ada", "bottleneck"])
def test_saving_what_diverged_warns(tmp_path, kind):
    model = get_peft_model(llama(), CONFIGS[kind]())
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).view(-1)[0] = float("nan")
    with pytest.warns(UserWarning, match="is saved with values that are NaN or infinite, in 1 of"):
        model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="NaN or infinite"):
        PeftModel.from_pretrained(llama(), tmp_path)
