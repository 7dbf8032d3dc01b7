"""The examples run: on tiny models and data of their own here, on the real model in the slow run."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
)
from typer import BadParameter

from tests.support import examples
from tests.support.examples import EXAMPLES, save_llama_of_letters
from tests.support.tokenizers import of_words


@pytest.fixture
def run(tmp_path):
    """Run an example by its name; returns (exit code, output with single spaces)."""
    with examples.importing(EXAMPLES) as module:
        yield lambda name, *arguments: examples.run(module(name), tmp_path / "out", *arguments)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A bfloat16 Llama of two layers whose tokenizer knows letters."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
    return save_llama_of_letters(folder, torch.bfloat16, **sizes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"instruction": f"Say {word}", "input": "now", "output": f"{word}!"} for word in ["one", "two", "three", "four"]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3), encoding="utf-8")
    return path


def losses(output: str) -> tuple[float, float]:
    before, after = re.search(r"held-out loss a token: ([\d.]+) before, ([\d.]+) after", output).groups()
    return float(before), float(after)


# One of each way through the example; the others are rows of the same ways, in the slow tests.
METHODS = ["spiel_ag", "lottery_ticket", "fisher", "lora"]
METHODS += [pytest.param(method, marks=pytest.mark.slow) for method in ("spiel_ma", "rand", "half_random", "deft_x")]


@pytest.mark.parametrize("method", METHODS)
def test_instruction_tuning(run, tiny_llama, pairs, tmp_path, method):
    options = ["--model", tiny_llama, "--data", pairs, "--method", method, "--density", 0.2, "--steps", 8]
    options += ["--learning-rate", 0.02, "--dense-learning-rate", 0.02, "--samples", 1]
    code, output = run("instruction_tuning", *options)
    assert code == 0, output
    before, after = losses(output)
    assert after < before
    assert output.count("agrees with the trained one") == (2 if method == "lora" else 3)
    count = int(re.search(r"([\d,]+) trained weights", output)[1].replace(",", ""))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    if method != "lora":
        assert count == round(0.2 * weights)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"].peft_type.value in (
        {"lora": "LORA"}.get(method, "SPARSE_FT"),
    )


@pytest.mark.parametrize("method", ["spiel_ag", pytest.param("lora", marks=pytest.mark.slow)])
def test_instruction_tuning_on_a_4_bit_base(run, tiny_llama, pairs, tmp_path, method):
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    options = ["--model", tiny_llama, "--data", pairs, "--method", method, "--density", 0.2, "--load-in-4bit"]
    code, output = run("instruction_tuning", *options, "--steps", 14, "--samples", 1, "--plot", tmp_path / "ages.png")
    assert code == 0, output
    assert output.count("agrees with the trained one") == (2 if method == "lora" else 3)
    assert ("ages of the tuned weights" in output) == (method == "spiel_ag") == (tmp_path / "ages.png").exists()


def test_instruction_tuning_fails_when_models_differ(run, tiny_llama, pairs, monkeypatch):
    module = importlib.import_module("instruction_tuning")
    logits = module.logits
    calls = []

    def one_differs(model, rows):
        calls.append(model)
        return logits(model, rows) + (1e-3 if len(calls) == 4 else 0)

    monkeypatch.setattr(module, "logits", one_differs)
    code, output = run("instruction_tuning", "--model", tiny_llama, "--data", pairs, "--steps", 1, "--samples", 1)
    assert code == 1
    assert "reloaded model: agrees" in output
    assert "composed model: agrees" in output
    assert "merged model: differs" in output


def test_built_in_instructions_follow_their_style(run):
    instructions = importlib.import_module("_instructions")
    train, held_out = instructions.read_pairs("")
    assert (len(train), len(held_out)) == (180, 24)
    questions = [pair["question"] for pair in train + held_out]
    assert len(set(questions)) == len(questions)
    subjects = {re.fullmatch(r"[^\[\]]+[.] \[([a-z]+)\]", pair["answer"])[1] for pair in train}
    assert len(subjects) == 15
    assert {re.fullmatch(r"[^\[\]]+[.] \[([a-z]+)\]", pair["answer"])[1] for pair in held_out} == subjects


def test_rows_that_are_no_instructions_are_refused(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}\n', encoding="utf-8")
    with pytest.raises(BadParameter, match=r"needs one of .*'instruction'.* this one has \['text'\]"):
        importlib.import_module("_instructions").read_pairs(str(path))


def test_loss_counts_on_the_answer_alone(run, tiny_llama):
    instructions = importlib.import_module("_instructions")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    short, long = instructions.encode(
        tokenizer, [{"question": "a", "answer": "b"}, {"question": "aa", "answer": "bcd"}]
    )
    assert tokenizer.decode([t for t in short["labels"] if t != -100]).replace(" ", "") == "b<eos>"
    batch = instructions.collate([short, long])
    # The end-of-text token that padding often is stays a label; what is told apart is the length.
    assert batch["labels"][0, len(short["input_ids"]) - 1] == tokenizer.eos_token_id
    assert (batch["labels"][0, len(short["input_ids"]) :] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(short["input_ids"]), len(long["input_ids"])]


def test_questions_without_a_place_for_an_answer_are_counted(run, tiny_llama, capsys):
    instructions = importlib.import_module("_instructions")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    pairs = [{"question": "a" * length, "answer": "b"} for length in (1, 40, 50)]
    rows = instructions.encode(tokenizer, pairs, max_length=40)
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in instructions.encode(tokenizer, pairs[:1])]
    said = "2 of 3 questions have 40 tokens or more: no place for an answer, they are left out."
    assert said in capsys.readouterr().err
    with pytest.raises(BadParameter, match=r"2 of 2 questions have 40 tokens .* shorten them\. The first is 'aaaaaa"):
        instructions.encode(tokenizer, pairs[1:], max_length=40)
    assert instructions.encode(tokenizer, pairs)
    assert not capsys.readouterr().err


def test_tokens_that_begin_a_text_begin_it_and_nothing_else(run):
    instructions = importlib.import_module("_instructions")
    tokenizer = of_words(["<unk>", "<s>", "</s>", "Question", "Answer", ":", "user", "a", "b"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain, text = instructions.encode(tokenizer, [{"question": "a", "answer": "b"}, {"question": "", "answer": "a b"}])
    assert tokenizer.convert_ids_to_tokens(plain["input_ids"]) == [
        "<s>",
        "Question",
        ":",
        "a",
        "Answer",
        ":",
        "b",
        "</s>",
    ]
    assert tokenizer.convert_ids_to_tokens(text["input_ids"]) == ["<s>", "a", "b", "</s>"]
    tokenizer.chat_template = "<s>user: {{ messages[0]['content'] }} Answer:"
    (chat,) = instructions.encode(tokenizer, [{"question": "a", "answer": "b"}])
    assert tokenizer.convert_ids_to_tokens(chat["input_ids"]) == ["<s>", "user", ":", "a", "Answer", ":", "b", "</s>"]
    assert [label for label in chat["labels"] if label != -100] == chat["input_ids"][-2:]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--density", "3"], "Error: density must be in"),
        (["--model", "no/such-model"], "Error: "),
    ],
)
def test_what_a_user_can_mend_is_one_line_before_anything_is_measured(
    run, tiny_llama, pairs, monkeypatch, capsys, arguments, said
):
    example, readers = importlib.import_module("instruction_tuning"), importlib.import_module("_readers")
    monkeypatch.setattr(example, "held_out_loss", lambda *args: pytest.fail("the base model was measured first"))
    monkeypatch.setattr("sys.argv", ["example", "--model", str(tiny_llama), "--data", str(pairs), *arguments])
    with pytest.raises(SystemExit) as ended:
        readers.run(example.main)
    assert ended.value.code == 1
    # Behind the bars of models that were loaded.
    assert any(line.startswith(said) for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("instruction_tuning", ["--steps", "--batch-size"]),
        ("language_and_task", ["--language-steps", "--task-steps"]),
        ("language_adapters_from_typology", ["--steps", "--words", "--fine-tuning-steps"]),
    ],
)
def test_no_steps_are_refused(run, name, options):
    # transformers takes max_steps=0 for three epochs.
    for option in options:
        code, output = run(name, option, 0)
        assert code == 2
        assert f"Invalid value for '{option}'" in re.sub(r"[│\s]+", " ", output)


def test_language_and_task(run, tmp_path, monkeypatch):
    worlds = importlib.import_module("_worlds")
    monkeypatch.setattr(worlds.tiny_bert, "__kwdefaults__", {"seed": 0, "steps": 20})
    example, active = importlib.import_module("language_and_task"), []

    compute_loss = example.SparseTrainer.compute_loss

    def watching(trainer, model, *args, **kwargs):
        active.append(list(model.active_adapters))
        return compute_loss(trainer, model, *args, **kwargs)

    monkeypatch.setattr(example.SparseTrainer, "compute_loss", watching)
    code, output = run("language_and_task", "--language-steps", 4, "--task-steps", 60)
    assert code == 0, output
    scores = {
        name: list(map(float, found)) for name, *found in re.findall(r"│ ([a-z+ ]+?) │ ([\d.]+) │ ([\d.]+) │", output)
    }
    assert list(scores) == ["alone", "+ language", "+ task", "+ language + task"]
    # Sixty steps learn something of the labels they are shown, and twenty steps of pretraining teach little.
    assert scores["+ task"][1] > max(0.5, scores["alone"][1])

    out = tmp_path / "out"
    base = AutoModelForSequenceClassification.from_pretrained(out / "tiny_bert", num_labels=4)
    composed = PeftModel.from_pretrained(base, out / "sum_1_1").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.equal(composed(input_ids=ids).logits, merged(input_ids=ids).logits)
    assert merged.config.id2label == dict(enumerate(worlds.LABELS))
    saved = json.loads((out / "language" / "adapter_config.json").read_text())
    assert "bert.embeddings.word_embeddings.weight" in saved["counts"]
    assert all(name.startswith("bert.") for name in saved["counts"])
    assert saved["modules_to_save"] is None
    # Algorithm 1: the task adapter is trained above the source language's, in both phases.
    assert (out / "source_language" / "adapter_config.json").is_file()
    assert active == [["default"]] * 16 + [["language", "task"]] * 120


@pytest.mark.slow
def test_language_and_task_reads_real_data(run, tmp_path):
    worlds = importlib.import_module("_worlds")
    model = worlds.tiny_bert(tmp_path / "bert", steps=1)
    lexicon = worlds.Lexicon(0)
    (tmp_path / "text").mkdir()
    for language, words in (("near", lexicon.near), ("far", lexicon.far)):
        text = "\n".join(text for text, _ in lexicon.rows(words, 40, 1))
        (tmp_path / "text" / f"{language}.txt").write_text(text, encoding="utf-8")
        folder = tmp_path / "nusax_senti" / language
        folder.mkdir(parents=True)
        rows = [{"text": text, "label": worlds.LABELS[label]} for text, label in lexicon.rows(words, 20, 2)]
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--data", tmp_path, "--model", model, "--source", "near", "--target", "far", "--density", 0.05]
    code, output = run("language_and_task", *options, "--language-steps", 2, "--task-steps", 2)
    assert code == 0, output
    assert "far (test)" in output
    saved = json.loads((tmp_path / "out" / "language" / "adapter_config.json").read_text())
    assert any("encoder.layer.1" in name for name in saved["counts"])
    assert not any(name.startswith("cls.") or "LayerNorm" in name for name in saved["counts"])
    assert (saved["target_norms"], saved["l1"]) == (False, 0.1)
    task = json.loads((tmp_path / "out" / "task" / "adapter_config.json").read_text())
    assert not any("LayerNorm" in name for name in task["counts"])


def test_missing_text_is_an_error(run, tmp_path):
    with pytest.raises(BadParameter, match="no raw text of 'far'"):
        importlib.import_module("_worlds").read_world(tmp_path, "near", "far")


WAYS = ["none", "piv's, generated", "its own, generated"]
FEW_WORDS = ["a new adapter, after 50 words", "its own, after 50 words"]


def masked_lm_losses(output: str) -> dict[str, list[float]]:
    """{way to adapt: [loss of the unseen language, mean of the others where it was measured]}."""
    rows = re.findall(r"│ ([a-z0-9', ]+?) │ ([\d.]+) │ ([\d.]*) ?│", output)
    return {name: [float(number) for number in numbers if number] for name, *numbers in rows}


@pytest.mark.slow
def test_language_adapters_from_typology(run, tmp_path, monkeypatch):
    languages, masked_lm = (importlib.import_module(name) for name in ("_languages", "_masked_lm"))
    monkeypatch.setattr(languages.tiny_multilingual_bert, "__kwdefaults__", {"seed": 0, "steps": 60})
    fitted = []
    fit = masked_lm.MaskedLM.fit
    monkeypatch.setattr(
        masked_lm.MaskedLM,
        "fit",
        lambda self, *args, **settings: (fitted.append(args[1]), fit(self, *args, **settings)),
    )
    options = ["--steps", 60, "--words", 50, "--fine-tuning-steps", 10, "--unseen", "dor"]
    code, output = run("language_adapters_from_typology", *options, "--plot", tmp_path / "plots" / "losses.png")
    assert code == 0, output
    losses = masked_lm_losses(output)
    assert list(losses) == WAYS + FEW_WORDS
    assert losses["its own, generated"][1] < losses["none"][1]
    assert losses["its own, after 50 words"][0] < losses["its own, generated"][0]
    assert (tmp_path / "plots" / "losses.png").stat().st_size > 0

    generating, *fine_tuning = fitted
    assert set(generating) == set(languages.CODES) - {"dor"}
    assert [set(text) for text in fine_tuning] == [{"dor"}] * 2
    assert sum(len(sentence.split()) for sentence in fine_tuning[0]["dor"]) == 50

    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out / "tiny_bert")
    lm = masked_lm.MaskedLM(tokenizer, languages.invented_corpus(0).held_out, out)
    for folder, row in (("generated", "its own, generated"), ("fine_tuned", "its own, after 50 words")):
        base = AutoModelForMaskedLM.from_pretrained(out / "tiny_bert")
        assert lm.loss(PeftModel.from_pretrained(base, out / folder), "dor") == pytest.approx(losses[row][0], abs=6e-4)


def test_language_adapters_from_typology_of_real_text(run, tmp_path):
    languages = importlib.import_module("_languages")
    encoder = BertModel.from_pretrained(languages.tiny_multilingual_bert(tmp_path / "bert", "lim", steps=1))
    encoder.save_pretrained(tmp_path / "bert")  # without the head that predicts words
    (tmp_path / "data").mkdir()
    text = languages.invented_corpus(0).held_out
    files = {"bor": text["bor"][:100], "bor_more": text["bor"][100:], "dor": text["dor"], "unknown": text["for"]}
    for name, sentences in files.items():
        (tmp_path / "data" / f"{name}.txt").write_text("\n".join(sentences) + "\n\n", encoding="utf-8")
    (tmp_path / "vectors.csv").write_text("code,verb last,article\nbor,0,1\ndor,1,1\npiv,1,0\n", encoding="utf-8")
    options = ["--data", tmp_path / "data", "--model", tmp_path / "bert", "--typology", tmp_path / "vectors.csv"]
    options += ["--pivot", "piv", "--unseen", "dor", "--steps", 2, "--words", 50, "--fine-tuning-steps", 2]
    code, output = run("language_adapters_from_typology", *options)
    assert code == 0, output
    assert "text of 'unknown' is left out: the typology has no language 'unknown'" in output
    assert "fitting one first" in output
    assert list(masked_lm_losses(output)) == WAYS + FEW_WORDS
    saved = json.loads((tmp_path / "out" / "generated" / "adapter_config.json").read_text())
    assert Path(saved["base_model_name_or_path"]) == tmp_path / "out" / "encoder"

    console = importlib.import_module("language_adapters_from_typology").console
    corpus = languages.read_corpus(tmp_path / "data", tmp_path / "vectors.csv", "piv", console)
    for language in ("bor", "dor"):
        assert sorted(corpus.text[language] + corpus.held_out[language]) == sorted(text[language])
        assert len(corpus.held_out[language]) == len(text[language]) // 10


def read_corpus(tmp_path, files):
    """Of a folder with these files and a typology that knows three languages; (corpus, what is said)."""
    example = importlib.import_module("language_adapters_from_typology")
    (tmp_path / "data").mkdir(exist_ok=True)
    for name, count in files.items():
        (tmp_path / "data" / name).write_text("".join(f"line {i}\n" for i in range(count)))
    (tmp_path / "vectors.csv").write_text("code,a,b\nace,0,1\neng,1,1\nnhe,1,0\n")
    with example.console.capture() as captured:
        corpus = example.read_corpus(str(tmp_path / "data"), tmp_path / "vectors.csv", "eng", example.console)
    return corpus, captured.get()


@pytest.mark.parametrize(("one", "other", "code"), [("ACE", "ace", "ace"), ("en", "eng", "eng"), ("nah", "nhe", "nhe")])
def test_a_language_of_two_codes_is_refused(run, tmp_path, one, other, code):
    message = f"text of '{one}' and of '{other}', which the typology takes for one language, '{code}': give them one"
    with pytest.raises(BadParameter, match=message):
        read_corpus(tmp_path, {f"{one}.txt": 3, f"{other}.txt": 3})


def test_a_language_with_too_little_text_is_left_out_and_named(run, tmp_path):
    corpus, said = read_corpus(tmp_path, {"ace.txt": 0, "en.txt": 2, "nah.txt": 1, "xyz.txt": 2})
    assert list(corpus.text) == ["en"]
    assert "text of 'ace' is left out: of 0 lines none can be held out, two are needed" in said
    assert "text of 'nah' is left out: of 1 lines none can be held out" in said
    assert "text of 'xyz' is left out: the typology has no language 'xyz'" in said


def test_the_unseen_language_may_be_spelt_otherwise(run, tmp_path, monkeypatch):
    example = importlib.import_module("language_adapters_from_typology")
    corpus, _ = read_corpus(tmp_path, {"ACE.txt": 3, "en.txt": 3, "nah.txt": 3})
    assert [corpus.called(code) for code in ("ace", "eng", "nhe", "xyz")] == ["ACE", "en", "nah", None]

    class TrainingBeginsError(Exception):
        pass

    def encoder(lm, base, text, **settings):
        raise TrainingBeginsError(sorted(text))

    monkeypatch.setattr(example.MaskedLM, "__init__", lambda *args: None)
    monkeypatch.setattr(example.MaskedLM, "encoder", encoder)
    monkeypatch.setattr(example.AutoTokenizer, "from_pretrained", lambda base: None)
    options = ["--data", tmp_path / "data", "--model", "m", "--typology", tmp_path / "vectors.csv", "--pivot", "eng"]
    with pytest.raises(TrainingBeginsError, match=re.escape(str(["en", "nah"]))):
        run("language_adapters_from_typology", *options, "--unseen", "ace")
    code, output = run("language_adapters_from_typology", *options, "--unseen", "ENG")  # the pivot, whose file is en
    assert code == 2
    assert "not the pivot, got 'ENG'" in re.sub(r"[│\s]+", " ", output)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data", "somewhere", "--unseen", "quy"], "needs an encoder"),
        (["--unseen", "piv"], "not the pivot, got 'piv'"),
        (["--unseen", "quy"], "one of several languages with text"),
    ],
)
def test_languages_that_cannot_be_left_out_are_refused(run, options, reason):
    code, output = run("language_adapters_from_typology", *options)
    assert code == 2
    assert reason in re.sub(r"[│\s]+", " ", output)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_instruction_tuning_of_the_real_model(run):
    """The README's main command: minutes, and a download where the model is not cached."""
    code, output = run("instruction_tuning")
    assert code == 0, output
    before, after = losses(output)
    assert after < 0.5 * before
    assert output.count("agrees with the trained one") == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_language_and_task_as_documented(run):
    code, output = run("language_and_task")
    assert code == 0, output
    scores = {name: float(score) for name, score in re.findall(r"│ ([a-z+ ]+?) │ ([\d.]+) │", output)}
    assert scores["+ language + task"] > scores["+ task"] + 0.1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_language_adapters_from_typology_as_documented(run):
    code, output = run("language_adapters_from_typology")
    assert code == 0, output
    losses = {name: numbers[0] for name, numbers in masked_lm_losses(output).items()}
    none, of_pivot, own = (losses[way] for way in WAYS)
    assert own < min(none, of_pivot) - 0.3
    assert losses["its own, after 1,000 words"] < min(own, losses["a new adapter, after 1,000 words"])
