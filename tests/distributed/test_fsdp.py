"""Two processes under FSDP2 train what one process trains on the joined batch."""

from __future__ import annotations

import pytest

from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.distributed.training import several
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

CASES = {
    "rand": ("rand", "adamw", {}),
    "rand, float32 with a head": ("rand", "adamw", {"double": False}),
    "rand, resident": ("rand", "adamw", {"resident": True}),
    "rand, fewer weights than processes": ("rand", "adamw", {"density": None, "num_weights": 9}),
    "rand, L1": ("rand", "adamw", {"l1": 1e-4}),
    "rand, everything": ("rand", "adamw", {"target_modules": "all"}),
    "half chosen, half drawn": (
        "one shot",
        "adamw",
        {"criterion": "gradient", "selection_batches": 1, "random_share": 0.5},
    ),
    "ag": ("ag", "adamw", {}),
    "ag, own optimizer": ("ag", "sparse_adamw", {}),
    "ag, float32 with a head": ("ag", "sparse_adamw", {"double": False}),
    "ag, accumulation and clipping": ("ag", "adamw", {"accumulate": 2, "clip": 0.5}),
    "ag, accumulation without no_sync": ("ag", "adamw", {"accumulate": 2, "clip": 0.5, "sync_every": True}),
    "ag, resident": ("ag", "adamw", {"resident": True}),
    "ag, kept whole between passes": ("ag", "adamw", {"reshard": False, "resident": True}),
    "ag, embeddings": ("ag", "adamw", {"target_modules": ["word_embeddings", "query"]}),
    "ag, checkpointing": ("ag", "adamw", {"checkpointing": False}),
    "ag, reentrant checkpointing": ("ag", "adamw", {"checkpointing": True}),
    "ma": ("ma", "adamw", {}),
    "ma, SM3": ("ma", "sm3", {}),
    "ma, SM3 with a head": ("ma", "sm3", {"double": False}),
}


# In bfloat16 one process of FSDP2 rounds otherwise than two; what accumulates where must not matter.
BFLOAT16 = {"double": False, "bfloat16": True, "accumulate": 2}
IN_BFLOAT16 = {
    "reduced once": ("ag", "sparse_adamw", BFLOAT16),
    "reduced twice": ("ag", "sparse_adamw", {**BFLOAT16, "sync_every": True}),
    "ma": ("ma", "sm3", BFLOAT16),
}


def variants_of(cases):
    return {
        name: ("train_fsdp", {"method": method, "optimizer": optimizer, **options})
        for name, (method, optimizer, options) in cases.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    variants = variants_of(CASES)
    folder = tmp_path_factory.mktemp("fsdp")
    return (
        run(several, folder / "two", variants=variants),
        run(several, folder / "one", world=1, variants=variants)[0],
    )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_on_the_joined_batch(trained, name):
    two, one = trained
    assert_replicas([process[name] for process in two])
    assert_joined(two[0][name], one[name])
    if name.startswith(("ag", "ma")):
        assert [update for update, _ in one[name]["replaced"]] == [2, 6]
        assert all(share > 0 for _, share in one[name]["replaced"])


def test_bfloat16_replicas_agree_however_gradients_accumulate(tmp_path):
    two = run(several, tmp_path, variants=variants_of(IN_BFLOAT16))
    for name in IN_BFLOAT16:
        assert_replicas([process[name] for process in two])
        assert [update for update, _ in two[0][name]["replaced"]] == [2, 6]
    assert_joined(two[0]["reduced twice"], two[0]["reduced once"], tolerance=1e-3)
