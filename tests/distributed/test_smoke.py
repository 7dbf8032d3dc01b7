"""The one test of two processes that the default command runs."""

from __future__ import annotations

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.training import train_ddp
from tests.support.processes import run


def test_spiel_in_two_processes_equals_one_on_the_joined_batch(tmp_path):
    options = {"method": "ag", "optimizer": "sparse_adamw"}
    two = run(train_ddp, tmp_path, **options)
    assert_replicas(two)
    assert_joined(two[0], train_ddp(**options))
    assert [update for update, _ in two[0]["replaced"]] == [2, 6]
