"""Rows are translated as the model itself translates them, and a killed run goes on where it was; sparse adapters on
sequence-to-sequence models, whose embeddings are one matrix, with the row of a new language.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

from peft_sparse import (
    ConfigError,
    FormatError,
    LotteryTicketConfig,
    RandConfig,
    SparseTrainer,
    add_language_code,
    iter_deltas,
    resident,
    translate_rows,
)
from tests.support.translators import MODELS, bert, made, rows, tokenizer

# What older versions did not write down of a run.
_NEWER = ("adapters", "tokenizer")


def translate(model, output, **changes):
    settings = {"fields": ["text"], "batch_size": 2, "max_length": 8}
    return translate_rows(changes.pop("rows", rows()), model, tokenizer(), output, **{**settings, **changes})


@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_what_the_model_generates(kind, tmp_path):
    model, words = made(kind), tokenizer()
    found = translate(model, tmp_path / "out.jsonl", target="ace_Latn", batch_size=3)
    expected = []
    for row in rows():
        with torch.no_grad():
            ids = model.generate(**words([row["text"]], return_tensors="pt", return_token_type_ids=False),
                                 max_new_tokens=8, forced_bos_token_id=4)  # fmt: skip
        assert ids[0, 1] == 4
        expected.append({**row, "text": words.decode(ids[0], skip_special_tokens=True).strip()})
    assert found.rows == expected
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected
    assert len({row["text"] for row in expected}) > (1 if kind != "marian" else 0)
    assert found.num_resumed == 0
    assert not list(tmp_path.glob(".*partial"))


def test_several_fields_are_translated_and_labels_go_along(tmp_path):
    pairs = [{"premise": row["text"], "hypothesis": row["text"][::-1][:0] + "w1 w2", "label": 1} for row in rows()]
    both = translate(made("bart"), tmp_path / "both.jsonl", rows=pairs, fields=["premise", "hypothesis"])
    one = translate(made("bart"), tmp_path / "one.jsonl", rows=pairs, fields="premise", batch_size=1)
    assert [row["premise"] for row in both.rows] == [row["premise"] for row in one.rows]
    assert len({row["hypothesis"] for row in both.rows}) == 1
    assert [row["hypothesis"] for row in one.rows] == ["w1 w2"] * 7


def test_a_blank_text_stays_and_moves_no_other(tmp_path):
    whole = translate(made("bart"), tmp_path / "whole.jsonl", batch_size=1).rows
    blank = rows()
    for place, text in ((1, ""), (2, "  "), (3, "")):
        blank[place] = {**blank[place], "text": text}
    found = translate(made("bart"), tmp_path / "out.jsonl", rows=blank, prefix="").rows
    assert [row["text"] for row in found[:4]] == [whole[0]["text"], "", "  ", ""]
    assert found[4:] == whole[4:]


def test_one_translation_a_row(tmp_path):
    several = {"num_beams": 2, "num_return_sequences": 2}
    by_config = made("bart")
    by_config.generation_config.update(**several)
    for model, how in ((made("bart"), several), (by_config, None)):
        with pytest.raises(ConfigError, match=r"num_return_sequences .* must be 1, got 2"):
            translate(model, tmp_path / "out.jsonl", generation=how)
    assert not list(tmp_path.iterdir())


class Killed(RuntimeError):
    pass


def killed_after(model, batches: int):
    """The model's `generate` fails from the given call on; returns the calls."""
    generate, calls = model.generate, []

    def dying(**inputs):
        if len(calls) == batches:
            raise Killed
        calls.append(inputs)
        return generate(**inputs)

    model.generate = dying
    return calls


