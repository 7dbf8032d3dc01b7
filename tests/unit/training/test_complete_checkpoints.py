"""Which checkpoint a run resumes from when the writing of the newest was cut short, and what damaged files say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    FormatError,
    LotteryTicketConfig,
    RandConfig,
    SparseAdamW,
    SparseTrainer,
    SpielAGConfig,
    iter_deltas,
    iter_reselectors,
    rate_scales,
)
from peft_sparse.training.fitted_rate import InputMeter
from peft_sparse.training.spiel.callback import STATE_FILE, load_state, save_state
from peft_sparse.training.spiel.same_adapter import holds_adapters
from peft_sparse.training.trainer.completeness import Needs
from peft_sparse.training.trainer.resume import find_resume_point
from peft_sparse.training.trainer.stored_adapters import load_adapters
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert, state_of

CONFIGS = {
    "spiel": SpielAGConfig(density=0.05, target_modules=["query"], reselection_steps=4, estimation_steps=2),
    "rand": RandConfig(num_weights=80, target_modules=["query"]),
    "fitted": RandConfig(num_weights=80, target_modules=["query"], fitted_rate=True),
    "ticket": LotteryTicketConfig(num_weights=80, target_modules=["query"]),
    "ada": AdaSftConfig(target_modules=["query"]),
}
FIRST = {"ticket": "_dense", "ada": "_mask"}


def make(folder, kind, *, cls=SparseTrainer, **changes):
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, **changes}
    own = {"dense_args": changes.pop("dense_args")} if "dense_args" in changes else {}
    model = get_peft_model(make_bert(), CONFIGS[kind])
    return cls(model=model, args=make_args(folder, **changes), train_dataset=Labelled(), **own)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}
    for trainer in runs.values():
        trainer.train()
    return runs


def copy_of(trainer, folder):
    shutil.copytree(trainer.args.output_dir, folder, dirs_exist_ok=True)  # keeps the times of the files
    return folder


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_config.json"]
FILES += ["adapter_model.safetensors", STATE_FILE]


@pytest.mark.parametrize("harm", [remove, empty, truncate])
@pytest.mark.parametrize("file", FILES)
def test_the_newest_complete_checkpoint_is_taken(tmp_path, whole, file, harm, caplog):
    folder = copy_of(whole["spiel"], tmp_path)
    harm(folder / "checkpoint-8" / file)
    needs = Needs(adapters={"default": ""}, files=(STATE_FILE,))
    assert find_resume_point(str(folder), True, None, needs=needs).path == str(folder / "checkpoint-4")
    assert f"passes over {folder / 'checkpoint-8'}" in caplog.text
    assert f"{file} is {'missing' if harm is remove else 'damaged'}" in caplog.text


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("spiel", STATE_FILE),
        ("spiel", "adapter_config.json"),
        ("fitted", STATE_FILE),
        ("rand", "optimizer.pt"),
        ("ticket", "rng_state.pth"),
    ],
)
def test_the_run_ends_as_if_it_had_not_been_interrupted(tmp_path, whole, kind, file):
    folder = copy_of(whole[kind], tmp_path)
    truncate(folder / "checkpoint-8" / file)
    resumed = make(folder, kind)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert_same_tensors(state_of(resumed.model), state_of(whole[kind].model))


@pytest.mark.parametrize("case", ["no input is seen", "no linear layer is tuned"])
def test_a_fitted_rate_that_measures_nothing_wants_no_more_than_was_written(tmp_path, case, monkeypatch):
    config = CONFIGS["fitted"]
    if case == "no input is seen":
        monkeypatch.setattr(InputMeter, "see", lambda self, x: None)
    else:
        config = RandConfig(num_weights=80, target_modules=["word_embeddings"], fitted_rate=True)
    monkeypatch.setitem(CONFIGS, "fitted", config)
    uninterrupted = make(tmp_path, "fitted")
    uninterrupted.train()
    assert set(rate_scales(uninterrupted.model).values()) <= {1.0}
    assert (tmp_path / "checkpoint-8" / STATE_FILE).is_file() == (case == "no input is seen")
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = make(tmp_path, "fitted")
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(state_of(resumed.model), state_of(uninterrupted.model))


def test_rates_are_not_those_of_another_run_with_as_many_steps(tmp_path, whole, caplog):
    """The trainer reads the named checkpoint, and its callback must not read the output folder's afterwards."""
    other = make(tmp_path, "fitted", data_seed=1)
    other.train()
    assert rate_scales(other.model) != rate_scales(whole["fitted"].model)
    resumed = make(tmp_path, "fitted")
    resumed.train(resume_from_checkpoint=os.path.join(whole["fitted"].args.output_dir, "checkpoint-4"))
    assert rate_scales(resumed.model) == rate_scales(whole["fitted"].model)
    assert_same_tensors(state_of(resumed.model), state_of(whole["fitted"].model))
    assert STATE_FILE not in caplog.text


