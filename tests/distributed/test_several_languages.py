"""Multi-source training in two processes: each draws languages of its own, none twice, and resuming skips exactly."""

from __future__ import annotations

import shutil

import pytest
import torch
from multisource_cases import train
from processes import run

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
