"""`conflicts` on models and on files."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from transformers import BertModel

from peft_sparse import ConfigError, RandConfig, conflicts, iter_deltas
from tests.support.known_adapters import first, second
from tests.support.models import bert


def model_with(*names: str):
    model = get_peft_model(bert(BertModel, hidden_size=8, intermediate_size=16), config(0), names[0])
    for seed, name in enumerate(names[1:], start=1):
        model.add_adapter(name, config(seed))
    return model


def config(seed: int) -> RandConfig:
    return RandConfig(density=0.3, target_modules="all", init_weights=False, seed=seed)


def test_of_deltas_by_group():
    found = conflicts({"task": first(), "language": second()})
    assert found.adapters == ("task", "language")
    assert list(found.groups) == ["embeddings", "encoder.layer.0", "encoder.layer.1"]
    query = found.groups["encoder.layer.0"]
    assert (query.count, query.shared, query.opposite, query.undone, query.sum_square) == (3, 2, 1, 2.0, 13.0)
    assert found.groups["embeddings"].shared == 0
    assert found.total.cancelled == 2 / 27
    assert found.pairs["task", "language"].share == 0.6


def test_weights_turn_a_delta_round():
    assert conflicts({"a": first(), "b": first()}).total.opposite == 0
    assert conflicts({"a": first(), "b": first()}, weights=[1, -1]).total.cancelled == 1


def test_a_model_and_its_files_say_the_same(tmp_path):
    model = model_with("x", "y", "z")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    found = conflicts(model, ["x", "z"])
    assert found == conflicts({"x": tmp_path / "x", "z": str(tmp_path / "z")})
    assert found.adapters == ("x", "z")
    assert found.total.shared > 0
    assert conflicts(model).adapters == ("x", "y", "z")
    assert list(conflicts(model).pairs) == [("x", "y"), ("x", "z"), ("y", "z")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_sum_has_the_norm_that_was_foretold():
    model = model_with("x", "y")
    found = conflicts(model, weights=[1.0, 0.5])
    model.add_weighted_adapter(["x", "y"], [1.0, 0.5], "both", combination_type="linear")
    square = sum(float(part.values.double().square().sum()) for _, _, _, part in iter_deltas(model, "both"))
    assert found.total.sum_square == pytest.approx(square, rel=1e-6)
    assert found.total.count == sum(part.count for _, _, _, part in iter_deltas(model, "both"))


def test_rich_shows_tables():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(conflicts({"task": first(), "language": second()}, weights=[1, 0.5]))
    text = console.export_text()
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert "task + 0.5 x language, by layer of encoder.layer" in rows
    assert "layer 0 3 2 66.7% 50.0% 20.0% 0.5 1.074" in rows
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("names", [["x"], ["x", "x"], ["x", "nothing"], []])
def test_names_are_checked(names):
    with pytest.raises(ConfigError, match=r"two or more different ones of \['x', 'y'\], got"):
        conflicts(model_with("x", "y"), names)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], "one number per adapter, got 1 for 2"),
        ([1.0, float("nan")], r"finite numbers, got \[1\.0, nan\]"),
        ([1.0, "2"], "finite numbers, got"),
        ([1.0, True], "finite numbers, got"),
        ("12", "a list with one number per adapter, got '12'"),
        (0.5, "a list with one number per adapter, got 0.5"),
    ],
)
def test_weights_are_checked(weights, match):
    with pytest.raises(ConfigError, match=match):
        conflicts({"a": first(), "b": second()}, weights=weights)
