"""SC-SFT's budgets at any depth, and budgets measured from counts."""

from __future__ import annotations

import logging

import pytest

from peft_sparse.errors import ConfigError
from peft_sparse.selection.budget import groups_of
from peft_sparse.selection.layer_budgets import LAYER_BUDGETS, measured_shares, zones_of


def bert(layers: int, *, embeddings: bool = True) -> dict[str, int]:
    """Sizes of a model of 10,000 weights a tensor: two tensors a layer, embeddings and a pooler."""
    inside = ["attention.self.query.weight", "output.dense.weight"]
    names = [f"bert.encoder.layer.{i}.{name}" for i in range(layers) for name in inside]
    if embeddings:
        names = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.bias", *names]
    return dict.fromkeys([*names, "bert.pooler.dense.weight"], 10_000)


def t5(encoder: int, decoder: int) -> dict[str, int]:
    names = [f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(encoder)]
    names += [f"decoder.block.{i}.layer.1.EncDecAttention.q.weight" for i in range(decoder)]
    return dict.fromkeys(["shared.weight", *names, "decoder.final_layer_norm.weight"], 10_000)


def layers_in(names: tuple[str, ...]) -> list[str]:
    return sorted({name.split(".layer.")[1].split(".")[0] for name in names if ".layer." in name}, key=int)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("sc_sft_nli", {"embeddings": 20, "the layers below": 940, "second-to-last layer": 20, "last layer": 20}),
        ("sc_sft_sentiment", {"embeddings": 5, "the layers below": 955, "second-to-last layer": 20, "last layer": 20}),
        ("sc_sft_mlm", {"embeddings + second-to-last layer + last layer": 600, "the layers below": 400}),
    ],
)
def test_the_papers_shares_at_twelve_layers(budget, expected):
    sizes = bert(12)
    groups = groups_of(budget, 1000, sizes)
    assert {group.name: group.count for group in groups} == expected
    assert sorted(name for group in groups for name in group.members) == sorted(sizes)
    members = {group.name: group.members for group in groups}
    assert layers_in(members["the layers below"]) == [str(i) for i in range(10)]
    if budget != "sc_sft_mlm":
        assert layers_in(members["second-to-last layer"]) == ["10"]
        assert layers_in(members["last layer"]) == ["11"]
        assert "bert.pooler.dense.weight" in members["last layer"]
        assert members["embeddings"] == ("bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.bias")


@pytest.mark.parametrize(
    ("layers", "below", "second", "last"),
    [
        (3, ["0"], ["1"], ["2"]),
        (6, ["0", "1", "2", "3"], ["4"], ["5"]),
        (17, [str(i) for i in range(15)], ["15"], ["16"]),
        (18, [str(i) for i in range(14)], ["14", "15"], ["16", "17"]),  # 18 / 12 = 1.5, rounded up
        (24, [str(i) for i in range(20)], ["20", "21"], ["22", "23"]),
        (30, [str(i) for i in range(24)], ["24", "25", "26"], ["27", "28", "29"]),
    ],
)
def test_groups_grow_with_depth(layers, below, second, last):
    zones = {zone.name: layers_in(zone.members) for zone in zones_of("sc_sft_nli", bert(layers))}
    assert zones == {
        "embeddings": [],
        "the layers below": below,
        "second-to-last layer": second,
        "last layer": last,
    }


def test_each_stack_counts_by_its_own_depth():
    zones = {zone.name: zone.members for zone in zones_of("sc_sft_nli", t5(24, 3))}
    assert zones["embeddings"] == ("shared.weight",)
    assert zones["last layer"] == (
        "encoder.block.22.layer.0.SelfAttention.q.weight",
        "encoder.block.23.layer.0.SelfAttention.q.weight",
        "decoder.block.2.layer.1.EncDecAttention.q.weight",
        "decoder.final_layer_norm.weight",
    )
    assert [name.split(".layer")[0] for name in zones["second-to-last layer"]] == [
        "encoder.block.20",
        "encoder.block.21",
        "decoder.block.1",
    ]


def test_an_empty_group_leaves_its_share_to_the_others_in_proportion(caplog):
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        groups = groups_of("sc_sft_nli", 9800, bert(12, embeddings=False))
    assert {g.name: g.count for g in groups} == {
        "the layers below": 9400,
        "second-to-last layer": 200,
        "last layer": 200,
    }
    assert "no parameter of embeddings is targeted, so its share of 0.02 goes to the other groups" in caplog.text


def test_mlm_keeps_its_joint_group_without_embeddings(caplog):
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        groups = groups_of("sc_sft_mlm", 1000, bert(12, embeddings=False))
    assert [group.count for group in groups] == [600, 400]
    assert caplog.text == ""


def test_too_few_layers():
    with pytest.raises(
        ConfigError, match=r"'sc_sft_nli' needs at least 3 layers in every stack, .* 2 in 'bert.encoder"
    ):
        zones_of("sc_sft_nli", bert(2))
    with pytest.raises(ConfigError, match=r"only 2 in 'decoder\.block'.* or leave that stack out with exclude_modules"):
        zones_of("sc_sft_mlm", t5(12, 2))
    with pytest.raises(ConfigError, match=r"no targeted parameter has a number in its path.*budget=\{regex: share\}"):
        zones_of("sc_sft_nli", ["lin.weight"])


def test_a_group_that_cannot_hold_its_share():
    with pytest.raises(
        ConfigError, match=r"group 'the layers below' holds 20000 weights, but its share 0\.94 of 40000"
    ):
        groups_of("sc_sft_nli", 40_000, bert(3))


@pytest.mark.parametrize("budget", LAYER_BUDGETS)
def test_shares_sum_to_one(budget):
    assert sum(zone.share for zone in zones_of(budget, bert(12))) == 1
    assert sum(zone.share for zone in zones_of(budget, bert(12, embeddings=False))) == 1


def test_measured_shares_name_each_layer_and_match_nothing_else():
    counts = dict.fromkeys(bert(12), 0)
    counts["bert.embeddings.word_embeddings.weight"] = 6
    counts["bert.encoder.layer.1.output.dense.weight"] = 3
    counts["bert.encoder.layer.11.attention.self.query.weight"] = 1
    shares = measured_shares(counts)
    assert list(shares)[2] == r"^bert\.encoder\.layer\.1\."
    assert list(shares)[11] == r"^bert\.encoder\.layer\.10\."
    assert shares == {
        r"^(?:bert\.embeddings\.LayerNorm\.|bert\.embeddings\.word_embeddings\.)[^.]+$": 0.6,
        **{rf"^bert\.encoder\.layer\.{i}\.": {1: 0.3, 11: 0.1}.get(i, 0.0) for i in range(12)},
        r"^(?:bert\.pooler\.dense\.)[^.]+$": 0.0,
    }
    sizes = bert(12)
    groups = {group.name: group.count for group in groups_of(shares, 20, sizes)}
    assert [groups[pattern] for pattern in shares] == [round(20 * share) for share in shares.values()]
    # Another bias of a module that was measured goes with it; another module belongs to no group.
    assert groups_of(shares, 20, {**sizes, "bert.pooler.dense.bias": 4})
    with pytest.raises(ConfigError, match=r"parameter 'bert.pooler.norm.weight' matches none"):
        groups_of(shares, 20, {**sizes, "bert.pooler.norm.weight": 4})


def test_nothing_to_measure():
    with pytest.raises(ConfigError, match="the adapter tunes no weight, so it shows no distribution over layers"):
        measured_shares({"layer.0.weight": 0})
