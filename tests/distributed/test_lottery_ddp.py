"""Selections on two processes: both choose the same weights, and a killed run of LT-SFT resumes to the same end."""

from __future__ import annotations

import pytest

from tests.support.distributed.comparison import assert_replicas
from tests.support.distributed.trainers import train_lottery, train_one_shot
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_replicas_agree_and_a_killed_run_resumes_to_the_same_end(tmp_path):
    whole = run(train_lottery, tmp_path / "whole", folder=str(tmp_path / "whole"))
    assert_replicas(whole)
    assert whole[0]["wrapper"] == "DistributedDataParallel"
    assert sum(t.numel() for name, t in whole[0].items() if name.startswith("values.")) == 200
    for phase in ("dense", "sparse"):
        folder = str(tmp_path / phase)
        with pytest.raises(AssertionError, match=f"stopped in the {phase} phase"):
            run(train_lottery, tmp_path / f"killed_{phase}", folder=folder, stop=phase)
        resumed = run(train_lottery, tmp_path / f"resumed_{phase}", folder=folder, resume=True)
        assert_replicas([*whole, *resumed])


def test_replicas_select_alike_by_their_gradients(tmp_path):
    found = run(train_one_shot, tmp_path / "run", folder=str(tmp_path / "out"))
    assert_replicas(found)
    assert found[0]["wrapper"] == "DistributedDataParallel"
    assert sum(t.numel() for name, t in found[0].items() if name.startswith("values.")) == 200
