"""Models that transformers itself gave adapters, in our trainers: checkpoints hold all that are active, and bring them
back.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import Trainer

from peft_sparse import (
    AdapterAverage,
    AdaSftConfig,
    BottleneckConfig,
    ConfigError,
    FormatError,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    SpielAGConfig,
    Teacher,
    language_below_task,
)
from peft_sparse.core.names import PREFIX
from peft_sparse.training.phases.registry import phase_before
from tests.support.models import llama, logits, picture
from tests.support.training import BEST, assert_best_is_loaded, assert_same_tensors, make_args

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = {"target_modules": "all-linear"}
TYPES = {
    "rand": lambda: RandConfig(density=0.1, **LINEAR),
    "spiel": lambda: SpielAGConfig(density=0.1, reselection_steps=2, estimation_steps=1, **LINEAR),
    "masks": lambda: AdaSftConfig(density=0.1, **LINEAR),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=4),
    "ticket": lambda: LotteryTicketConfig(density=0.1, **LINEAR),
    "gradients": lambda: OneShotConfig(density=0.1, criterion="gradient", selection_batches=2, **LINEAR),
    "lora": lambda: LoraConfig(r=2, **LINEAR),
}
MODELS = [
    {"default": "rand"},
    {"quechua": "rand"},
    {"default": "spiel"},
    {"default": "bottleneck"},
    {"default": "lora"},
    {"sparse": "rand", "low_rank": "lora"},
    {"default": "spiel", "low_rank": "lora"},
    {"sparse": "rand", "default": "bottleneck"},
    {"language": "rand", "task": "rand"},
]
PHASES = [
    {"quechua": "ticket"},
    {"sparse": "ticket", "low_rank": "lora"},
    {"sparse": "gradients", "low_rank": "lora"},
    {"default": "masks"},
]
SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
WEIGHTS = "adapter_model.safetensors"


def carrying(adapters):
    model = llama(seed=3)
    torch.manual_seed(0)
    for name, kind in adapters.items():
        model.add_adapter(TYPES[kind](), adapter_name=name)
    model.set_adapter(list(adapters))
    return model


def rows(n=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(llama().config.vocab_size, (n, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, model, cls=SparseTrainer, **changes):
    args = make_args(folder, **{**SAVED, **changes})
    return cls(model=model, args=args, train_dataset=rows(), eval_dataset=rows())


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def called(adapters):
    return "+".join(f"{name}={kind}" for name, kind in adapters.items())


@pytest.mark.parametrize("adapters", MODELS, ids=called)
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path, adapters):
    model = carrying(adapters)
    trainer(tmp_path, model).train()
    for step in (2, 4):
        resumed = carrying(adapters)
        trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.active_adapters() == list(adapters)
        assert_same_tensors(tensors(resumed), tensors(model))


@pytest.mark.parametrize("adapters", PHASES, ids=called)
def test_a_run_with_phases_goes_on_from_any_checkpoint(tmp_path, adapters):
    model = carrying(adapters)
    trainer(tmp_path / "whole", model).train()
    _, phase = phase_before(carrying(adapters))
    points = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / phase.folder).iterdir()]
    for i, point in enumerate([*points, Path("checkpoint-2")]):
        shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        resumed = carrying(adapters)
        trainer(tmp_path / str(i), resumed).train(resume_from_checkpoint=str(tmp_path / str(i) / point))
        assert_same_tensors(tensors(resumed), tensors(model))


@pytest.mark.parametrize("kind", ["ticket", "gradients"])
def test_a_run_with_phases_equals_that_of_a_peft_model(tmp_path, kind):
    model = carrying({"default": kind})
    trainer(tmp_path, model).train()
    peft_model = get_peft_model(llama(seed=3), TYPES[kind]())
    trainer(tmp_path, peft_model).train()
    assert_same_tensors(tensors(model), {name.removeprefix(PREFIX): t for name, t in tensors(peft_model).items()})


@pytest.mark.parametrize("adapters", MODELS, ids=called)
def test_the_best_checkpoint_is_loaded_whole(tmp_path, adapters):
    assert_best_is_loaded(trainer(tmp_path, carrying(adapters), **BEST))


@pytest.mark.parametrize("adapters", [a for a in MODELS if len(a) > 1], ids=called)
def test_each_is_saved_as_if_it_were_alone(tmp_path, adapters):
    model = carrying(adapters)
    saved, save = [], model.save_pretrained
    model.save_pretrained = patched = lambda folder, **options: (saved.append(folder), save(folder, **options))
    run = trainer(tmp_path, model)
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert model.active_adapters() == list(adapters)
    assert {name: vars(model).get(name) for name in ("save_pretrained", "active_adapters")} == {
        "save_pretrained": patched,
        "active_adapters": None,
    }
    assert len(saved) == 4 * len(adapters)  # three checkpoints and the last, by what a user has put in its place
    loaded = llama(seed=3)
    for name in adapters:
        together = tmp_path / "final" / ("" if name == "default" else name)
        model.set_adapter(name)
        model.save_pretrained(tmp_path / "alone" / name)
        for file in ("adapter_config.json", WEIGHTS):
            assert (together / file).read_bytes() == (tmp_path / "alone" / name / file).read_bytes()
        loaded.load_adapter(str(together), adapter_name=name)
    model.set_adapter(list(adapters))
    loaded.set_adapter(list(adapters))
    torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=0, rtol=0)


def test_one_that_is_frozen_is_saved_and_stays(tmp_path):
    def stacked():
        model = carrying({"language": "rand", "task": "lora"})
        for name, parameter in model.named_parameters():
            if ".language" in name:
                parameter.requires_grad_(False).fill_(0.01)
        return model

    model = stacked()
    trainer(tmp_path, model).train()
    resumed = stacked()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=True)
    assert_same_tensors(tensors(resumed), tensors(model))
    assert json.loads((tmp_path / "checkpoint-6/language/adapter_config.json").read_text())["peft_type"] == "SPARSE_FT"


@pytest.mark.parametrize("file", ["low_rank/" + WEIGHTS, "sparse/adapter_config.json", "optimizer.pt"])
def test_a_checkpoint_that_lacks_something_is_passed_over(tmp_path, file, caplog):
    adapters = {"sparse": "rand", "low_rank": "lora"}
    model = carrying(adapters)
    trainer(tmp_path, model).train()
    Path(tmp_path / "checkpoint-6" / file).unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = carrying(adapters)
    trainer(tmp_path, resumed).train(resume_from_checkpoint=True)
    assert f"passes over {tmp_path / 'checkpoint-6'}" in caplog.text
    assert_same_tensors(tensors(resumed), tensors(model))


def test_a_damaged_adapter_leaves_the_model_as_it_was(tmp_path):
    adapters = {"sparse": "rand", "low_rank": "lora"}
    trainer(tmp_path, carrying(adapters)).train()
    path = tmp_path / "checkpoint-4/low_rank" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])
    resumed = carrying(adapters)
    before = tensors(resumed)
    with pytest.raises(FormatError, match="low_rank"):
        trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_tensors(tensors(resumed), before)


def test_injected_adapters_are_saved_with_the_model(tmp_path):
    """No verb of PEFT or transformers knows them, so that a checkpoint is that of any model."""

    def injected():
        torch.manual_seed(0)
        return inject_adapter_in_model(TYPES["rand"](), llama(seed=3))

    model = injected()
    trainer(tmp_path, model).train()
    assert (tmp_path / "checkpoint-4/model.safetensors").exists()
    resumed = injected()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=True)
    assert_same_tensors(tensors(resumed), tensors(model))


def average(model):
    found = AdapterAverage(model, "language")
    found.update()
    found.add_to(model, "average")


@pytest.mark.parametrize(
    "use",
    [
        average,
        lambda model: language_below_task({"eng": "language"}, "task")(model, "eng"),
        lambda model: Teacher(model, languages={"eng": "language"}, task="task"),
        lambda model: Teacher(model, task="task"),
    ],
    ids=["average", "language below task", "teacher", "teacher of a task"],
)
def test_what_needs_the_verbs_of_a_peft_model_says_so(use):
    model = carrying({"language": "rand", "task": "rand"})
    before = picture(model)
    with pytest.raises(ConfigError, match=r"PeftModel here, got a LlamaForCausalLM .*\['language', 'task'\]"):
        use(model)
    assert picture(model) == before


def test_transformers_own_trainer_cannot_save_several(tmp_path):
    """Loudly, and at its first checkpoint; `SparseTrainer` is the way out."""
    with pytest.raises(ValueError, match="one by one"):
        trainer(tmp_path, carrying({"sparse": "rand", "low_rank": "lora"}), Trainer).train()
