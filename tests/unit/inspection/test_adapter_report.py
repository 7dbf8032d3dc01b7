"""The report of an adapter against numbers worked out by hand, its JSON and its tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console

from peft_sparse import ConfigError, inspect_adapter
from peft_sparse.core.delta import SparseDelta
from peft_sparse.inspection.reading import Adapter, read_adapters
from peft_sparse.inspection.report import (
    BudgetShare,
    Tally,
    budget_shares,
    document,
    layer_groups,
    pairwise,
    report_on,
    value_statistics,
)
from peft_sparse.inspection.sheets import report_sheets
from peft_sparse.tables import to_rich
from tests.support.known_adapters import DENSE, NORM, QUERY, WORDS, first, save, second


def test_groups_and_parts():
    groups = layer_groups({**first(), NORM: second()[NORM]})
    assert [(group.name, group.stack, group.layer) for group in groups] == [
        ("embeddings", "", None),
        ("encoder.layer.0", "encoder.layer", 0),
        ("encoder.layer.1", "encoder.layer", 1),
    ]
    assert [dict(group.parts) for group in groups] == [
        {"embeddings": Tally(3, 12)},
        {"attention": Tally(2, 4)},
        {"feed-forward": Tally(1, 8), "norm": Tally(1, 2)},
    ]
    assert [group.norm for group in groups] == pytest.approx([5, 5**0.5, 144.25**0.5])
    assert groups[2].all == Tally(2, 10)
    assert groups[2].all.density == 0.2
    assert Tally().density is None


def test_report(tmp_path):
    heads = {"classifier.weight": torch.zeros(3, 2)}
    folder = save(tmp_path / "task", first(), heads=heads, method="lottery_ticket", l1=0.0, revision="abc")
    report = inspect_adapter(folder)
    assert report.total == Tally(6, 24)
    assert report.parts == {"embeddings": Tally(3, 12), "attention": Tally(2, 4), "feed-forward": Tally(1, 8)}
    assert report.tensors == 3
    assert (report.method, report.base_model, report.revision) == ("lottery_ticket", "some-lab/tiny-bert", "abc")
    assert report.request == {"density": 0.25, "density_of": "targets"}
    assert report.budget == "global"
    assert report.bytes_per_weight == (report.file_bytes - 24) / 6
    assert report.values.norm == 5.5
    assert report.values.zeros == 1 / 6
    assert report.values.dtype == "float32"
    assert report.values.quantiles == {0: 0, 0.05: 0.125, 0.25: 0.625, 0.5: 1.5, 0.75: 2.75, 0.95: 3.75, 1: 4}
    assert "l1" not in report.settings
    assert report.settings["values_dtype"] == "float32"


def test_a_seed_of_zero_is_told(tmp_path):
    assert inspect_adapter(save(tmp_path / "rand", first(), method="rand", seed=0)).settings["seed"] == 0


def test_values_of_several_dtypes_and_of_none():
    mixed = {QUERY: first()[QUERY], WORDS: SparseDelta(torch.tensor([0]), torch.tensor([1.0]).bfloat16(), (4, 3))}
    assert value_statistics(mixed).dtype == "bfloat16+float32"
    empty = value_statistics({QUERY: SparseDelta.empty((2, 2))})
    assert (empty.dtype, empty.norm, empty.zeros, dict(empty.quantiles)) == ("", 0.0, None, {})


def test_budget_shares():
    found = budget_shares({r"embeddings": 0.6, r"layer\.\d": 0.4}, first())
    assert found == (
        BudgetShare("embeddings", 0.6, Tally(3, 12)),
        BudgetShare(r"layer\.\d", 0.4, Tally(3, 12)),
    )
    assert budget_shares("global", first()) == ()
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        budget_shares({"(": 1.0}, first())


def keys(value: Any) -> Any:
    """The keys of a JSON document, without its values."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value] if isinstance(value, list) else None


TALLY = dict.fromkeys(("count", "numel", "density"))