@pytest.mark.parametrize("kind", FIRST)
def test_first_phases_too(tmp_path, whole, kind):
    folder = copy_of(whole[kind], tmp_path)
    for name in ("checkpoint-4", "checkpoint-8", f"{FIRST[kind]}/selection"):
        shutil.rmtree(folder / name)
    (folder / FIRST[kind] / "checkpoint-8" / "optimizer.pt").unlink()
    resumed = make(folder, kind)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(state_of(resumed.model), state_of(whole[kind].model))


def test_a_dense_phase_has_nothing_to_do_with_the_state_of_sparse_checkpoints(tmp_path, monkeypatch, caplog):
    """Both phases number their checkpoints from the start, and the state is of the sparse phase alone."""
    config = LotteryTicketConfig(num_weights=80, target_modules=["query"], fitted_rate=True)
    monkeypatch.setitem(CONFIGS, "ticket", config)
    uninterrupted = make(tmp_path / "a", "ticket")
    uninterrupted.train()
    assert not list((tmp_path / "a" / "_dense").rglob(STATE_FILE))
    resumed = make(tmp_path / "a", "ticket")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "_dense" / "checkpoint-4"))
    assert STATE_FILE not in caplog.text
    assert rate_scales(resumed.model) == rate_scales(uninterrupted.model)
    assert_same_tensors(state_of(resumed.model), state_of(uninterrupted.model))
    short = make(tmp_path / "b", "ticket", max_steps=2, dense_args={"max_steps": 8})
    short.train()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["_dense", "checkpoint-2"]


def test_a_checkpoint_that_sigterm_cut_short(tmp_path, whole):
    folder = copy_of(whole["rand"], tmp_path)
    (folder / "checkpoint-8" / "checkpoint-is-incomplete.txt").touch()
    assert find_resume_point(str(folder), True, None).path == str(folder / "checkpoint-4")


def test_writing_a_checkpoint_anew_begins_by_calling_it_incomplete(tmp_path, whole, monkeypatch):
    """Half of the new files and the old state would make a checkpoint of two runs."""
    folder = copy_of(whole["rand"], tmp_path)
    trainer = make(folder, "rand", seed=1)
    seen = []
    save = Trainer._save_optimizer_and_scheduler

    def saving(self, output_dir):
        seen.append(sorted(os.listdir(output_dir)))
        return save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", saving)
    trainer.train()
    assert len(seen) == 2
    assert all("trainer_state.json" not in files and "adapter_model.safetensors" in files for files in seen)


def test_nothing_complete_says_why(tmp_path, whole):
    folder = copy_of(whole["rand"], tmp_path)
    for step in (4, 8):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory .*optimizer.pt is missing"):
        make(folder, "rand").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("kind", "path", "harm"),
    [
        ("spiel", "checkpoint-8/trainer_state.json", truncate),
        ("spiel", "checkpoint-8/trainer_state.json", lambda p: p.write_text('{"global_step": "x"}')),
        ("spiel", "checkpoint-8/adapter_model.safetensors", truncate),
        ("spiel", f"checkpoint-8/{STATE_FILE}", empty),
        ("rand", "checkpoint-8/optimizer.pt", truncate),
        ("rand", "checkpoint-8/adapter_config.json", lambda p: p.write_text("[1]")),
        ("rand", "checkpoint-8/adapter_config.json", remove),
        ("ticket", "_dense/checkpoint-8/dense_phase.safetensors", truncate),
        ("ada", "_mask/checkpoint-8/mask_phase.json", empty),
        ("ada", "_mask/checkpoint-8/adapter_model.safetensors", truncate),
    ],
)
def test_a_damaged_file_of_a_named_checkpoint(tmp_path, whole, kind, path, harm):
    folder = copy_of(whole[kind], tmp_path)
    harm(folder / path)
    trainer = make(folder, kind)
    before = state_of(trainer.model)
    with pytest.raises(FormatError, match=r"resume_from_checkpoint=True takes the newest complete one") as raised:
        trainer.train(resume_from_checkpoint=str((folder / path).parent))
    assert Path(path).name in str(raised.value)
    assert_same_tensors(state_of(trainer.model), before)


