"""`peft-sparse plan`: the table, what fits, JSON, and what is refused."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from peft_sparse import AdaSftConfig, BottleneckConfig, RandConfig, SpielMAConfig, plan_memory
from peft_sparse.cli import app
from peft_sparse.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
LLAMA = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    LLAMA.save_pretrained(folder)
    return folder


def run(folder, *arguments: str):
    return CliRunner().invoke(app, ["plan", str(folder), "--sequence-length", "8", *arguments])


def test_the_command_prints_a_table(folder):
    result = run(folder, "--method", "lottery_ticket", "--density", "0.1", "--target-modules", "all")
    assert result.exit_code == 0, result.output
    for text in ("dense phase", "sparse phase", "base weights", "optimizer states", "in all", "copy of the weights"):
        assert text in result.output


def test_the_command_says_what_fits(folder):
    fits = run(folder, "--gpu", "1GB")
    assert "It fits" in fits.output
    assert "The largest density of rand that fits: 1" in fits.output
    full, rand = (
        plan_memory(folder, config, sequence_length=8, batch_size=2).peak for config in (None, RandConfig(density=0.01))
    )
    assert rand < full
    tight = run(folder, "--method", "full", "--gpu", f"{(full + rand) // 2}B", "--batch-size", "2")
    assert "It does not fit" in tight.output
    assert "Other methods that fit: " in tight.output
    assert "rand (" in tight.output
    assert "--gradient-checkpointing" in tight.output
    # Full fine-tuning trains the weights themselves.
    assert "--load-in-4bit" not in tight.output
    for method, offered in (("lottery_ticket", False), ("ada_sft", False), ("spiel_ma", True), ("lora", True)):
        assert ("--load-in-4bit" in run(folder, "--method", method, "--gpu", "1kB").output) is offered, method


def test_the_command_gives_json(folder):
    result = run(folder, "--method", "spiel_ma", "--density", "0.1", "--gpu", "1MB", "--json")
    found = json.loads(result.stdout)
    plan = plan_memory(folder, SpielMAConfig(density=0.1), sequence_length=8)
    assert found["fits"] is True
    assert found["largest_density"] == 1.0
    assert {key: found[key] for key in plan.to_dict()} == plan.to_dict()


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--method", "bottleneck", "--bottleneck-size", "3"], BottleneckConfig(bottleneck_size=3)),
        (
            ["--method", "ada_sft", "--target-modules", "q_proj,v_proj"],
            AdaSftConfig(target_modules=["q_proj", "v_proj"]),
        ),
    ],
)
def test_the_command_plans_methods_without_a_density(folder, arguments, config):
    result = run(folder, *arguments, "--gradient-checkpointing", "--json")
    plan = plan_memory(folder, config, sequence_length=8, gradient_checkpointing=True)
    assert json.loads(result.stdout) == plan.to_dict()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--method", "magic"], r"--method must be one of \[.*'full'.*'spiel_ag'.*\], got 'magic'"),
        (["--gpu", "24 apples"], "--gpu must be a size such as 24GB, 500MB or 80GiB, got '24 apples'"),
        (["--density", "3"], r"density must be in \(0, 1\]"),
        (
            ["--method", "bottleneck", "--target-modules", "mlp"],
            "--target-modules means nothing to --method bottleneck",
        ),
        (["--method", "full", "--density", "0.1"], r"--density means nothing to --method full\."),
        (["--method", "lora", "--density", "0.1"], "--density means .* lora, which takes --rank and --target-modules"),
        (["--method", "ada-sft", "--density", "0.1"], "--density means nothing to --method ada_sft"),
        (["--rank", "4"], "--rank means nothing to --method rand, which takes --density and --target-modules"),
    ],
)
def test_the_command_refuses(folder, arguments, match):
    result = run(folder, *arguments)
    assert result.exit_code == 1
    with pytest.raises(ConfigError, match=match):
        raise result.exception


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["/no/such/folder"], "there is no folder '/no/such/folder'"),
        (["no/such-model"], r"^'no/such-model' has no config of a transformers model: [^\n]*$"),
        (["x", "--method", "lotery-ticket"], "--method must be one of .* Did you mean 'lottery_ticket'"),
        (["x", "--method", "lora", "--rank", "0"], "--rank must be a whole number >= 1, got 0"),
        (["x", "--gpu", "24"], "--gpu must be a size such as 24GB, 500MB or 80GiB, got '24'"),
        (["x", "--dtype", "float17"], r"dtype must be one of .*got 'float17'\. Did you mean 'float16'"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, match):
    result = CliRunner().invoke(app, ["plan", *arguments])
    with pytest.raises(ConfigError, match=match):
        raise result.exception
