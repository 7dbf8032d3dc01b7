"""Trainers in two processes: the same as one process, resumed inside a window without a trace, files written once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.trainers import distil, train
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def train_and_resume(tmp_path, **options):
    """What both processes of a whole run came to, after a resumed one came to the same."""
    whole = run(train, tmp_path / "whole", folder=str(tmp_path / "out"), **options)
    assert_replicas([process["end"] for process in whole])
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    resumed = run(train, tmp_path / "resumed", folder=str(tmp_path / "out"), resume=True, **options)
    for process, expected in zip(resumed, whole, strict=True):
        assert_replicas([expected["end"], process["end"]])
        assert process["losses"] == expected["losses"]
    return whole


def assert_equals_one_process(found, tmp_path, **options):
    (one,) = run(train, tmp_path / "one", world=1, folder=str(tmp_path / "alone"), **options)
    assert one["replaced"] == found[0]["replaced"]
    assert_joined(found[0]["end"], one["end"])


@pytest.mark.parametrize("own_trainer", [False, True])
def test_ddp(tmp_path, own_trainer):
    whole = train_and_resume(tmp_path, method="ag", own_trainer=own_trainer)
    assert [process["wrapper"] for process in whole] == ["DistributedDataParallel"] * 2
    assert [process["saved"] for process in whole] == [2, 0]
    assert [update for update, _ in whole[0]["replaced"]] == [2, 6]
    state = load_file(tmp_path / "out" / "checkpoint-5" / "sparse_training_state.safetensors")
    assert int(state["default/update"]) == 5
    assert int(next(tensor for key, tensor in state.items() if "/window.updates." in key)) == 1
    assert_equals_one_process(whole, tmp_path, method="ag", own_trainer=own_trainer)


def test_ddp_with_accumulation(tmp_path):
    whole = run(train, tmp_path / "whole", folder=str(tmp_path / "out"), method="ma", accumulate=2)
    assert_replicas([process["end"] for process in whole])
    assert_equals_one_process(whole, tmp_path, method="ma", accumulate=2)


@pytest.mark.parametrize(
    ("method", "own_trainer", "fsdp"),
    [
        ("ag", False, {"state_dict_type": "SHARDED_STATE_DICT"}),
        ("ag", True, {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}),
        ("ag", True, {"state_dict_type": "FULL_STATE_DICT"}),
        ("ma", True, {"state_dict_type": "SHARDED_STATE_DICT"}),
        ("rand", True, {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True}),
    ],
)
def test_fsdp2(tmp_path, method, own_trainer, fsdp):
    # So many weights that the size of a coded support differs from one to the next.
    options = {"method": method, "own_trainer": own_trainer, "modules_to_save": None, "density": 0.3}
    whole = train_and_resume(tmp_path, fsdp=fsdp, **options)
    assert [process["wrapper"] for process in whole] == ["FSDPPeftModel"] * 2
    assert_equals_one_process(whole, tmp_path, **options)
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / "pytorch_model_fsdp_0" / ".metadata").exists() == ("SHARDED" in fsdp["state_dict_type"])
    if "FULL" in fsdp["state_dict_type"]:
        file = load_file(checkpoint / "adapter_model.safetensors")
        assert all(tensor.dtype in (torch.float32, torch.uint8) for tensor in file.values())
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        assert sum(config["counts"].values()) == sum(t.numel() for key, t in file.items() if key.endswith(".values"))


def test_two_processes_learn_from_a_teacher_what_one_does(tmp_path):
    both = run(distil, tmp_path / "two", folder=str(tmp_path / "two"))
    (one,) = run(distil, tmp_path / "one", world=1, folder=str(tmp_path / "one"))
    assert {process["wrapper"] for process in both} == {"DistributedDataParallel"}
    for process in (*both, one):
        assert not process["teacher is wrapped"]
        assert not process["teacher moved"]
    assert_replicas([process["end"] for process in both])
    assert sum(t.numel() for name, t in one["end"].items() if name.startswith("values.")) == 60
    assert_joined(both[0]["end"], one["end"])
    # What is logged is the mean over both processes.
    assert len(one["logs"]) == 6
    for found, expected in zip(both[0]["logs"], one["logs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
