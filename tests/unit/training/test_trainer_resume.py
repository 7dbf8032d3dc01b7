from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sparse import FormatError, iter_deltas
from peft_sparse.training.phases.dense_checkpoint import FILE_NAME, load_dense_phase, save_dense_phase
from peft_sparse.training.phases.lottery import start_dense_phase
from peft_sparse.training.trainer.resume import find_resume_point
from tests.support.training import (
    KillAt,
    Killed,
    assert_same_tensors,
    base_weights,
    deltas,
    head,
    make_adapted,
    make_trainer,
)

# Six batches an epoch: both phases end in the middle of their second one.
SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "dense_args": {"max_steps": 9, "learning_rate": 3e-3},
}


def run(folder, *, resume=None, kill=None, model=None, seed_before=0, **changes):
    torch.manual_seed(seed_before)
    model = make_adapted(layers=1) if model is None else model
    trainer = make_trainer(folder, model=model, callbacks=[kill] if kill else None, **{**SETTINGS, **changes})
    if kill is not None:
        kill.trainer = trainer
    before = base_weights(trainer.model)
    torch.manual_seed(seed_before)
    if kill is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=resume)
        assert_same_tensors(
            {n: p for n, p in base_weights(trainer.model).items() if "modules_to_save" not in n},
            {n: p for n, p in before.items() if "modules_to_save" not in n},
        )
    return trainer


def losses(state):
    return [(e["step"], e["loss"]) for e in state.log_history if "loss" in e]


def assert_same_run(resumed, uninterrupted):
    assert_same_tensors(deltas(resumed.model), deltas(uninterrupted.model))
    assert_same_tensors(head(resumed.model), head(uninterrupted.model))
    assert losses(resumed.state) == losses(uninterrupted.state)
    assert resumed.model.peft_config["default"].counts == uninterrupted.model.peft_config["default"].counts
    assert resumed.state.global_step == uninterrupted.state.global_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("phase", "step", "found"),
    [
        ("dense", 3, "_dense/checkpoint-2"),
        ("dense", 6, "_dense/checkpoint-6"),  # between two epochs
        ("dense", 7, "_dense/checkpoint-6"),
        ("dense", None, "_dense/checkpoint-9"),  # its last checkpoint is written, nothing is selected
        ("sparse", 0, "_dense/selection"),  # the boundary
        ("sparse", 1, "_dense/selection"),
        ("sparse", 3, "checkpoint-2"),
        ("sparse", 7, "checkpoint-6"),
        ("sparse", None, "checkpoint-8"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole, phase, step, found):
    run(tmp_path, kill=KillAt(phase, step), seed_before=1)
    assert find_resume_point(str(tmp_path), True).path == os.path.join(tmp_path, found)
    resumed = run(tmp_path, resume=True, seed_before=2)
    assert_same_run(resumed, whole)
    if phase == "dense":
        assert losses(resumed.dense_state) == losses(whole.dense_state)


def test_killed_twice(tmp_path, whole):
    run(tmp_path, kill=KillAt("dense", 5), seed_before=1)
    run(tmp_path, kill=KillAt("dense", 8), resume=True, seed_before=2)
    run(tmp_path, kill=KillAt("sparse", 5), resume=True, seed_before=3)
    assert_same_run(run(tmp_path, resume=True, seed_before=4), whole)


OTHER_SETTINGS = [
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.1},
    {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 5e-2,
    },
    {"optim": "sgd", "bf16": True, "lr_scheduler_type": "cosine"},
    {"seed": 3, "dense_args": {"max_steps": 9, "seed": 4}},
]


# Each of them by default in one phase, in the other in the slow tests.
@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        pytest.param(changes, phase, marks=() if phase == default else pytest.mark.slow)
        for changes, default in zip(OTHER_SETTINGS, ["dense", "sparse", "dense", "sparse"], strict=True)
        for phase in ("dense", "sparse")
    ],
)
def test_resuming_with_other_settings(tmp_path, phase, changes):
    uninterrupted = run(tmp_path / "whole", **changes)
    run(tmp_path / "killed", kill=KillAt(phase, 5), seed_before=1, **changes)
    resumed = run(tmp_path / "killed", resume=True, seed_before=2, **changes)
    assert_same_run(resumed, uninterrupted)
    if "load_best_model_at_end" in changes:
        best = [trainer.state.best_model_checkpoint for trainer in (resumed, uninterrupted)]
        assert os.path.basename(best[0]) == os.path.basename(best[1])


