"""Several processes train right or say why they cannot; none trains something else in silence."""

from __future__ import annotations

import pytest
import torch

from tests.support import processes
from tests.support.distributed import refusals as cases
from tests.support.processes import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def assert_told(results, kind, *words):
    for name, text in results:
        assert name == kind
        for word in words:
            assert word in text


def test_parameters_that_only_some_batches_reach(tmp_path):
    one, two = run(cases.unused_parameters, tmp_path)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_shared_process_group_would_mix_our_collectives_with_those_of_ddp(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TIMEOUT", 12)
    with pytest.raises(AssertionError, match=r"did not end|Error"):
        run(cases.unused_parameters, tmp_path, in_own_group=False)


def test_layers_that_one_process_leaves_out(tmp_path):
    assert_told(run(cases.skipped_layer, tmp_path), "SelectionError", "do not agree", "drop layers")


def test_gradients_that_nobody_averages(tmp_path):
    assert_told(run(cases.no_wrapper, tmp_path), "SelectionError", "the tuned weights after update", "DDP")


def test_weights_cannot_move_between_tensors(tmp_path):
    assert_told(run(cases.global_budget, tmp_path), "ConfigError", "budget='global'", "budget='uniform'")


def test_fsdp1_flattens_what_would_have_to_move(tmp_path):
    assert_told(run(cases.fsdp1, tmp_path), "ConfigError", "part of an FSDP unit", "FSDP2")


def test_phases_refuse_a_wrapper_that_was_made_before_them(tmp_path):
    for results in run(cases.wrapped_too_early, tmp_path):
        assert_told(results, "ConfigError", "DistributedDataParallel", "model.module")


def test_ddp_broadcasts_buffers_of_the_model_but_no_supports(tmp_path):
    for found in run(cases.ignored_by_ddp, tmp_path):
        assert "base_model.model.mine" in found["broadcast"]
        assert not [name for name in found["broadcast"] if "sparse_ft" in name]
        assert found["mine"] == 0
        assert found["unchanged"]


def test_a_sharded_model_saves_loads_and_switches_but_does_not_merge(tmp_path):
    for rank, found in enumerate(run(cases.fsdp_verbs, tmp_path, folder=str(tmp_path))):
        assert torch.equal(found["after"], found["before"])
        assert found["gathered"]
        assert not torch.allclose(found["disabled"], found["before"], atol=1e-4)
        assert torch.equal(found["zeroed"], found["disabled"])
        assert torch.equal(found["loaded"], found["before"])
        assert_told(found["merge"], "ConfigError", "bert.encoder.layer.0", "DTensor", "in a single process")
        assert_told([found["add"]], "NotInThisStateError", "sharded already", "fully_shard")
        assert_told([found["resize"]], "ConfigError", "keep their number")
        for rank_of_other in (0, 1):
            before = (tmp_path / str(rank_of_other) / "before" / "adapter_model.safetensors").read_bytes()
            assert (tmp_path / str(rank) / "after" / "adapter_model.safetensors").read_bytes() == before


def test_an_adapter_comes_before_the_shards(tmp_path):
    assert_told(run(cases.sharded_before_the_adapter, tmp_path), "NotInThisStateError", "sharded already")


def test_a_dense_phase_needs_whole_weights(tmp_path):
    assert_told(run(cases.dense_phase_of_shards, tmp_path), "ConfigError", "DTensor", "whole weights")
