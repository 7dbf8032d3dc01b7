"""The table of what PEFT's suite skips over us: every entry says why, and the harness notices entries that lie."""

from __future__ import annotations

import re

import pytest

from tests.conformance.peft_suite import deselected
from tests.conformance.peft_suite.plugin import Ledger, our_values, translated

TABLES = ("NOT_OURS", "EXPECTED_FAILURES", "SKIPS")


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_has_a_pattern_and_a_reason(table):
    for pattern, entry in getattr(deselected, table).items():
        re.compile(pattern)
        reason = entry.why if table == "EXPECTED_FAILURES" else entry
        assert len(reason) > 10, pattern


def test_files_are_either_run_or_explained():
    assert not set(deselected.FILES) & set(deselected.RUN_FILES)
    assert all(len(reason) > 10 for reason in deselected.FILES.values())


def test_entries_that_match_nothing_are_reported(monkeypatch):
    for table in TABLES:
        monkeypatch.setattr(deselected, table, {})
    monkeypatch.setattr(deselected, "NOT_OURS", {"used.*": "a reason", "gone": "a test that PEFT dropped"})
    ledger = Ledger()
    assert ledger.look_up("NOT_OURS", "used_by_this") == "a reason"
    assert ledger.look_up("NOT_OURS", "another") is None
    assert ledger.unused() == ["deselected.NOT_OURS: 'gone' matches no test"]


def test_parameters_are_ours_and_other_tuners_rows_are_left_out():
    from peft import IA3Config, LoraConfig

    from peft_sparse import AdaSftConfig, BottleneckConfig, RandConfig, SparseConfig

    lora = LoraConfig(target_modules=["a"], r=3, init_lora_weights=False)
    rows = translated([("x", lora), ("y", IA3Config()), ("z", LoraConfig(use_dora=True))])
    assert [row[0] for row in rows] == ["x"]
    assert type(rows[0][1]) is RandConfig
    assert (rows[0][1].target_modules, rows[0][1].init_weights) == ({"a"}, False)
    assert translated([1, 2]) is None
    values = our_values("test_decoder_models::T::t", ["config_cls", "config_kwargs"], [])
    assert values
    ours = (SparseConfig, AdaSftConfig, BottleneckConfig)
    assert all(issubclass(cls, ours) and fields["task_type"] == "CAUSAL_LM" for cls, fields in values)