def test_a_killed_run_goes_on_and_gives_the_same_file(tmp_path):
    whole = translate(made("bart"), tmp_path / "whole.jsonl")
    model = made("bart")
    killed_after(model, 2)
    with pytest.raises(Killed):
        translate(model, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    # As a kill in the middle of a line leaves it.
    with open(tmp_path / ".out.jsonl.partial", "a", encoding="utf-8") as file:
        file.write('{"id": 4, "te')
    model = made("bart")
    calls = killed_after(model, 99)
    found = translate(model, tmp_path / "out.jsonl")
    assert (found.num_resumed, len(calls)) == (4, 2)
    assert found.rows == whole.rows
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = translate(made("bart"), tmp_path / "out.jsonl")
    assert (again.rows, again.num_resumed) == (whole.rows, 7)


def test_two_runs_do_not_write_one_file(tmp_path):
    whole = translate(made("bart"), tmp_path / "whole.jsonl")
    model = made("bart")
    generate, refused = model.generate, []

    def second_at_the_same_time(**inputs):
        with pytest.raises(ConfigError, match=r"another process is writing .*out\.jsonl") as found:
            translate(made("bart"), tmp_path / "out.jsonl")
        refused.append(found)
        return generate(**inputs)

    model.generate = second_at_the_same_time
    assert translate(model, tmp_path / "out.jsonl").rows == whole.rows
    assert len(refused) == 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "kept"), [("out.jsonl", 6), ("out.jsonl", 8), (".out.jsonl.partial", 8)])
def test_a_file_of_another_number_of_rows_is_damaged(tmp_path, name, kept):
    translate(made("bart"), tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / name).write_text("".join([*lines, *lines][:kept]))
    with pytest.raises(FormatError, match=f"holds {kept} rows, of 7: delete it and translate again"):
        translate(made("bart"), tmp_path / "out.jsonl")


