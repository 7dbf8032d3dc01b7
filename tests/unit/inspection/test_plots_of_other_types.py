"""Adapters of other types in pictures: how their change, or the norm of their tensors, is spread over the layers."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BertModel
from typer.testing import CliRunner

from peft_sparse import BottleneckConfig, ConfigError, FormatError, merge_checkpoint, plot_adapters
from peft_sparse.cli import app
from tests.support.known_adapters import first, save
from tests.support.models import bert


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: folder} of a LoRA adapter, a bottleneck adapter and a sparse one; and the LoRA model."""
    folders, models = {}, {}
    for name, config in {
        "lora": LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False),
        "headed": LoraConfig(
            r=2, target_modules=["query", "value"], init_lora_weights=False, modules_to_save=["pooler"]
        ),
        "bottleneck": BottleneckConfig(reduction_factor=2),
    }.items():
        model = get_peft_model(bert(BertModel), config)
        folders[name], models[name] = tmp_path_factory.mktemp(name) / name, model
        model.save_pretrained(folders[name])
    folders["sparse"] = save(tmp_path_factory.mktemp("sparse") / "sparse", first())
    return folders, models


def heights(axes) -> dict[str, float]:
    """{layer: height of its bars together}."""
    ticks = {
        round(float(tick), 3): label.get_text()
        for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }
    found: dict[str, float] = {}
    for bar in axes.patches:
        name = ticks[round(bar.get_x() + bar.get_width() / 2, 3)]
        found[name] = found.get(name, 0) + bar.get_height()
    return found


@pytest.mark.parametrize("name", ["lora", "headed"])
def test_bars_of_a_lora_adapter_are_its_change(saved, name):
    folders, models = saved
    layers = {n: m for n, m in models[name].named_modules() if hasattr(m, "get_delta_weight")}
    squares = {
        str(number): sum(
            float(m.get_delta_weight("default").double().square().sum())
            for n, m in layers.items()
            if f"layer.{number}." in n
        )
        for number in range(2)
    }
    (axes,) = plot_adapters([folders[name]]).axes
    assert axes.get_ylabel() == "share of its squared change"
    total = sum(squares.values())
    assert heights(axes) == pytest.approx({name: square / total for name, square in squares.items()}, rel=1e-5)


def test_bars_of_a_bottleneck_adapter_are_its_tensors(saved):
    folders, models = saved
    squares = {"0": 0.0, "1": 0.0}
    for name, parameter in models["bottleneck"].named_parameters():
        if parameter.requires_grad:
            squares[name.partition("layer.")[2][0]] += float(parameter.detach().double().square().sum())
    (axes,) = plot_adapters([folders["bottleneck"]]).axes
    assert axes.get_ylabel() == "share of its tensors' squared norm"
    total = sum(squares.values())
    assert heights(axes) == pytest.approx({name: square / total for name, square in squares.items()}, rel=1e-5)


def test_other_types_beside_sparse_ones(saved, tmp_path):
    folders, _ = saved
    figure = plot_adapters([folders["lora"], folders["sparse"]])
    assert [ax.get_title(loc="left").strip() for ax in figure.axes][:2] == ["lora", "sparse"]
    with pytest.raises(ConfigError, match="kind 'overlap' is of sparse adapters, and 'lora' is of type LORA"):
        plot_adapters([folders["lora"], folders["sparse"]], kind="overlap")
    output = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["plot", *map(str, folders.values()), "-o", str(output)])
    assert result.exit_code == 0, result.output
    text = output.read_text(encoding="utf-8")
    assert all(name in text for name in ("BOTTLENECK", "LORA", "squared change"))


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [("lora", r"peft-sparse diff BASE .*lora -o OUTPUT"), ("bottleneck", "computes beside the weights")],
)
def test_merging_on_disk_names_the_way_out(saved, tmp_path, kind, way_out):
    folders, models = saved
    models[kind].get_base_model().config.save_pretrained(tmp_path / "base")
    with pytest.raises(FormatError, match=rf"is no sparse adapter: .* peft_type '{kind.upper()}'.*{way_out}"):
        merge_checkpoint(tmp_path / "base", [folders[kind]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
