"""A refused file takes out the adapter that was made for it, and never one that holds anything else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_sparse import FormatError
from tests.support.adapters import TYPES, adapted, config
from tests.support.models import llama, logits, picture

pytestmark = pytest.mark.filterwarnings("ignore")

# A head whose shape only the model that takes it in can judge, and targets beside it.
HEAD = {"modules_to_save": ["lm_head"]}
BESIDE = {kind: {"target_modules": ["q_proj"]} if kind in ("SPARSE_FT", "ADA_SFT") else {} for kind in TYPES}


def saved(folder: Path, kind: str, *, base: nn.Module | None = None, **fields) -> Path:
    adapted(kind, llama() if base is None else base, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TYPES)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def fits(tmp_path_factory, kind) -> Path:
    """An adapter for the model of the tests."""
    return saved(tmp_path_factory.mktemp("fits"), kind)


@pytest.fixture(scope="module")
def unfit(tmp_path_factory, kind) -> Path:
    """One of a narrower model."""
    return saved(tmp_path_factory.mktemp("unfit"), kind, base=llama(hidden_size=8))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> PeftConfig:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig.from_pretrained(folder).peft_type].from_pretrained(folder)
    config.inference_mode = False
    return config


def train(model: nn.Module) -> nn.Module:
    """Change what trains, as kernels do: past torch's counter of writes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    assert trained
    versions = [parameter._version for parameter in trained]
    for parameter in trained:
        parameter.data -= 0.01
    assert [parameter._version for parameter in trained] == versions
    return model


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


# ---- adapters that PEFT adds for a file ----------------------------------------------------------


@pytest.mark.parametrize("how", ["as PEFT does", "to be trained", "with a config"])
def test_a_refused_first_adapter_leaves_the_base_model_as_it_was(kind, unfit, how):
    base = llama()
    base.model.norm.weight.requires_grad_(False)
    before = picture(base)
    given = {"to be trained": {"is_trainable": True}, "with a config": {"config": PeftConfig.from_pretrained(unfit)}}
    with pytest.raises(FormatError):
        PeftModel.from_pretrained(base, unfit, **given.get(how, {}))
    assert picture(base) == before


@pytest.mark.parametrize("arguments", [{}, {"autocast_adapter_dtype": False}, {"low_cpu_mem_usage": True}])
def test_a_refused_adapter_goes_whatever_peft_does_to_it_first(kind, unfit, arguments):
    base = llama().bfloat16()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(FormatError):
        PeftModel.from_pretrained(base, unfit, **arguments)
    assert {name: type(module) for name, module in base.named_modules()} == before


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_refused_second_adapter_leaves_the_first_and_its_name_free(kind, fits, unfit, is_trainable):
    model = adapted(kind, llama())
    before = picture(model)
    with pytest.raises(FormatError):
        model.load_adapter(unfit, "b", is_trainable=is_trainable)
    assert picture(model) == before
    model.load_adapter(fits, "b")
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), fits)))


# ---- adapters that hold something ----------------------------------------------------------------


def own(kind: str, folder: Path) -> nn.Module:
    return get_peft_model(llama(), config(kind))


def template(kind: str, folder: Path) -> nn.Module:
    """Trained from the start, with the config of a folder."""
    return train(get_peft_model(llama(), config_of(folder)))


def loaded(kind: str, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(llama(), folder)


def trained_on(kind: str, folder: Path) -> nn.Module:
    return train(PeftModel.from_pretrained(llama(), folder, is_trainable=True))


def with_the_config_of_another(kind: str, folder: Path) -> nn.Module:
    return train(get_peft_model(llama(), trained_on(kind, folder).peft_config["default"]))


def natively(kind: str, folder: Path) -> nn.Module:
    model = llama()
    model.load_adapter(folder)
    return model


HOLDERS = (own, template, loaded, trained_on, with_the_config_of_another, natively)
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_adapter_that_is_not_as_it_was_made_stays(kind, fits, unfit, holder, copied):
    model = COPIES[copied](holder(kind, fits).eval())
    before = picture(model)
    with pytest.raises((FormatError, ValueError)):
        model.load_adapter(unfit, "default")
    assert picture(model) == before
    with pytest.raises(FormatError):
        set_peft_model_state_dict(model, tensors(unfit))
    assert picture(model) == before


def test_an_adapter_trained_after_it_was_copied_stays(kind, fits, unfit):
    model = get_peft_model(llama(), config_of(fits))
    for copied in (copy.deepcopy, through_pickle):
        twin = train(copied(model)).eval()
        before = picture(twin)
        with pytest.raises(FormatError):
            set_peft_model_state_dict(twin, tensors(unfit))
        assert picture(twin) == before


def test_an_adapter_of_which_the_head_alone_was_trained_stays(kind, tmp_path):
    fits = saved(tmp_path / "fits", kind, **HEAD, **BESIDE[kind])
    model = get_peft_model(llama(), config_of(fits)).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    before = picture(model)
    with pytest.raises((FormatError, KeyError)):
        set_peft_model_state_dict(model, {key: t[:, :4] for key, t in tensors(fits).items() if t.dim() > 1})
    assert picture(model) == before


def test_a_head_that_the_model_cannot_take_leaves_all_of_the_adapter(kind, tmp_path):
    wide = saved(tmp_path / "wide", kind, base=llama(vocab_size=25), **HEAD, **BESIDE[kind])
    model = train(get_peft_model(llama(), config(kind, **HEAD, **BESIDE[kind]))).eval()
    before = picture(model)
    for _ in range(2):
        with pytest.raises(FormatError, match="lm_head"):
            model.load_adapter(wide, "default", is_trainable=True)
        assert picture(model) == before


def test_a_mask_stays_in_its_phase_where_a_file_of_another_is_refused(tmp_path):
    fields = {**HEAD, **BESIDE["ADA_SFT"]}
    wide = adapted("ADA_SFT", llama(vocab_size=25), "a", "b", **fields)
    wide.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", head_from="a")
    wide.save_pretrained(tmp_path, selected_adapters=["sum"])
    model = train(get_peft_model(llama(), config("ADA_SFT", **fields))).eval()
    before = picture(model)
    with pytest.raises(FormatError, match="lm_head"):
        model.load_adapter(tmp_path / "sum", "default", is_trainable=True)
    assert picture(model) == before
    assert any("scores" in name and "default" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("holder", [own, trained_on])
def test_a_trainer_that_cannot_resume_leaves_the_adapter(kind, fits, unfit, holder, tmp_path):
    model = holder(kind, fits).eval()
    before = picture(model)
    args = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    with pytest.raises(FormatError):
        Trainer(model, args, train_dataset=[{"input_ids": [1, 2]}]).train(resume_from_checkpoint=str(unfit))
    assert picture(model.eval()) == before


@pytest.mark.parametrize("way", ["load_adapter", "set_peft_model_state_dict"])
@pytest.mark.parametrize("holder", [own, template, loaded, trained_on])
def test_a_file_that_fits_replaces_all_of_what_was_there(kind, tmp_path, holder, way):
    torch.manual_seed(7)
    other = saved(tmp_path / "other", kind, base=llama())
    model = holder(kind, other)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    if way == "load_adapter":
        model.load_adapter(other, "default")
    else:
        set_peft_model_state_dict(model, tensors(other))
    expected = PeftModel.from_pretrained(llama(), other)
    assert torch.equal(logits(model.eval()), logits(expected))
    given, taken = get_peft_model_state_dict(expected), get_peft_model_state_dict(model)
    assert given.keys() == taken.keys()
    assert all(torch.equal(taken[key], tensor) for key, tensor in given.items())
