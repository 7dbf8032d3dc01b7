"""`peft-sparse translate`: what the command hands on, prints and refuses; stopped, it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartForConditionalGeneration
from typer.testing import CliRunner

from peft_sparse import RandConfig, add_language_code, translate_rows
from peft_sparse.cli import app
from peft_sparse.errors import ConfigError, FormatError
from peft_sparse.training.languages.translate_file import read_rows
from tests.support import translators as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translate")
    model = tiny.made("bart")
    # A model's own limits, which a random one reaches.
    model.generation_config.max_length = None
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    config = RandConfig(density=0.3, init_weights=False, target_modules="all")
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "sparse_ft" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    tuned.save_pretrained(folder / "adapter")
    lines = "".join(json.dumps(row) + "\n" for row in tiny.rows())
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "lines.txt").write_text("w1 w2 w3\r\n\nw4 w5\n", encoding="utf-8")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["translate", *map(str, arguments)])


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(folder, tmp_path, *, adapter: bool = False, **settings) -> list[dict]:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter")
    given = {"fields": ["text"], "max_length": 8, **settings}
    words = AutoTokenizer.from_pretrained(folder / "model")
    return translate_rows(tiny.rows(), model, words, tmp_path / "by hand.jsonl", **given).rows


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL", "rows.Json", "rows.ndjson"])
def test_the_kind_of_a_file_is_its_suffix_in_any_case(tmp_path, name):
    (tmp_path / name).write_text('{"text": "w1", "label": 1}\n')
    assert read_rows(tmp_path / name) == [{"text": "w1", "label": 1}]
    # Corpora are called by their language.
    for text in ("corpus.ace", "corpus.TXT", "corpus"):
        (tmp_path / text).write_text("w1\n")
        assert read_rows(tmp_path / text) == [{"text": "w1"}]


def test_it_writes_what_the_model_says(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    result = run(
        folder / "rows.jsonl", folder / "model", "-o", out, "--target", "ace_Latn", "--max-length", 8, "--beams", 2
    )
    assert result.exit_code == 0, result.output
    assert written(out) == expected(folder, tmp_path, target="ace_Latn", generation={"num_beams": 2})
    assert f"Translated 7 rows; 0 texts and 7 translations were cut at 8 subwords: {out}" in result.output
    again = run(
        folder / "rows.jsonl", folder / "model", "-o", out, "--target", "ace_Latn", "--max-length", 8, "--beams", 2
    )
    assert "Translated 7 rows (7 of them by an earlier run)" in again.output


def test_an_adapter_takes_part_and_lines_are_rows(folder, tmp_path):
    result = run(
        folder / "rows.jsonl", folder / "model", "-o", tmp_path / "out.jsonl", "--adapter", folder / "adapter",
        "--max-length", 8, "--batch-size", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with_adapter = expected(folder, tmp_path, adapter=True, batch_size=3)
    assert written(tmp_path / "out.jsonl") == with_adapter
    (tmp_path / "by hand.jsonl").unlink()
    (tmp_path / ".by hand.jsonl.settings").unlink()
    assert with_adapter != expected(folder, tmp_path, batch_size=3)
    result = run(
        folder / "lines.txt", folder / "model", "-o", tmp_path / "lines.jsonl", "--max-length", 8, "--limit", 1
    )
    assert result.exit_code == 0, result.output
    (row,) = written(tmp_path / "lines.jsonl")
    assert set(row) == {"text"}
    assert row["text"] != "w1 w2 w3"


def test_stopped_it_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    arguments = (folder / "rows.jsonl", folder / "model", "-o", tmp_path / "out.jsonl", "--max-length", 8)
    small = ("--batch-size", 2)
    calls = []
    generate = BartForConditionalGeneration.generate

    def dying(self, **inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise SystemExit(143)  # what SIGTERM becomes
        return generate(self, **inputs)

    monkeypatch.setattr(BartForConditionalGeneration, "generate", dying)
    assert run(*arguments, *small).exit_code == 143
    assert not (tmp_path / "out.jsonl").exists()
    result = run(*arguments, *small)
    assert result.exit_code == 0, result.output
    assert "Translated 7 rows (4 of them by an earlier run)" in result.output
    assert calls == [2, 2, 2, 2, 1]
    assert written(tmp_path / "out.jsonl") == expected(folder, tmp_path, batch_size=2)


def test_a_new_language_comes_with_its_tokenizer(folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    words = AutoTokenizer.from_pretrained(folder / "model")
    number = add_language_code(model, words, "bbc_Latn", like="ace_Latn")
    words.save_pretrained(tmp_path / "words")
    config = RandConfig(num_weights=5, target_modules=["q_proj"], trainable_token_indices=[number])
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = tmp_path / "out.jsonl"
    arguments = (folder / "rows.jsonl", folder / "model", "-o", out, "--target", "bbc_Latn", "--max-length", 8)
    refused = run(*arguments)
    assert isinstance(refused.exception, ConfigError)
    assert "the tokenizer has no token of the language 'bbc_Latn'" in str(refused.exception)
    result = run(*arguments, "--tokenizer", tmp_path / "words", "--adapter", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert len(written(out)) == 7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": "none.jsonl"}, ConfigError, "there is no file"),
        ({"rows": "broken.jsonl"}, FormatError, "broken.jsonl, line 2 is no JSON"),
        ({"rows": "list.jsonl"}, FormatError, "list.jsonl, line 1 is no JSON object"),
        ({"rows": "empty.txt"}, ConfigError, "has no rows"),
        (
            {"rows": "table.csv"},
            ConfigError,
            r"must be a \.jsonl file, .*, or a text file, got .*table\.csv\. Write it as",
        ),
        ({"rows": "table.TSV"}, ConfigError, r"or a text file, got .*table\.TSV\. Write it as JSONL"),
        ({"rows": "table.parquet"}, ConfigError, r"or a text file, got .*table\.parquet\. Write it as JSONL"),
        ({"rows": "latin.txt"}, FormatError, "is not UTF-8"),
        ({"more": ["--field", "premise"]}, ConfigError, r"rows.jsonl, row 1 has no text in 'premise', only the fields"),
        ({"more": ["--limit", "0"]}, ConfigError, "limit must be >= 1 rows, got 0"),
        ({"model": "bert"}, ConfigError, "is no sequence-to-sequence model"),
        ({"model": "nowhere"}, ConfigError, "cannot be loaded"),
        ({"output": "rows.jsonl"}, ConfigError, "is the file of rows itself"),
    ],
)
def test_what_cannot_be_translated_is_refused(folder, tmp_path, change, error, message):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for suffix in ("csv", "TSV", "parquet"):
        (tmp_path / f"table.{suffix}").write_bytes(b"text,label\nw1,pos\n")
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    if change.get("model") == "bert":
        tiny.bert().save_pretrained(tmp_path / "bert")
    model = tmp_path / change["model"] if "model" in change else folder / "model"
    before = sorted(tmp_path.iterdir())
    rows, output = tmp_path / change.get("rows", "rows.jsonl"), tmp_path / change.get("output", "out.jsonl")
    result = run(rows, model, "-o", output, *change.get("more", []))
    assert isinstance(result.exception, error), result.output
    with pytest.raises(error, match=message):
        raise result.exception
    assert sorted(tmp_path.iterdir()) == before
