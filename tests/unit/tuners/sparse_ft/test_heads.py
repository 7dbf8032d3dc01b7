"""Heads beside the sparse deltas: models for classification, token classification and question answering."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from peft_sparse import LotteryTicketConfig, RandConfig
from tests.support.exact import close
from tests.support.sparse import dense_deltas, fill

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[3, 5, 7, 9], [4, 4, 11, 22], [6, 8, 2, 2]])
SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
# class, config, task, the head's module. The heads of RoBERTa and XLM-R are two layers without a `weight` of their own.
MODELS = {
    "roberta": (RobertaForSequenceClassification, RobertaConfig, "SEQ_CLS", "classifier"),
    "xlm-r": (XLMRobertaForSequenceClassification, XLMRobertaConfig, "SEQ_CLS", "classifier"),
    "tokens": (BertForTokenClassification, BertConfig, "TOKEN_CLS", "classifier"),
    "answers": (BertForQuestionAnswering, BertConfig, "QUESTION_ANS", "qa_outputs"),
}
METHODS = {"rand": RandConfig, "lottery ticket": LotteryTicketConfig}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model_class, config_class, _, _ = MODELS[kind]
    labels = 2 if kind == "answers" else 3
    return model_class(config_class(**SIZES, num_labels=labels)).double().eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if hasattr(found, "logits") else torch.stack([found.start_logits, found.end_logits])


def adapted(kind: str, method: str = "rand", *adapters: str) -> PeftModel:
    """Adapters with heads of their own, none of them the base model's."""
    names = adapters or ("default",)
    configs = {name: METHODS[method](density=0.2, task_type=MODELS[kind][2], init_weights=False) for name in names}
    model = get_peft_model(make(kind), configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    for number, name in enumerate(names):
        fill(model, name, number)
        for parameter in head_of(model, kind, name).parameters():
            parameter.data += 0.1 * (number + 1) * torch.randn_like(parameter)
    return model.eval()


def head_of(model: nn.Module, kind: str, adapter: str) -> nn.Module:
    return getattr(model.base_model.model, MODELS[kind][3]).modules_to_save[adapter]


def with_head(twin: nn.Module, kind: str, model: nn.Module, adapter: str) -> nn.Module:
    getattr(twin, MODELS[kind][3]).load_state_dict(head_of(model, kind, adapter).state_dict())
    return twin


def expected(model: nn.Module, kind: str, adapter: str) -> torch.Tensor:
    """The dense model with the adapter's head."""
    twin = make(kind)
    for name, delta in dense_deltas(model, adapter).items():
        twin.get_parameter(name).data += delta
    return outputs(with_head(twin, kind, model, adapter))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_unload_keeps_the_trained_head(kind, method):
    model = adapted(kind, method)
    wanted = expected(model, kind, "default")
    close(outputs(model), wanted)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == make(kind).state_dict().keys()
    close(outputs(merged), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_every_adapter_has_its_head(kind, tmp_path):
    model = adapted(kind, "rand", "a", "b")
    a, b = expected(model, kind, "a"), expected(model, kind, "b")
    close(outputs(model), a)
    model.set_adapter("b")
    close(outputs(model), b)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(make(kind)))
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(make(kind), tmp_path / "b", low_cpu_mem_usage=lean).eval()
        close(outputs(loaded), b)
        loaded.load_adapter(tmp_path / "a", adapter_name="other", low_cpu_mem_usage=lean)
        loaded.set_adapter("other")
        close(outputs(loaded), a)
    # As everywhere in PEFT, unload leaves the active adapter's head in its place.
    plain = loaded.unload()
    close(outputs(plain), outputs(with_head(make(kind), kind, model, "a")))


def test_a_head_for_every_example_of_a_batch():
    # PEFT can do this for heads of one linear layer; those of RoBERTa and XLM-R it refuses.
    model = adapted("tokens", "rand", "a", "b")
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=["b", "__base__", "a"]).logits
    rows = (expected(model, "tokens", "b"), outputs(make("tokens")), expected(model, "tokens", "a"))
    close(found, torch.stack([row[i] for i, row in enumerate(rows)]))


@pytest.mark.parametrize("kind", MODELS)
def test_values_and_head_train_and_nothing_else(kind):
    model = adapted(kind, "rand", "a", "b").train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if ".a." in name and "base_layer" not in name}
    assert any("modules_to_save.a" in name for name in trained)
    model.set_adapter("b")
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert now == {name.replace(".a.", ".b.") for name in trained}
