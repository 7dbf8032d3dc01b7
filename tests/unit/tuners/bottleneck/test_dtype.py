"""Bottleneck adapters and hypernetworks stay in their dtype, whatever trainers do to parameters; TRL's among them."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_sparse import BottleneckConfig, MadGConfig
from peft_sparse.tuners.bottleneck.iteration import iter_layers
from peft_sparse.tuners.common import kept_dtype
from tests.support.exact import IDS
from tests.support.models import bert
from tests.support.trl import trl_trainer

F32, BF16 = torch.float32, torch.bfloat16
VECTORS = {"eng": torch.tensor([1.0, 0.0, 1.0]), "quy": torch.tensor([0.0, 1.0, 1.0])}
CONFIGS = {
    "pfeiffer": BottleneckConfig(bottleneck_size=3, invertible="nice", scaling="learned"),
    "residual": BottleneckConfig(
        bottleneck_size=3, kind="parallel", target_modules=r".*layer\.\d+\.output\.dropout", placement="residual"
    ),
    "MAD-G": MadGConfig(bottleneck_size=3, language_dim=2, typology=VECTORS, language="quy"),
    "MAD-G-LS": MadGConfig(bottleneck_size=3, language_dim=2, layer_dim=2, typology=VECTORS, language="quy"),
}


@pytest.fixture(autouse=True)
def say_it_again():
    kept_dtype._warn_once.cache_clear()


def make(name: str) -> PeftModel:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return get_peft_model(bert(vocab_size=23, hidden_size=8, **rates), CONFIGS[name]).train()


def own(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, layer in iter_layers(model) for parameter in layer.adapters.parameters()]


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in own(model)}


def cast(model: nn.Module, dtype: torch.dtype = BF16) -> None:
    """What TRL does in the constructor of its trainers."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_after_a_cast_is_in_float32(name, checkpointing, caplog):
    model = make(name)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    parameters = own(model)
    cast(model)
    assert dtypes(model) == {BF16}
    with torch.no_grad():
        model(input_ids=IDS)
    assert dtypes(model) == {BF16}
    rounded = [parameter.detach().float() for parameter in parameters]
    train(model)
    assert dtypes(model) == {F32}
    assert all(one is other for one, other in zip(own(model), parameters, strict=True))
    # Adam moves by the rate in each step, which bfloat16 would lose.
    moved = [float((now.detach() - old).abs().max()) for now, old in zip(parameters, rounded, strict=True)]
    assert all(0.5e-4 < size < 4e-4 for size in moved), moved
    (line,) = [record.getMessage() for record in caplog.records if record.name == kept_dtype.__name__]
    assert "of a bottleneck adapter had been cast to torch.bfloat16" in line
    assert "are torch.float32 again" in line


@pytest.mark.parametrize("how", ["to", "bfloat16", "of the tuner", "of PEFT"])
@pytest.mark.parametrize("name", ["pfeiffer", "MAD-G-LS"])
def test_a_cast_that_was_asked_for_stays(name, how):
    model = make(name)
    if how == "to":
        model.to(BF16)
    elif how == "bfloat16":
        model.bfloat16()
    elif how == "of the tuner":
        model.base_model.to(BF16)
    else:
        model = get_peft_model(model.unload().bfloat16(), CONFIGS[name], autocast_adapter_dtype=False).train()
    train(model)
    assert dtypes(model) == {BF16}
    # And that is then what is kept.
    cast(model, F32)
    train(model)
    assert dtypes(model) == {BF16}


def test_loading_after_a_cast_loses_nothing():
    """Resuming under TRL: the constructor casts, then the checkpoint is loaded."""
    model = make("pfeiffer")
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    before = [parameter.detach().clone() for parameter in own(model)]
    cast(model)
    set_peft_model_state_dict(model, state)
    assert all(torch.equal(now, old) for now, old in zip(own(model), before, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_guarded_too(copied):
    model = copied(make("MAD-G"))
    cast(model)
    train(model, steps=1)
    assert dtypes(model) == {F32}


def test_what_stands_in_the_parameters_place_is_left_alone():
    """FSDP puts a parameter in mixed precision there for the length of a forward."""
    model = make("pfeiffer")
    layer = dict(iter_layers(model))["bert.encoder.layer.0.output.LayerNorm"]
    down = layer.adapters["default"].down
    down._parameters["weight"] = nn.Parameter(down.weight.detach().to(BF16))
    down._parameters["bias"] = nn.Parameter(down.bias.detach().to(BF16))
    layer.at("norm")
    assert down.weight.dtype == down.bias.dtype == BF16


def test_in_several_processes_a_forward_only_warns(monkeypatch, caplog):
    monkeypatch.setattr(kept_dtype, "in_several_processes", lambda: True)
    model = make("MAD-G")
    cast(model)
    train(model, steps=1)
    assert dtypes(model) == {BF16}
    (line,) = [record.getMessage() for record in caplog.records if record.name == kept_dtype.__name__]
    assert "train in torch.bfloat16 instead of torch.float32" in line


@pytest.mark.parametrize("own_trainer", [False, True])
@pytest.mark.parametrize("name", ["pfeiffer", "MAD-G"])
def test_trl_trains_float32_over_a_quantised_base(name, own_trainer, tmp_path, caplog, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the model that TRL trains")
    pytest.importorskip("trl", reason="tests TRL's own trainer: pip install 'peft-sparse[trl]'")
    from peft_sparse import SparseSFTTrainer
    from tests.support.quantized import load

    caplog.set_level(logging.WARNING)
    fields = {"bottleneck_size": 4, "activation": "gelu"}
    config = (
        BottleneckConfig(**fields)
        if name == "pfeiffer"
        else MadGConfig(**fields, language_dim=2, typology=VECTORS, language="quy")
    )
    more = {"trainer": SparseSFTTrainer} if own_trainer else {}
    if own_trainer:
        # As in several processes, where the forward is too late.
        monkeypatch.setattr(kept_dtype, "in_several_processes", lambda: True)
    trainer = trl_trainer(tmp_path, load("nf4, double", dtype=BF16, compute=BF16), peft_config=config, **more)
    assert dtypes(trainer.model) == {BF16}, "TRL casts no longer"
    trainer.train()
    assert dtypes(trainer.model) == {F32}
    assert any(not torch.equal(parameter, parameter.bfloat16().float()) for parameter in own(trainer.model))