def test_a_home_in_an_output_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="begins with ~"):
        translate(made("bart"), "~/out.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_run_with_other_rows_settings_or_weights_is_refused(tmp_path):
    translate(made("bart"), tmp_path / "out.jsonl")
    for change, message in [
        ({"rows": rows(6)}, "was begun with other rows"),
        ({"max_length": 9}, "was begun with other max_length: 8 then, 9 now"),
        ({"generation": {"num_beams": 2}}, "was begun with other generation"),
    ]:
        with pytest.raises(ConfigError, match=message):
            translate(made("bart"), tmp_path / "out.jsonl", **change)
    with pytest.raises(ConfigError, match="was begun with other model"):
        translate(made("bart", seed=1), tmp_path / "out.jsonl")
    tuned = get_peft_model(made("bart"), RandConfig(density=0.5, target_modules="all-linear", init_weights=False))
    tuned.add_adapter("other", RandConfig(density=0.5, target_modules="all-linear", init_weights=False, seed=1))
    translate(tuned, tmp_path / "tuned.jsonl")
    tuned.set_adapter("other")
    with pytest.raises(ConfigError, match=r"begun with other adapters: \['default'\] then, \['other'\] now"):
        translate(tuned, tmp_path / "tuned.jsonl")
    other = tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(ConfigError, match="was begun with other tokenizer"):
        translate_rows(rows(), made("bart"), other, tmp_path / "out.jsonl", fields=["text"], max_length=8)
    notes = tmp_path / ".out.jsonl.settings"
    older = {name: value for name, value in json.loads(notes.read_text()).items() if name not in _NEWER}
    notes.write_text(json.dumps(older))
    assert translate(made("bart"), tmp_path / "out.jsonl").num_resumed == 7
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="was not written by translate_rows"):
        translate(made("bart"), tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"
    (tmp_path / "out.jsonl").write_text('{"id": 0}\n{"id"')
    with pytest.raises(FormatError, match="ends in the middle of a row"):
        translate(made("bart"), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "nothing to translate: 0 rows"),
        ({"fields": []}, "nothing to translate: 7 rows"),
        ({"fields": ["txt"]}, r"row 0 has no text in 'txt', only the fields \['id', 'label', 'text'\]"),
        ({"target": "bbc_Latn"}, "target: the tokenizer has no token of the language 'bbc_Latn'.*add_language_code"),
        ({"source": "ind_Latn"}, "this tokenizer marks no language of its texts"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"rows": [{"text": "a"}, {"text": "b", "label": {1, 2}}]}, "row 1 holds what JSON cannot: .*set"),
        ({"rows": [{"text": "half a character: \ud83d"}]}, "row 0 holds what JSON cannot: .*surrogates"),
    ],
)
def test_what_cannot_be_translated_is_refused(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        translate(made("t5"), tmp_path / "out.jsonl", **change)
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be a sequence-to-sequence model.*BertForMaskedLM"):
        translate(bert(), tmp_path / "out.jsonl")


def test_cut_texts_are_counted(tmp_path, caplog):
    found = translate(made("t5"), tmp_path / "out.jsonl", max_length=3)
    assert found.num_cut == sum(len(row["text"].split()) + 1 > 3 for row in rows())
    assert f"{found.num_cut} texts were cut at 3 subwords" in caplog.text


@pytest.mark.parametrize("kind", MODELS)
def test_a_new_language_code_gets_a_row_like_anothers(kind):
    model, words = made(kind), tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    number = add_language_code(model, words, "bbc_Latn", like="ind_Latn")
    after = model.get_input_embeddings().weight
    assert (number, words.convert_tokens_to_ids("bbc_Latn")) == (17, 17)
    assert torch.equal(after[:17], before)
    assert torch.equal(after[17], before[3])
    assert model.get_output_embeddings().weight.data_ptr() == after.data_ptr() or kind == "t5"
    assert words.decode([17, 5], skip_special_tokens=True) == "w0"
    other = made(kind)
    add_language_code(other, tokenizer(), "bbc_Latn")
    torch.testing.assert_close(other.get_input_embeddings().weight[17], before.mean(0))
    with pytest.raises(ConfigError, match="knows 'bbc_Latn' already"):
        add_language_code(model, words, "bbc_Latn")
    with pytest.raises(ConfigError, match="like must be a code"):
        add_language_code(model, words, "nij_Latn", like="nij")


def encoded(words) -> list[dict]:
    """Translation into the new language is the text backwards."""
    found = []
    for row in rows(16):
        target = " ".join(reversed(row["text"].split()))
        labels = [words.convert_tokens_to_ids("bbc_Latn"), *words(target)["input_ids"]]
        found.append({"input_ids": words(row["text"])["input_ids"], "labels": labels})
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_translator_is_adapted_sparsely_with_the_row_of_the_new_language(kind, tmp_path):
    base, words = made(kind), tokenizer()
    number = add_language_code(base, words, "bbc_Latn", like="ind_Latn")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    start = {name: p.detach().clone() for name, p in base.named_parameters(remove_duplicate=False)}
    config = LotteryTicketConfig(
        density=0.3, target_modules="all-linear", trainable_token_indices=[number], task_type="SEQ_2_SEQ_LM"
    )
    tuned = get_peft_model(base, config)
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=8,
        report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    SparseTrainer(
        model=tuned, args=args, train_dataset=encoded(words), data_collator=DataCollatorForSeq2Seq(words, model=base)
    ).train()
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.eval()
    batch = DataCollatorForSeq2Seq(words, model=base)(encoded(words))
    with torch.no_grad():
        expected = tuned(**batch).logits
    fresh = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    for name, p in fresh.named_parameters(remove_duplicate=False):
        assert torch.equal(p, start[name])
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()(**batch).logits
        # torch 2.8 multiplies a T5's tensors in another order when they lie elsewhere in memory.
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    trained, read = tuned.state_dict(), loaded.state_dict()
    assert trained.keys() == read.keys()
    assert all(torch.equal(trained[name], read[name]) for name in trained)
    assert not torch.allclose(expected, plain)
    one = translate(loaded, tmp_path / "one.jsonl", target=None)
    with resident(loaded):
        other = translate(loaded, tmp_path / "other.jsonl", target=None)
    assert [row["text"] for row in one.rows] == [row["text"] for row in other.rows]
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_shared_embeddings_are_targets(kind, tmp_path):
    base = made(kind)
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, RandConfig(density=0.3, target_modules="all", init_weights=False, seed=0))
    deltas = {name: delta for name, _, _, delta in iter_deltas(tuned)}
    shared = [name for name in deltas if "shared" in name or "embed_tokens" in name]
    assert len(shared) == 1
    assert any("embed_positions" in name for name in deltas) == (kind == "bart")
    # By hand: the delta added to the matrix that encoder and decoder read; the output matrix keeps its own values.
    dense = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    output = dense.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    own = dict(dense.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in deltas.items():
            added = torch.zeros(own[name].numel())
            added[delta.indices.long()] = delta.values.detach().float()
            own[name] += added.view_as(own[name])
    words = tokenizer()
    batch = words([row["text"] for row in rows()], padding=True, return_tensors="pt", return_token_type_ids=False)
    batch["decoder_input_ids"] = batch["input_ids"]
    tuned.eval()
    with torch.no_grad():
        expected = dense(**batch).logits
        torch.testing.assert_close(tuned(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        tuned.save_pretrained(tmp_path / "adapter")
        fresh = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, tuned(**batch).logits)
        merged = loaded.merge_and_unload().eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-4)