def test_heads_resume_at_the_start_of_the_first_process(tmp_path):
    """The head's random start of the killed process is what phase two begins from, whatever the new process drew."""
    uninterrupted = run(tmp_path / "whole")
    run(tmp_path / "killed", kill=KillAt("dense", 5))
    other = make_adapted(layers=1)
    with torch.no_grad():
        other.base_model.model.classifier.modules_to_save.default.weight.normal_()
    assert_same_run(run(tmp_path / "killed", resume=True, model=other), uninterrupted)


def test_other_adapter_names(tmp_path):
    def make():
        model = make_adapted(layers=1, modules_to_save=None)
        model.add_adapter("task", model.peft_config["default"])
        model.set_adapter("task")
        model.delete_adapter("default")
        return model

    uninterrupted = run(tmp_path / "whole", model=make())
    for resume, kill in ((None, KillAt("dense", 3)), (True, KillAt("sparse", 0)), (True, KillAt("sparse", 3))):
        run(tmp_path / "killed", resume=resume, kill=kill, model=make())
    resumed = run(tmp_path / "killed", resume=True, model=make())
    assert_same_tensors(deltas(resumed.model, "task"), deltas(uninterrupted.model, "task"))


def test_resuming_a_task_adapter_over_a_language_adapter(tmp_path):
    from peft_sparse import RandConfig

    def make():
        model = make_adapted(layers=1, modules_to_save=None, num_weights=50)
        model.add_adapter("language", RandConfig(density=0.1, seed=3, init_weights=False))
        model.base_model.set_adapter(["language", "default"])
        model.set_requires_grad("language", requires_grad=False)
        return model

    uninterrupted = run(tmp_path / "whole", model=make())
    language = deltas(uninterrupted.model, "language")
    for phase, step in (("dense", 3), ("sparse", 3)):
        folder = tmp_path / phase
        run(folder, kill=KillAt(phase, step), model=make())
        resumed = run(folder, resume=True, model=make())
        assert_same_run_of_deltas(resumed, uninterrupted)
        assert_same_tensors(deltas(resumed.model, "language"), language)
        assert resumed.model.active_adapters == ["language", "default"]


def assert_same_run_of_deltas(resumed, uninterrupted):
    assert_same_tensors(deltas(resumed.model), deltas(uninterrupted.model))
    assert losses(resumed.state) == losses(uninterrupted.state)


# ---- which checkpoint ------------------------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_passed_over(tmp_path, whole):
    run(tmp_path, kill=KillAt("dense", 5))
    state = tmp_path / "_dense" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert find_resume_point(str(tmp_path), True).path == str(tmp_path / "_dense" / "checkpoint-2")
    shutil.copytree(tmp_path / "_dense" / "checkpoint-2", tmp_path / "_dense" / "checkpoint-6")
    (tmp_path / "_dense" / "checkpoint-6" / "trainer_state.json").unlink()
    assert find_resume_point(str(tmp_path), True).path == str(tmp_path / "_dense" / "checkpoint-2")
    assert_same_run(run(tmp_path, resume=True), whole)


def test_explicit_paths_of_every_kind(tmp_path, whole):
    run(tmp_path, kill=KillAt("sparse", 5))
    for path, phase in (
        ("_dense/checkpoint-2", "dense"),
        ("_dense/selection", "selection"),
        ("checkpoint-2", "second"),
    ):
        point = find_resume_point(str(tmp_path), str(tmp_path / path))
        assert (point.phase, point.path) == (phase, str(tmp_path / path))
    assert_same_run(run(tmp_path / "elsewhere", resume=str(tmp_path / "_dense" / "checkpoint-4")), whole)


