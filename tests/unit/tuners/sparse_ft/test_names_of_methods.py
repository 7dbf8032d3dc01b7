"""What people call methods: papers' names are taken, and names of other things are answered with what is meant."""

from __future__ import annotations

import pytest

from peft_sparse import ConfigError, LotteryTicketConfig, RandConfig, SparseConfig


@pytest.mark.parametrize(
    ("given", "config"), [("LT-SFT", LotteryTicketConfig), ("lt_sft", LotteryTicketConfig), ("Rand-SFT", RandConfig)]
)
def test_names_of_papers_are_methods(given, config):
    made = SparseConfig(method=given, density=0.1)
    assert type(made) is config
    assert made.method == config(density=0.1).method


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("fisher", "'fisher' is a criterion: method='one_shot', criterion='fisher'"),
        ("Largest-Weight", "'largest_weight' is a criterion: method='one_shot', criterion='largest_weight'"),
        ("SpIEL", "SpIEL is 'spiel_ag' or 'spiel_ma'"),
        ("MAD-X", "MAD-X are bottleneck adapters: BottleneckConfig"),
        ("random", "Did you mean 'rand'?"),
    ],
)
def test_names_of_other_things_are_answered(given, meant):
    with pytest.raises(ConfigError, match=f"method must be one of .*got '{given}'. ") as error:
        SparseConfig(method=given, density=0.1)
    assert meant in str(error.value)
