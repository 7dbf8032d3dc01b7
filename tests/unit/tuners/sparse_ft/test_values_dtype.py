"""Values keep the dtype that the config names, whatever trainers do to parameters; TRL's own trainer among them."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_sparse import LotteryTicketConfig, RandConfig, iter_deltas
from peft_sparse.tuners.common import kept_dtype
from tests.support.trl import trl_trainer

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOGGER = "peft_sparse.tuners.common.kept_dtype"


@pytest.fixture(autouse=True)
def say_it_again():
    kept_dtype._warn_once.cache_clear()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


X = torch.linspace(-1, 1, 24).view(3, 8)


def make(**changes):
    request = {"density": 0.5, "target_modules": ["first", "second"], "init_weights": False, **changes}
    return get_peft_model(Net(), RandConfig(**request))


def values(model, adapter="default"):
    return [delta.values for _, _, _, delta in iter_deltas(model, adapter)]


def cast(model, dtype=BF16):
    """What TRL does in the constructor of its trainers."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_a_cast_is_undone_in_the_next_training_forward(caplog):
    model = make(init_weights=True)
    parameters = values(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    cast(model)
    assert all(value.dtype == BF16 for value in values(model))
    with torch.no_grad():
        model(X)
    assert all(value.dtype == BF16 for value in values(model))
    for _ in range(3):
        model(X).square().sum().backward()
        assert all(value.grad.dtype == F32 for value in values(model))
        optimizer.step()
        optimizer.zero_grad()
    assert all(one is other for one, other in zip(values(model), parameters, strict=True))
    assert all(value.dtype == F32 for value in values(model))
    assert all(state["exp_avg"].dtype == F32 for state in optimizer.state.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in values(model))
    (line,) = lines(caplog)
    assert "had been cast to torch.bfloat16" in line
    assert "are torch.float32 again" in line
    assert "load it after the trainer is made" in line


def test_training_is_that_without_the_cast():
    results = []
    for with_cast in (False, True):
        model = make(init_weights=True)
        if with_cast:
            cast(model)
        optimizer = torch.optim.AdamW(values(model), lr=1e-3)
        for _ in range(5):
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([value.detach() for value in values(model)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_configs_dtype_is_what_is_kept(dtype):
    model = make(values_dtype=dtype)
    cast(model, F32)
    model(X).sum().backward()
    assert {value.dtype for value in values(model)} == {getattr(torch, dtype)}


def test_gradients_that_were_accumulated_stay():
    model = make()
    model(X).sum().backward()
    expected = [value.grad.clone() for value in values(model)]
    for value in values(model):
        value.grad, gradient = None, value.grad
        value.data = value.data.bfloat16()
        value.grad = gradient.bfloat16()
    model(X)
    for value, gradient in zip(values(model), expected, strict=True):
        assert value.grad.dtype == F32
        assert torch.equal(value.grad, gradient.bfloat16().float())


@pytest.mark.parametrize("how", ["to", "half", "bfloat16", "of the tuner"])
def test_a_cast_that_was_asked_for_stays(how, caplog):
    model = make()
    wanted = F16 if how == "half" else BF16
    if how == "to":
        model.to(BF16)
    elif how == "of the tuner":
        model.base_model.to(BF16)
    else:
        getattr(model, how)()
    model(X.to(wanted)).sum().backward()
    assert {value.dtype for value in values(model)} == {wanted}
    # And that is then what is kept.
    cast(model, F32)
    model(X.to(wanted)).sum().backward()
    assert {value.dtype for value in values(model)} == {wanted}
    assert len(lines(caplog)) == 1


def test_moving_between_devices_is_no_wish():
    model = make()
    cast(model)
    model.to("cpu")
    model(X).sum().backward()
    assert {value.dtype for value in values(model)} == {F32}


def test_loading_after_a_cast_loses_nothing():
    """Resuming under TRL: the constructor casts, then the checkpoint is loaded, then the optimizer's state."""
    model = make()
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    before = [value.detach().clone() for value in values(model)]
    cast(model)
    set_peft_model_state_dict(model, state)
    assert all(torch.equal(value, old) for value, old in zip(values(model), before, strict=True))
    plain = make()
    state = plain.state_dict()
    cast(plain)
    plain.load_state_dict(state)
    assert {value.dtype for value in values(plain)} == {F32}
    assert all(torch.equal(v, state[n]) for n, v in plain.named_parameters() if "values" in n)


def test_a_support_that_is_set_after_a_cast_is_float32():
    model = get_peft_model(Net(), LotteryTicketConfig(density=0.5, target_modules=["first"]))
    cast(model)
    ((_, _, _, delta),) = iter_deltas(model)
    assert delta.values.dtype == BF16
    delta.set_support(torch.tensor([1, 5, 9], dtype=torch.int32))
    assert delta.values.dtype == F32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_guarded_too(copied):
    model = copied(make())
    cast(model)
    model(X).sum().backward()
    assert {value.dtype for value in values(model)} == {F32}


def test_what_stands_in_the_parameters_place_is_left_alone():
    """FSDP puts a parameter in mixed precision there for the length of a forward."""
    model = make()
    delta = next(delta for _, _, _, delta in iter_deltas(model))
    own = delta.values
    delta._parameters["values"] = nn.Parameter(own.detach().to(BF16))
    model(X).sum().backward()
    assert delta.values.dtype == BF16
    delta._parameters["values"] = own
    assert delta.values.dtype == F32


def test_in_several_processes_a_forward_only_warns(monkeypatch, caplog):
    """DDP has put hooks on the parameter as it is; our trainers undo the cast before."""
    monkeypatch.setattr(kept_dtype, "in_several_processes", lambda: True)
    model = make()
    cast(model)
    model(X).sum().backward()
    assert {value.dtype for value in values(model)} == {BF16}
    (line,) = lines(caplog)
    assert "train in torch.bfloat16 instead of torch.float32" in line
    assert "SparseSFTTrainer" in line
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.keep_dtypes()
    assert {value.dtype for value in values(model)} == {F32}


def test_the_guard_holds_no_parameter_alive():
    model = make()
    delta = next(delta for _, _, _, delta in iter_deltas(model))
    old = weakref.ref(delta.values)
    delta.values = nn.Parameter(torch.zeros(3))
    assert old() is None


# ---- TRL -----------------------------------------------------------------------------------------


@pytest.fixture
def base():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the model that TRL trains")
    from tests.support.quantized import load

    return lambda kind="nf4, double": load(kind, dtype=BF16, compute=BF16)


TARGETS = {"density": 0.05, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(("kind", "checkpointing"), [("nf4, double", True), ("8 bit", False)])
def test_trl_trains_float32_values_over_a_quantised_base(kind, checkpointing, base, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    settings = {"gradient_checkpointing": checkpointing}
    trainer = trl_trainer(tmp_path, base(kind), peft_config=RandConfig(**TARGETS), settings=settings)
    assert all(value.dtype == BF16 for value in values(trainer.model)), "TRL casts no longer"
    trainer.train()
    assert all(value.dtype == F32 for value in values(trainer.model))
    assert any(not torch.equal(value, value.bfloat16().float()) for value in values(trainer.model))
    states = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    assert {state["exp_avg"].dtype for state in states.values()} == {F32}
    assert len(lines(caplog)) == 1
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base(kind), tmp_path / "adapter")
    for one, other in zip(values(again), values(trainer.model), strict=True):
        assert torch.equal(one, other)


def test_resuming_under_trl_loads_float32(base, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trl_trainer(tmp_path, base(), peft_config=RandConfig(**TARGETS), settings=settings)
    straight.train()
    resumed = trl_trainer(tmp_path, base(), peft_config=RandConfig(**TARGETS), settings=settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(values(resumed.model), values(straight.model), strict=True):
        assert torch.equal(one, other)


def test_sparse_sft_trainer_undoes_the_cast_before_it_trains(base, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="tests TRL's own trainer: pip install 'peft-sparse[trl]'")
    from peft_sparse import SparseSFTTrainer

    # As in several processes, where the forward is too late.
    monkeypatch.setattr(kept_dtype, "in_several_processes", lambda: True)
    trainer = trl_trainer(tmp_path, base(), peft_config=RandConfig(**TARGETS), trainer=SparseSFTTrainer)
    assert {value.dtype for value in values(trainer.model)} == {BF16}
    trainer.train()
    assert {value.dtype for value in values(trainer.model)} == {F32}