def test_json(tmp_path):
    budget = {"embeddings": 0.5, "encoder": 0.5}
    heads = {"classifier.bias": torch.zeros(3)}
    folders = [
        save(tmp_path / "task", first(), heads=heads, budget=budget, method="lottery_ticket"),
        save(tmp_path / "language", second()),
    ]
    read = read_adapters(folders)
    text = json.dumps(document([report_on(adapter) for adapter in read], pairwise(read)), allow_nan=False)
    made = json.loads(text)
    assert made["format"] == 1
    task = made["adapters"][0]
    part = {"share": None, **TALLY}
    assert keys({key: task[key] for key in task if key not in ("provenance", "budget")}) == {
        "name": None,
        "source": None,
        "request": {"density": None, "density_of": None},
        "budget_shares": [{"pattern": None, "asked": None, **part}] * 2,
        "total": {"tensors": None, **TALLY},
        "groups": [
            {"name": None, "stack": None, "layer": None, "norm": None, **part, "parts": {name: TALLY}}
            for name in ("embeddings", "attention", "feed-forward")
        ],
        "parts": {"embeddings": part, "attention": part, "feed-forward": part},
        "values": {
            "dtype": None,
            "norm": None,
            "zeros": None,
            "quantiles": dict.fromkeys(("0", "0.05", "0.25", "0.5", "0.75", "0.95", "1")),
        },
        "heads": [{"name": None, "shape": [None], "dtype": None, "bytes": None}],
        "file": {"bytes": None, "bytes_per_weight": None},
    }
    assert task["budget"] == budget
    assert task["budget_shares"][0] == {
        "pattern": "embeddings",
        "asked": 0.5,
        "share": 0.5,
        "count": 3,
        "numel": 12,
        "density": 0.25,
    }
    assert set(task["provenance"]) == {"method", "base_model", "revision", "peft_version", "digest", "settings"}
    assert task["groups"][1]["share"] == 2 / 6
    assert made["pairs"] == [
        {
            "adapters": ["task", "language"],
            "tensors": 2,
            "shared": 3,
            "overlap": 0.6,
            "chance": 0.325,
            "jaccard": 0.375,
            "opposite": 1,
            "opposite_share": 1 / 3,
            "cosine": pytest.approx(1.25 / (5.5 * 150.25**0.5)),
        }
    ]


def shown(parts, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(parts)
    return console.export_text()


def test_tables_fit_into_eighty_columns(tmp_path):
    folders = [
        save(tmp_path / "task", first(), budget={"embeddings": 0.5, "encoder": 0.5}, method="lottery_ticket"),
        save(tmp_path / "language", second(), heads={"classifier.bias": torch.zeros(3)}),
    ]
    read = read_adapters(folders)
    text = shown(to_rich(report_sheets([report_on(adapter) for adapter in read], pairwise(read))))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {" ".join(line.split()) for line in lines}
    assert "layer 0 2 2 50.0% 33.3% █████▍" in rows
    assert "embeddings 3 25.0% 50.0% ████████" in rows
    assert "all 6 24 25.0% 100%" in rows
    assert "task and language 3 60.0% 32.5% 37.5% 33.3% +0.019" in rows
    assert "encoder 50.0% 50.0% 3 25.0%" in rows
    assert "classifier.bias 3 float32 12" in rows


def test_markup_in_names_is_text():
    adapter = Adapter("a[/b]", "[red]", {"method": "rand", "base_model_name_or_path": "[bold]x"}, first())
    text = shown(to_rich(report_sheets([report_on(adapter)], {})))
    assert "a[/b]" in text
    assert "[red]" in text
    assert "[bold]x" in text


def test_several_stacks_keep_their_names():
    t5 = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": first()[QUERY],
        "decoder.block.0.layer.0.SelfAttention.q.weight": second()[QUERY],
    }
    text = shown(to_rich(report_sheets([report_on(Adapter("t5", "", {}, t5))], {})))
    assert text.index("encoder.block.0") < text.index("decoder.block.0")


def test_adapters_without_a_common_tensor_are_told_so():
    adapters = [Adapter("one", "", {}, {QUERY: first()[QUERY]}), Adapter("two", "", {}, {DENSE: first()[DENSE]})]
    text = " ".join(shown(to_rich(report_sheets([], pairwise(adapters)))).split())
    assert "No tensor in common (one and two): tuned through different model classes?" in text
