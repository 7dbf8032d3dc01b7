"""`peft-sparse shrink`: what the command hands on, prints and refuses."""

from __future__ import annotations

import json
import random

import pytest
from peft import get_peft_model
from transformers import AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from peft_sparse import RandConfig
from peft_sparse.cli import app
from peft_sparse.errors import ConfigError, FormatError
from tests.support.tokenizers import fast, make_bert, random_texts, word_piece


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shrink"), random.Random(3)
    tokenizer = fast(word_piece(rng))
    model = make_bert(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = RandConfig(num_weights=300, init_weights=False, target_modules=["word_embeddings", "query"])
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    (folder / "ind.txt").write_text("\n".join(random_texts(rng, 40)), encoding="utf-8")
    (folder / "jav.jsonl").write_text(json.dumps({"text": "abab cdc", "label": 3}), encoding="utf-8")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["shrink", *map(str, arguments)])


def test_it_shrinks_and_says_how_much(folder, tmp_path):
    out = tmp_path / "out"
    result = run(
        folder / "model", "--texts", folder / "ind.txt", f"min={folder / 'jav.jsonl'}", "--layers", 2, "-o", out
    )
    assert result.exit_code == 0, result.output
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForMaskedLM.from_pretrained(folder / "model")
    said = " ".join(result.output.split())
    assert f"Tokens: {before.config.vocab_size} -> {len(tokenizer)} Layers: 4 -> 2" in said
    assert f"Parameters: {before.num_parameters():,} -> {model.num_parameters():,}" in said
    assert "ind: 100.0% of " in result.output
    assert "min: 100.0% of 1 texts tokenised as before" in result.output
    assert len(tokenizer) == model.config.vocab_size < before.config.vocab_size


def test_what_another_model_left_is_not_read_with_it(folder, tmp_path):
    for name in ("chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "mine.txt"):
        (tmp_path / name).write_text("old")
    result = run(folder / "model", "--texts", folder / "ind.txt", "-o", tmp_path, "--overwrite")
    assert result.exit_code == 0, result.output
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    names = {path.name for path in tmp_path.iterdir()}
    assert {"mine.txt", "model.safetensors"} <= names
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"} & names


def test_a_file_that_is_named_twice_is_counted_once(folder, tmp_path):
    texts, link = folder / "ind.txt", tmp_path / "ind.txt"
    link.symlink_to(texts)
    once = run(folder / "model", "--min-count", 2, "--texts", f"ind={texts}", "-o", tmp_path / "once")
    twice = run(folder / "model", "--min-count", 2, "--texts", f"ind={texts}", f"ind={link}", "-o", tmp_path / "twice")
    assert (once.exit_code, twice.exit_code) == (0, 0), twice.output
    sizes = {len(AutoTokenizer.from_pretrained(tmp_path / name)) for name in ("once", "twice")}
    everything = run(folder / "model", "--texts", texts, "-o", tmp_path / "all")
    assert everything.exit_code == 0
    assert len(sizes) == 1
    assert sizes.pop() < len(AutoTokenizer.from_pretrained(tmp_path / "all")), "the texts tell nothing"


def test_an_adapter_follows(folder, tmp_path):
    assert run(folder / "model", "--texts", folder / "jav.jsonl", "-o", tmp_path / "small").exit_code == 0
    result = run(folder / "adapter", "--like", tmp_path / "small", "-o", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "bert.embeddings.word_embeddings.weight: " in result.output
    assert "of tokens that went are lost" in result.output


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ([], ConfigError, "give --texts FILE... to shrink a model, or --like MODEL"),
        (["--texts", "nowhere.txt"], ConfigError, "there is no file 'nowhere.txt' of texts"),
        (["--texts", "{}/empty.txt"], ConfigError, "holds no text"),
        (["--texts", "{}/ind.txt", "{}/other/ind.txt"], ConfigError, "are both called 'ind'"),
        (["--texts", "{}/broken.jsonl"], FormatError, "line 1 is no JSON"),
        (["--texts", "{}/BROKEN.JSONL"], FormatError, "line 1 is no JSON"),
        (["--texts", "{}/table.csv"], ConfigError, "table.csv. Write it as JSONL"),
        (["--texts", "{}/jav.jsonl", "--layers", "3"], ConfigError, "stride must divide the 4 layers"),
        (["--texts", "{}/jav.jsonl", "--min-count", "0"], ConfigError, "min_count must be a whole number >= 1"),
    ],
)
def test_it_refuses_and_writes_nothing(folder, tmp_path, arguments, error, match):
    (folder / "empty.txt").write_text("\n \n")
    for name in ("broken.jsonl", "BROKEN.JSONL", "table.csv"):
        (folder / name).write_text("{")
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "ind.txt").write_text("abab\n")
    result = run(folder / "model", *(one.format(folder) for one in arguments), "-o", tmp_path / "out")
    assert isinstance(result.exception, error)
    assert match in str(result.exception)
    assert list(tmp_path.iterdir()) == []
