"""Two processes under DDP train what one process trains on the joined batch."""

from __future__ import annotations

import pytest

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.training import several, unequal_batches
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

CASES = {
    "rand": ("rand", "adamw", {}),
    "ag": ("ag", "adamw", {}),
    "ag, own optimizer": ("ag", "sparse_adamw", {}),
    "ag, float32": ("ag", "adamw", {"double": False}),
    "ag, accumulation and clipping": ("ag", "sparse_adamw", {"accumulate": 2, "clip": 0.5}),
    "ag, accumulation without no_sync": ("ag", "sparse_adamw", {"accumulate": 2, "clip": 0.5, "sync_every": True}),
    "ag, static graph": ("ag", "adamw", {"ddp": {"gradient_as_bucket_view": True, "static_graph": True}}),
    "ag, small buckets": ("ag", "adamw", {"ddp": {"find_unused_parameters": True, "bucket_cap_mb": 1e-4}}),
    "ag, change since reselection": ("ag", "adamw", {"drop_by": "change_since_reselection"}),
    "ag, embeddings": ("ag", "adamw", {"target_modules": ["word_embeddings", "query"]}),
    "ma": ("ma", "adamw", {}),
    "ma, SM3": ("ma", "sm3", {}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    variants = {
        name: ("train_ddp", {"method": method, "optimizer": optimizer, **options})
        for name, (method, optimizer, options) in CASES.items()
    }
    variants["lottery"] = ("lottery_ddp", {})
    variants["fisher"] = ("one_shot_ddp", {"criterion": "fisher"})
    variants["snip"] = ("one_shot_ddp", {"criterion": "weight_times_gradient"})
    folder = tmp_path_factory.mktemp("ddp")
    return (
        run(several, folder / "two", variants=variants),
        run(several, folder / "one", world=1, variants=variants)[0],
    )


@pytest.mark.parametrize("name", [*CASES, "lottery", "fisher", "snip"])
def test_two_processes_equal_one_on_the_joined_batch(trained, name):
    two, one = trained
    assert_replicas([process[name] for process in two])
    assert_joined(two[0][name], one[name])
    if name.startswith(("ag", "ma")):
        assert [update for update, _ in one[name]["replaced"]] == [2, 6]
        assert all(share > 0 for _, share in one[name]["replaced"])


def test_processes_with_different_numbers_of_batches_are_told(tmp_path):
    with pytest.raises(
        AssertionError, match=r"the processes do not agree on the gradient of bert.* in batch 1 of [23]"
    ):
        run(unequal_batches, tmp_path)
