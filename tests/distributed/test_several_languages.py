"""Multi-source training in two processes: each draws languages of its own, none twice, and resuming skips exactly."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.multisource import train, train_generator
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_two_processes(tmp_path):
    whole = run(train, tmp_path / "whole", folder=str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    resumed = run(train, tmp_path / "resumed", folder=str(tmp_path / "out"), resume=True)
    batches = [(language, str(ids)) for process in whole for language, ids in process["seen"]]
    assert len(set(batches)) == 16  # eight steps, two processes: every batch of the data set once
    assert any(a[0] != b[0] for a, b in zip(whole[0]["seen"], whole[1]["seen"], strict=True))
    total = {f"batches/{language}": count + whole[1]["own"][language] for language, count in whole[0]["own"].items()}
    for process, expected in zip(resumed, whole, strict=True):
        assert process["counts"] == expected["counts"] == total
        assert [language for language, _ in process["seen"]] == [language for language, _ in expected["seen"][5:]]
        assert all(torch.equal(a[1], b[1]) for a, b in zip(process["seen"], expected["seen"][5:], strict=True))
        for name, values in whole[0]["values"].items():
            assert torch.equal(process["values"][name], values)
            assert torch.equal(expected["values"][name], values)


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_a_hypernetwork_in_two_processes(tmp_path, fsdp):
    folder = str(tmp_path / "out")
    whole = run(train_generator, tmp_path / "whole", folder=folder, fsdp=fsdp)
    assert {process["wrapper"] for process in whole} == {"FSDPPeftModel" if fsdp else "DistributedDataParallel"}
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    resumed = run(train_generator, tmp_path / "resumed", folder=folder, fsdp=fsdp, resume=True)
    (one,) = run(train_generator, tmp_path / "one", world=1, folder=str(tmp_path / "alone"))
    # A step of one process has the batches of both.
    interleaved = [batch for step in zip(*(process["seen"] for process in whole), strict=True) for batch in step]
    assert_same_batches(interleaved, one["seen"])
    assert any(len({process["seen"][step][0] for process in whole}) == 2 for step in range(8))
    assert any(own["own"].values() != one["own"].values() for own in whole)
    assert sum(one["counts"].values()) == 16
    for process, expected in zip(resumed, whole, strict=True):
        assert process["counts"] == expected["counts"] == one["counts"]
        assert_same_batches(process["seen"], expected["seen"][5:])
        assert process["saved languages"] == expected["saved languages"] == ["ace", "eng", "quy"]
    assert_replicas([process["values"] for process in (*whole, *resumed)])
    assert_joined(whole[0]["values"], one["values"], tolerance=1e-10)


def assert_same_batches(found, expected):
    assert [language for language, *_ in found] == [language for language, *_ in expected]
    for (_, *tensors), (_, *others) in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
