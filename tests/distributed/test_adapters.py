"""Bottleneck adapters and hypernetworks in two processes: the same as one process on the joined batch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.support.distributed import adapters as adapter_cases
from tests.support.distributed.adapters import LANGUAGES
from tests.support.distributed.comparison import assert_joined, assert_replicas
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

PLAIN = {name: (name, None, {}) for name in ("pfeiffer", "houlsby", "nice", "stack")}
GENERATED = {f"{name}, {languages}": (name, languages, {}) for name in ("MAD-G", "MAD-G-LS") for languages in LANGUAGES}
PER_PROCESS, PER_EXAMPLE = LANGUAGES
SHARDED = {
    "nice, embeddings apart": ("nice", None, {"embeddings": True}),
    "stack, reentrant checkpointing": ("stack", None, {"checkpointing": True}),
    "MAD-G-LS, kept whole between passes": ("MAD-G-LS", PER_PROCESS, {"reshard_after_forward": False}),
    "MAD-G-LS, accumulation": ("MAD-G-LS", PER_PROCESS, {"accumulate": 2}),
    "MAD-G-LS, checkpointing": ("MAD-G-LS", PER_PROCESS, {"checkpointing": False}),
    "MAD-G-LS, reentrant checkpointing": ("MAD-G-LS", PER_PROCESS, {"checkpointing": True}),
    "MAD-G, reentrant checkpointing": ("MAD-G", PER_EXAMPLE, {"checkpointing": True}),
}
CASES = {
    **{f"DDP: {name}": ("train_ddp", *case) for name, case in {**PLAIN, **GENERATED}.items()},
    **{f"FSDP2: {name}": ("train_fsdp", *case) for name, case in {**PLAIN, **GENERATED, **SHARDED}.items()},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    variants = {
        key: (case, {"name": name, "languages": languages, **options})
        for key, (case, name, languages, options) in CASES.items()
    }
    folder = tmp_path_factory.mktemp("adapters")
    return (
        run(adapter_cases.several, folder / "two", variants=variants),
        run(adapter_cases.several, folder / "one", world=1, variants=variants)[0],
    )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_on_the_joined_batch(trained, name):
    two, one = trained
    assert_replicas([process[name] for process in two])
    # Everything is float64.
    assert_joined(two[0][name], one[name], tolerance=1e-10)
    without = {key for key, gradient in one[name].items() if key.startswith("gradient") and gradient is None}
    assert all(".first." in key for key in without)
    assert bool(without) == ("stack" in name)


@pytest.mark.parametrize("name", ["houlsby", "nice", "MAD-G", "MAD-G-LS"])
def test_verbs_of_a_sharded_model(tmp_path, name):
    two = run(adapter_cases.verbs, tmp_path / "two", name=name, folder=str(tmp_path))
    (one,) = run(adapter_cases.verbs, tmp_path / "one", world=1, name=name, folder=str(tmp_path))
    expected = load_file(tmp_path / "1-0" / "first" / "adapter_model.safetensors")
    for rank, found in enumerate(two):
        add, merge = found.pop("refused")
        assert_told([add], "ConfigError", "sharded already", "fully_shard")
        assert_told([merge], "ConfigError", "is sharded", "in a single process")
        assert torch.equal(found.pop("still"), found["loaded"])
        assert found.pop("adapters") == ["first"]
        file = load_file(tmp_path / f"2-{rank}" / "first" / "adapter_model.safetensors")
        assert_joined(file, expected, tolerance=1e-10)
        assert torch.equal(found["loaded"], found["trained"])
        assert not torch.allclose(found["zeroed"], found["trained"], atol=1e-2)
        for key in found:
            torch.testing.assert_close(found[key], one[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["nice", "MAD-G", "MAD-G-LS"])
def test_fsdp1_trains_what_stands_in_one_place(tmp_path, name):
    languages = PER_PROCESS if name.startswith("MAD-G") else None
    two = run(adapter_cases.trained_under_fsdp1, tmp_path / "two", name=name, languages=languages)
    if languages is not None:
        assert_told(two, "ConfigError", "part of an FSDP unit", "FSDP2")
        return
    (one,) = run(adapter_cases.trained_under_fsdp1, tmp_path / "one", world=1, name=name, languages=languages)
    assert_replicas(two)
    assert_joined(two[0], one, tolerance=1e-10)


def assert_told(results, kind, *words):
    for name, text in results:
        assert name == kind, text
        for word in words:
            assert word in text
