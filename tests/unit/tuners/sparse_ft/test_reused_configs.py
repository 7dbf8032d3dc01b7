"""The config of an adapter, used for another one: that chooses its own weights, or is refused when it would train."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import Trainer

from peft_sparse import (
    ConfigError,
    GivenConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    SpielAGConfig,
    iter_deltas,
    iter_reselectors,
    select_by_gradients,
    start_dense_phase,
)
from peft_sparse.tuners.sparse_ft import model as tuner
from tests.support.reselection import batch, optimizer_of, train
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert

pytestmark = pytest.mark.filterwarnings("ignore")

AT_ONCE = {
    "rand": lambda: RandConfig(density=0.05),
    "bernoulli": lambda: RandConfig(density=0.05, draw="bernoulli", budget="global"),
    "SpIEL": lambda: SpielAGConfig(density=0.05, budget="global", reselection_steps=4, estimation_steps=2),
    "largest": lambda: OneShotConfig(density=0.05, criterion="largest_weight"),
}
IN_A_PHASE = {
    "LT-SFT": lambda: LotteryTicketConfig(density=0.05),
    "one-shot": lambda: OneShotConfig(density=0.05, criterion="gradient", selection_batches=2, random_share=0.5),
    "SpIEL": lambda: SpielAGConfig(density=0.05, initial_support="gradient", selection_batches=2),
}


def bert(**fields):
    return make_bert(dropout=0.0, layers=1, **fields)


def supports(model, adapter_name="default"):
    return {name: (indices.tolist()) for name, (indices, _) in deltas(model, adapter_name).items()}


def select(model):
    if model.peft_config["default"].method == "lottery_ticket":
        with start_dense_phase(model) as phase:
            train(model, optimizer_of(model), range(2))
            phase.select()
    elif model.peft_config["default"].first_phase is not None:
        select_by_gradients(model, [batch(0), batch(1)])
    return model


@pytest.fixture(scope="module", params=[*AT_ONCE, *(f"{name} in a phase" for name in IN_A_PHASE)])
def old(request, tmp_path_factory):
    """(its config as it was asked for, a model with an adapter, its folder)."""
    name = request.param.removesuffix(" in a phase")
    request_of = (AT_ONCE if name == request.param else IN_A_PHASE)[name]
    model = select(get_peft_model(bert(), request_of()))
    train(model, optimizer_of(model), range(5))
    folder = tmp_path_factory.mktemp("old")
    model.save_pretrained(folder)
    return request_of, model, folder


def read(model, folder):
    return PeftConfig.from_pretrained(folder)


def read_to_be_trained(model, folder):
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def of_a_model(model, folder):
    return copy.deepcopy(model.peft_config["default"])


def of_a_loaded_model(model, folder):
    return PeftModel.from_pretrained(bert(), folder).peft_config["default"]


REUSED = [read, read_to_be_trained, of_a_model, of_a_loaded_model]


def alone(config, folder):
    model = get_peft_model(bert(), config)
    model.set_adapter("default")
    return model, "default"


def beside_it(config, folder):
    model = PeftModel.from_pretrained(bert(), folder)
    model.add_adapter("two", config)
    model.set_adapter("two")
    return model, "two"


def natively(config, folder):
    model = bert()
    model.add_adapter(config, "three")
    return model, "three"


@pytest.mark.parametrize(
    ("made", "reused"), [*((alone, reused) for reused in REUSED), (beside_it, read), (natively, read)]
)
def test_a_new_adapter_chooses_for_itself(old, reused, made):
    request_of, held, folder = old
    model, name = made(reused(held, folder), folder)
    fresh = get_peft_model(bert(), request_of(), adapter_name=name)
    assert supports(model, name) == supports(fresh, name)
    assert model.peft_config[name].counts == fresh.peft_config[name].counts
    assert model.peft_config[name].first_phase == fresh.peft_config[name].first_phase
    assert len(list(iter_reselectors(model))) == len(list(iter_reselectors(fresh)))
    assert not any(values.any() for _, values in deltas(model, name).values())


@pytest.mark.parametrize("reused", [read, of_a_model])
def test_it_goes_through_its_phases_and_trains_like_a_fresh_one(old, reused, tmp_path):
    request_of, held, folder = old

    def trained(model, to):
        SparseTrainer(model, make_args(tmp_path / to, max_steps=4), train_dataset=Labelled()).train()
        return deltas(model)

    model, _ = alone(reused(held, folder), folder)
    if model.peft_config["default"].first_phase is not None:
        with pytest.raises(ConfigError, match=r"\['default'\] .* are not selected yet"):
            Trainer(model, make_args(tmp_path, max_steps=1), train_dataset=Labelled()).train()
    fresh = trained(get_peft_model(bert(), request_of()), "fresh")
    found = trained(model, "reused")
    assert_same_tensors(found, fresh)
    assert any(indices.tolist() != list(range(len(indices))) for indices, _ in found.values())


@pytest.mark.parametrize("reused", REUSED)
def test_its_random_part_is_drawn_for_its_own_name(reused, tmp_path):
    request_of = IN_A_PHASE["one-shot"]
    held = select(get_peft_model(bert(), request_of()))
    held.save_pretrained(tmp_path)
    found, fresh = (
        get_peft_model(bert(), config, adapter_name="two") for config in (reused(held, tmp_path), request_of())
    )
    for model in (found, fresh):
        model.set_adapter("two")
        select_by_gradients(model, [batch(0), batch(1)], adapter_name="two")
    assert supports(found, "two") == supports(fresh, "two") != supports(held)
    train(found, optimizer_of(found), range(1))


@pytest.mark.parametrize("reused", REUSED)
def test_the_users_object_stays_as_it_was(old, reused):
    _, held, folder = old
    config = reused(held, folder)
    before = copy.deepcopy(config.to_dict())
    get_peft_model(bert(), config)
    after = {**config.to_dict(), "base_model_name_or_path": before["base_model_name_or_path"]}
    assert after == {**before, "task_type": after["task_type"]}


def test_its_density_is_of_the_model_that_it_gets(tmp_path):
    get_peft_model(make_bert(layers=1), RandConfig(density=0.05, target_modules=["query"])).save_pretrained(tmp_path)
    found = get_peft_model(make_bert(layers=2), PeftConfig.from_pretrained(tmp_path))
    assert len(supports(found)) == 2
    assert found.peft_config["default"].counts == {name: len(each) for name, each in supports(found).items()}


def test_one_that_is_made_to_be_used_has_its_weights():
    fresh, frozen = (get_peft_model(bert(), RandConfig(density=0.05, inference_mode=mode)) for mode in (False, True))
    assert supports(frozen) == supports(fresh)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


# ---- a file that follows -------------------------------------------------------------------------


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_takes_the_file_alone(old, is_trainable, monkeypatch):
    _, held, folder = old
    if not is_trainable:
        monkeypatch.setattr(tuner, "set_supports", lambda *_, **__: pytest.fail("drew a support to overwrite it"))
    first = PeftModel.from_pretrained(bert(), folder, is_trainable=is_trainable)
    first.load_adapter(folder, "two", is_trainable=is_trainable)
    native = bert()
    native.load_adapter(str(folder), is_trainable=is_trainable)
    for model, name in ((first, "default"), (first, "two"), (native, "default")):
        assert_same_tensors(deltas(model, name), deltas(held))
        assert model.peft_config[name].counts == held.peft_config["default"].counts
        assert model.peft_config[name].first_phase is None


def by_peft(model, held):
    set_peft_model_state_dict(model, get_peft_model_state_dict(held))


def by_torch(model, held):
    model.load_state_dict(held.state_dict())


@pytest.mark.parametrize(("fill", "reused"), [(by_peft, read), (by_torch, of_a_model)])
def test_one_that_is_filled_by_hand_is_as_what_fills_it(old, reused, fill, tmp_path):
    _, held, folder = old
    model = get_peft_model(bert(), reused(held, folder))
    fill(model, held)
    assert_same_tensors(deltas(model), deltas(held))
    assert model.peft_config["default"].first_phase is None
    model.set_adapter("default")
    before = supports(model)
    SparseTrainer(model, make_args(tmp_path, max_steps=1), train_dataset=Labelled()).train()
    assert supports(model) == before, "its weights are chosen already"


def test_a_reference_from_the_very_config_has_the_same_support(old):
    _, held, _ = old
    model = copy.deepcopy(held)
    model.add_adapter("ref", model.peft_config["default"])
    assert supports(model, "ref") == supports(model)
    assert model.peft_config["ref"].counts == model.peft_config["default"].counts
    assert model.peft_config["ref"].first_phase is None


# ---- what nothing can choose ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fixed", "given"])
def bound(request, tmp_path_factory):
    """(a model, the folder) of an adapter whose config cannot choose weights."""
    folder = tmp_path_factory.mktemp("bound")
    if request.param == "given":
        name = "bert.encoder.layer.0.attention.self.query.weight"
        model, own = get_peft_model(bert(), GivenConfig(support={name: [3, 5, 11]})), "default"
    else:
        model = get_peft_model(bert(), RandConfig(density=0.05))
        model.add_adapter("other", RandConfig(density=0.05, seed=1))
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
        own = "sum"
    model.save_pretrained(folder, selected_adapters=[own])
    return folder if own == "default" else folder / own


def reuse(folder):
    model = get_peft_model(bert(), PeftConfig.from_pretrained(folder))
    model.set_adapter("default")
    return model


REFUSAL = r"the weights of the adapters \['default'\] were never chosen: .*from_pretrained\(base, folder, is_train"


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
def test_it_is_refused_before_it_trains(bound, copied):
    model = copied(reuse(bound))
    before = copy.deepcopy(deltas(model))
    with pytest.raises(ConfigError, match=REFUSAL):
        train(model, optimizer_of(model), range(1))
    assert_same_tensors(deltas(model), before)


@pytest.mark.parametrize("kind", [Trainer, SparseTrainer])
def test_trainers_refuse_it(bound, tmp_path, kind):
    trainer = kind(reuse(bound), make_args(tmp_path, max_steps=1), train_dataset=Labelled())
    with pytest.raises(ConfigError, match=REFUSAL):
        trainer.train()


def test_it_is_not_saved_in_silence(bound, tmp_path, caplog):
    reuse(bound).save_pretrained(tmp_path)
    assert "adapter 'default' is saved as it is: its weights were never chosen" in caplog.text


@pytest.mark.parametrize("way", ["load_adapter", "set_peft_model_state_dict", "frozen"])
def test_it_trains_once_it_has_its_file(bound, way):
    expected = PeftModel.from_pretrained(bert(), bound, is_trainable=True)
    model = reuse(bound)
    if way == "load_adapter":
        model.load_adapter(bound, "default", is_trainable=True)
    elif way == "set_peft_model_state_dict":
        set_peft_model_state_dict(model, get_peft_model_state_dict(expected))
    else:
        model.set_requires_grad("default", requires_grad=False)
        other = model.base_model.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
        train(model, torch.optim.SGD([other, *(d.values for *_, d in iter_deltas(model))], lr=0.1), range(1))
        return
    for each in (model, expected):
        train(each.train(), optimizer_of(each), range(2))
    assert_same_tensors(deltas(model), deltas(expected))


def test_a_support_that_is_copied_from_a_folder_is_copied_again(tmp_path):
    get_peft_model(bert(), RandConfig(density=0.05, seed=3)).save_pretrained(tmp_path / "source")
    first = get_peft_model(bert(), GivenConfig(support=str(tmp_path / "source")))
    first.save_pretrained(tmp_path / "copy")
    second, _ = alone(PeftConfig.from_pretrained(tmp_path / "copy"), None)
    assert supports(second) == supports(first)


def test_weights_that_were_injected_by_their_names_are_not_trained_before_they_are_there():
    held = select(get_peft_model(bert(), LotteryTicketConfig(density=0.05)))
    tensors = get_peft_model_state_dict(held)
    config = replace(held.peft_config["default"], counts=None)
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    model = inject_adapter_in_model(config, bert(), state_dict=tensors)
    assert sum(map(len, supports(model).values())) == sum(map(len, supports(held).values()))
    with pytest.raises(ConfigError, match=REFUSAL):
        train(model, optimizer_of(model), range(1))
    set_peft_model_state_dict(model, tensors)
    assert_same_tensors(deltas(model), deltas(held))
    train(model, optimizer_of(model), range(1))