def test_a_failed_resume_leaves_an_unselected_adapter_where_it_is(tmp_path, whole):
    folder = copy_of(whole["ticket"], tmp_path)
    path = folder / "checkpoint-8" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("values"))
    save_file({**tensors, name: tensors[name] + 1}, path)  # whole as a file, and not what was sealed
    trainer = make(folder, "ticket")
    before = state_of(trainer.model)
    with pytest.raises(FormatError):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same_tensors(state_of(trainer.model), before)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same_tensors(state_of(trainer.model), state_of(whole["ticket"].model))


@pytest.mark.parametrize("content", [b"no archive", {"state": {0: {}}, "param_groups": []}, {"x": 1}])
def test_an_optimizer_of_another_run(tmp_path, whole, content):
    folder = copy_of(whole["rand"], tmp_path)
    torch.save(content, folder / "checkpoint-8" / "optimizer.pt")
    with pytest.raises(FormatError, match=r"optimizer.pt or scheduler.pt is damaged, or of another run"):
        make(folder, "rand").train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_moments_of_other_weights(tmp_path, whole):
    folder = copy_of(whole["rand"], tmp_path)
    path = folder / "checkpoint-8" / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    first = next(iter(content["state"].values()))
    first["exp_avg"] = first["exp_avg"][:-1].clone()
    torch.save(content, path)
    with pytest.raises(FormatError, match=r"exp_avg of shape \(\d+,\) is for a parameter of shape"):
        make(folder, "rand").train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_a_named_checkpoint_may_lack_the_optimizer_and_says_so(tmp_path, whole, caplog):
    folder = copy_of(whole["rand"], tmp_path)
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make(folder, "rand")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert "optimizer.pt is missing: the run goes on without it" in caplog.text


