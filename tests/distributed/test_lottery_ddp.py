"""LT-SFT on two processes: both choose the same weights, and a killed run resumes to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def launch(folder, *, kill="never", resume="fresh"):
    folder.mkdir(exist_ok=True)
    worker = Path(__file__).parent / "lottery_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder), kill, resume], env=environment, capture_output=True, text=True)
    return done, [json.loads(path.read_text()) for path in sorted(folder.glob("report_*.json"))]


def test_replicas_agree_and_a_killed_run_resumes_to_the_same_end(tmp_path):
    done, whole = launch(tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(whole) == 2
    assert whole[0] == whole[1]
    assert whole[0]["total"] == 200
    assert whole[0]["wrapper"] == "DistributedDataParallel"
    for phase in ("dense", "sparse"):
        done, reports = launch(tmp_path / phase, kill=phase)
        assert done.returncode != 0
        assert reports == []
        done, resumed = launch(tmp_path / phase, resume="resume")
        assert done.returncode == 0, done.stderr[-2000:]
        assert resumed == whole