def test_the_newest_run_in_the_folder_wins(tmp_path):
    """An earlier run's sparse checkpoints do not hide that the present one stopped in its dense phase."""
    run(tmp_path)
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            os.utime(os.path.join(folder, name), (1, 1))
    run(tmp_path, kill=KillAt("dense", 3))
    assert find_resume_point(str(tmp_path), True).path == str(tmp_path / "_dense" / "checkpoint-2")


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(
        ValueError, match=r"No valid checkpoint found in output directory \(.*\) nor in its folder _dense"
    ):
        run(tmp_path, resume=True)
    with pytest.raises(FormatError, match=r"holds none of dense_phase.safetensors"):
        run(tmp_path, resume=str(tmp_path))
    assert find_resume_point(str(tmp_path), None) is None
    assert find_resume_point(str(tmp_path), False) is None


def test_a_selected_adapter_resumes_its_sparse_phase(tmp_path, whole):
    run(tmp_path, kill=KillAt("sparse", 5))
    model = make_adapted(layers=1)
    make_trainer(tmp_path / "other", model=model, max_steps=1, dense_args={"learning_rate": 0.5}).train()
    # It trains as any adapter does, so what counts is the seed that the trainer sets when it is made.
    resumed = run(tmp_path, resume=True, model=model, seed_before=7)
    assert_same_run_of_deltas(resumed, whole)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_file_holds_targets_heads_and_their_start(tmp_path):
    model = make_adapted(dtype=torch.bfloat16, target_modules=["query"])
    start = head(model)
    phase = start_dense_phase(model)
    with torch.no_grad():
        for tensor in (
            *[t.parameter for t in phase.targets],
            *[p for p in phase.others.values() if p.is_floating_point()],
        ):
            tensor.add_(torch.randn_like(tensor))
    targets, heads = {t.name: t.parameter.detach().clone() for t in phase.targets}, head(model)
    save_dense_phase(phase, tmp_path)
    assert os.listdir(tmp_path) == [FILE_NAME]
    tensors = load_file(tmp_path / FILE_NAME)
    name = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.equal(tensors[f"other.{name}"], heads[name])
    assert torch.equal(tensors[f"start.{name}"], start[name])
    phase.abort()
    phase = start_dense_phase(model)
    load_dense_phase(phase, tmp_path)
    assert_same_tensors({t.name: t.parameter for t in phase.targets}, targets)
    assert_same_tensors(head(model), heads)
    phase.abort()
    assert_same_tensors(head(model), start)


def test_foreign_files_are_refused_and_change_nothing(tmp_path):
    save_dense_phase(start_dense_phase(make_adapted(target_modules=["query"])), tmp_path)
    other_base = make_adapted(seed=5, target_modules=["query"])
    phase, before = start_dense_phase(other_base), base_weights(other_base)
    with pytest.raises(FormatError, match=r"started from other base weights \(.*layer\.0.*query\.weight differs\)"):
        load_dense_phase(phase, tmp_path)
    assert_same_tensors(base_weights(other_base), before)
    other_targets = start_dense_phase(make_adapted(target_modules=["key"]))
    with pytest.raises(FormatError, match=r"4 tensors are in one of them only"):
        load_dense_phase(other_targets, tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    save_file(tensors, tmp_path / FILE_NAME, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"must be a dense phase of version 1, got None"):
        load_dense_phase(start_dense_phase(make_adapted(target_modules=["query"])), tmp_path)


def test_other_shapes_are_refused(tmp_path):
    model = make_adapted(target_modules=["query"])
    save_dense_phase(start_dense_phase(model), tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / FILE_NAME)
    name = next(n for n in tensors if n.startswith("target."))
    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / FILE_NAME, metadata=metadata)
    with pytest.raises(FormatError, match=r"query\.weight must have shape \(16, 16\), got \(3, 3\)"):
        load_dense_phase(start_dense_phase(make_adapted(target_modules=["query"])), tmp_path)


def test_the_selection_folder_says_whose_it_is(tmp_path):
    trainer = run(tmp_path)
    assert json.loads((tmp_path / "_dense" / "selection" / "selection.json").read_text()) == {"adapter": "default"}
    assert not os.path.exists(tmp_path / "_dense" / "selection.tmp")
    assert {n for n, _, _, _ in iter_deltas(trainer.model)} == set(trainer.model.peft_config["default"].counts)
