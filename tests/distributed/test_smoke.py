"""The one test of two processes that the default command runs."""

from __future__ import annotations

import os

import torch

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.training import train_ddp

OPTIONS = {"method": "ag", "optimizer": "sparse_adamw"}
# In a process that has imported PEFT already, so that both need not.
CODE = f"""
import sys
from pathlib import Path
import torch
from tests.support.distributed.training import train_ddp
from tests.support.processes import run
folder = Path(sys.argv[1])
torch.save(run(train_ddp, folder, **{OPTIONS!r}), folder / "both.pt")
"""


def test_spiel_in_two_processes_equals_one_on_the_joined_batch(tmp_path, interpreter):
    interpreter.run(CODE, tmp_path, environment={**os.environ, "PEFT_SPARSE_DISTRIBUTED_START": "fork"})
    two = torch.load(tmp_path / "both.pt", weights_only=False)
    assert_replicas(two)
    assert_joined(two[0], train_ddp(**OPTIONS))
    assert [update for update, _ in two[0]["replaced"]] == [2, 6]