def test_saving_the_model_only(tmp_path):
    make(tmp_path, "rand", save_only_model=True).train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    trainer = make(tmp_path, "rand", save_only_model=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8


def test_a_dense_checkpoint_is_not_for_a_selected_adapter(tmp_path, whole):
    trainer = whole["ticket"]
    path = os.path.join(trainer.args.output_dir, "_dense", "checkpoint-4")
    before = state_of(trainer.model)
    with pytest.raises(FormatError, match=r"is of a dense phase \(dense_phase.safetensors\), and no adapter"):
        trainer.train(resume_from_checkpoint=path)
    assert_same_tensors(state_of(trainer.model), before)


# ---- adapters that a checkpoint does not know ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trainer, SparseTrainer])
def test_an_adapter_added_later_starts_afresh(tmp_path, whole, cls, caplog):
    folder = tmp_path / "there"
    if cls is SparseTrainer:
        copy_of(whole["spiel"], folder)
    else:
        make(folder, "spiel", cls=Trainer).train()
    trainer = make(folder if cls is Trainer else tmp_path / "here", "spiel", cls=cls)
    trainer.model.add_adapter("other", CONFIGS["spiel"])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert caplog.text.count("does not know adapter 'other': its reselection starts afresh") == 1
    other = next(r for r in iter_reselectors(trainer.model) if r.adapter_name == "other")
    assert (other.update, other.history) == (0, [])
    if cls is SparseTrainer:
        assert_same_tensors(deltas(trainer.model), deltas(whole["spiel"].model))


def test_one_that_trains_and_is_unknown_is_named(tmp_path, whole, caplog):
    trainer = make(tmp_path, "spiel")
    trainer.model.add_adapter("other", CONFIGS["rand"])
    trainer.model.base_model.set_adapter(["default", "other"])
    before = deltas(trainer.model, "other")
    load_adapters(trainer.model, os.path.join(whole["spiel"].args.output_dir, "checkpoint-8"), ["default", "other"])
    assert "adapter 'other' is not in" in caplog.text
    assert_same_tensors(deltas(trainer.model, "other"), before)
    assert_same_tensors(deltas(trainer.model), deltas(whole["spiel"].model))


# ---- whose checkpoint a folder is ------------------------------------------------------------------------------------


def move_a_value(delta):
    delta.values.data[0] += 1e-3


def halve(delta):
    delta.values.data = delta.values.data.half()


def move_an_index(delta):
    free = next(i for i in range(delta.numel) if i not in set(delta.indices.tolist()))
    indices, order = torch.cat([delta.indices[1:], torch.tensor([free], dtype=torch.int32)]).sort()
    delta.set_support(indices, delta.values.detach()[order])


@pytest.mark.parametrize(
    ("change", "harm", "holds"),
    [
        (lambda delta: None, lambda path: None, True),
        (move_a_value, lambda path: None, False),
        (move_an_index, lambda path: None, False),
        (halve, lambda path: None, True),
        (move_a_value, remove, True),  # it cannot be told
        (lambda delta: None, truncate, False),
    ],
)
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_checkpoint_is_known_by_its_adapters(tmp_path, change, harm, holds, name):
    model = get_peft_model(make_bert(dropout=0.0), CONFIGS["rand"], adapter_name=name)
    for *_, delta in iter_deltas(model, name):
        delta.values.data.fill_(0.1)  # wherever they lie; and half precision rounds it
    model.save_pretrained(tmp_path)
    change(next(iter_deltas(model, name))[-1])
    harm(tmp_path / ("" if name == "default" else name) / "adapter_model.safetensors")
    assert holds_adapters(tmp_path, model, [name]) == holds
    model.requires_grad_(False)
    assert holds_adapters(tmp_path, model, [name])


# ---- the state of the reselection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("update", lambda t: t.float(), "'default/update'|'update' must be one whole number"),
        ("window.indices.", lambda t: t.flip(0), "must be sorted, unique and below 256"),
        ("window.indices.", lambda t: t + 10_000, "must be sorted, unique and below 256"),
        ("window.total.", lambda t: t[:-1], r"must have shape \(\d+,\), got"),
        ("window.updates.", lambda t: t[None].repeat(2), r"must have shape \(\), got \(2,\)"),
        ("window.nominated.", lambda t: None, "is missing"),
        ("grown_at.", lambda t: t[:-1], "Load the adapter of the same checkpoint first"),
    ],
)
def test_a_state_with_wrong_tensors(tmp_path, part, change, message):
    model = get_peft_model(make_bert(dropout=0.0), CONFIGS["spiel"])
    train(model, SparseAdamW([p for p in model.parameters() if p.requires_grad]), 1)
    save_state(model, tmp_path)
    tensors = load_file(tmp_path / STATE_FILE)
    key = next(k for k in tensors if k.startswith(f"default/{part}"))
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed.contiguous()
    save_file(tensors, tmp_path / STATE_FILE)
    (reselector,) = iter_reselectors(model)
    before = reselector.state_dict()
    with pytest.raises(FormatError, match=message):
        load_state(model, tmp_path)
    assert_same_tensors(reselector.state_dict(), before)


def train(model, optimizer, steps, accelerator=None, start=0):
    for i in range(start, steps):
        batch = {key: torch.stack([Labelled()[i + j][key] for j in range(3)]) for key in Labelled()[0]}
        loss = model(**batch).loss
        accelerator.backward(loss) if accelerator is not None else loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("cls", [SparseAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("registered", [True, False])
def test_accelerate_carries_the_clock_if_it_is_told_to(tmp_path, cls, registered):
    def prepared():
        model = get_peft_model(make_bert(dropout=0.0), CONFIGS["spiel"])
        optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        if registered:
            accelerator.register_for_checkpointing(*iter_reselectors(model))
        return model, optimizer, accelerator

    model, optimizer, accelerator = prepared()
    train(model, optimizer, 5, accelerator)
    accelerator.save_state(str(tmp_path))
    again, optimizer_again, accelerator = prepared()
    accelerator.load_state(str(tmp_path))
    if not registered:
        with pytest.raises(ConfigError, match=r"5 updates of adapter 'default' before.*register_for_checkpointing"):
            train(again, optimizer_again, 9, start=5)
        return
    train(model, optimizer, 9, start=5)
    train(again, optimizer_again, 9, start=5)
    assert {len(d.indices) for _, _, _, d in iter_deltas(again)}
    assert_same_tensors(deltas(again), deltas(model))
    assert json.dumps([vars(r) for r in next(iter_reselectors(again)).history[-1:]]) != "[]"
