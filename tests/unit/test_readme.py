"""README and guides: their Python runs, commands are those of CI, links lead somewhere, errors are the code's own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from peft_sparse import (
    LotteryTicketConfig,
    MultiSourceCollator,
    MultiSourceDataset,
    RandConfig,
    Typology,
    iter_deltas,
    save_adapter_hub,
)
from tests.support.models import bert, llama
from tests.support.tokenizers import of_words

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
GUIDES = sorted((ROOT / "examples").glob("*.md"))
PAGES = [README, *(path.read_text(encoding="utf-8") for path in GUIDES)]
SNIPPETS = [text for page in PAGES for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)]


def snippet(marker: str) -> str:
    """The one snippet of README and guides that contains a text."""
    (found,) = [text for text in SNIPPETS if marker in text]
    return found


PLAIN_LOOP, SERVING, TWO_PHASES = snippet("with resident(model)"), snippet("# switch"), snippet("dense_args=")
QUANTIZED, LANGUAGE = snippet("BitsAndBytesConfig("), snippet('"quechua.txt"')
TASK_ON_SOURCE, ZERO_SHOT = (
    snippet('set_requires_grad("english", requires_grad=False)  # active'),
    snippet("head_from="),
)
SWITCHING, MERGING = snippet("adapter_names="), snippet("merged = model.merge_and_unload()\nmerged.save")
SOFT_MASKS, LOOKING = snippet("AdaSftConfig("), snippet("conflicts(")
EXTRACTING, IMPORTING = snippet("extract_adapter("), snippet("import_adapter(")
ONE_SHOT, FITTED, DECAY = (snippet(part) for part in ("select_by_gradients", "fitted_rate=True))", "parameter_groups"))
STACKING, ADAPTER_HUB = snippet("invertible="), snippet("load_adapter_hub(")
GENERATING, FEATURES = snippet("MadGConfig("), snippet("plot_importance(")
UNSEEN_LANGUAGE, SEVERAL_LANGUAGES = snippet("add_language_adapter("), snippet("switch = LanguageSwitch(")
DISTILLING = snippet("make_student(")
BESIDE_LORA, BOTH_LOADED = snippet('trainer.save_model("both")'), snippet('(merged, "both/low_rank")')
PART_OF_A_MODEL = snippet("class Tagger(")
PARSING, MIXING = snippet("encode_sentences("), snippet("few_shot(")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_model(layers: int = 2) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return llama(vocab_size=50, num_hidden_layers=layers, **sizes).train()


def rows(count: int) -> list[dict[str, list[int]]]:
    made = torch.Generator().manual_seed(1)
    ids = [torch.randint(50, (8,), generator=made).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(8)[None]).logits


def test_plain_loop(folder):
    base, pristine = tiny_model(), tiny_model()
    names: dict = {"base": base, "batches": [collate(rows(4))] * 3}
    exec(PLAIN_LOOP, names)
    trained = output(names["model"])
    assert not torch.equal(trained, output(pristine))

    names = {"base": tiny_model()}
    loaded = PeftModel.from_pretrained(names["base"], "my-adapter")
    assert torch.equal(output(loaded), trained)


def test_two_phases_and_adding_up(folder):
    args = TrainingArguments(output_dir=str(folder / "out"), max_steps=2, report_to="none", save_strategy="no")
    names: dict = {"base": tiny_model(), "args": args, "rows": rows(16), "collate": collate}
    exec(TWO_PHASES, names)
    assert names["trainer"].dense_state.global_step == 2
    language = output(names["model"])

    task = get_peft_model(tiny_model(), LotteryTicketConfig(density=0.05, target_modules="all"))
    names["trainer"].__class__(model=task, args=args, train_dataset=rows(4), data_collator=collate).train()
    task.save_pretrained("task")
    names = {"base": tiny_model()}
    exec(SERVING, names)
    merged = names["merged"]
    assert type(merged) is LlamaForCausalLM
    assert not torch.allclose(output(merged), language)
    stacked = PeftModel.from_pretrained(tiny_model(), "language", adapter_name="language")
    stacked.load_adapter("task", adapter_name="task")
    stacked.base_model.set_adapter(["language", "task"])
    torch.testing.assert_close(output(merged), output(stacked), rtol=1e-5, atol=1e-6)
    assert torch.equal(output(LlamaForCausalLM.from_pretrained("merged")), output(merged))


def test_sparse_beside_low_rank(folder):
    args = TrainingArguments(output_dir="out", max_steps=4, report_to="none", save_steps=2)
    names: dict = {"model": tiny_model(), "args": args, "rows": rows(16), "collate": collate}
    exec(BESIDE_LORA, names)
    trained = names["model"]
    outputs = []
    for active in ("sparse", "low_rank", ["sparse", "low_rank"]):
        trained.set_adapter(active)
        outputs.append(output(trained))
    names = {"base": tiny_model()}
    exec(BOTH_LOADED, names)
    torch.testing.assert_close(output(names["model"]), outputs[-1])
    assert not any(torch.allclose(one, outputs[-1], atol=1e-4) for one in [*outputs[:-1], output(tiny_model())])


def test_an_encoder_in_a_model_of_ones_own(folder):
    args = TrainingArguments(output_dir="out", max_steps=2, report_to="none", save_strategy="no")
    tagged = [{**row, "labels": [number % 17 for number in row["labels"]]} for row in rows(16)]
    names = {"encoder": tiny_bert(BertModel), "args": args, "rows": tagged, "collate": collate}
    exec(PART_OF_A_MODEL, names)
    encoder, ids = names["model"].eval().encoder, torch.arange(8)[None]
    alone = PeftModel.from_pretrained(tiny_bert(BertModel), "tagger").eval()
    with torch.no_grad():
        assert torch.equal(alone(ids).last_hidden_state, encoder(ids).last_hidden_state)
        assert not torch.equal(alone(ids).last_hidden_state, tiny_bert(BertModel).eval()(ids).last_hidden_state)


def tokenizer_in(folder: str) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "the", "old", "cat", "sees", "a", "red", "bird"]
    of_words(words).save_pretrained(folder)


def tiny_bert(cls):
    return bert(cls, vocab_size=50, hidden_size=32, intermediate_size=64, max_position_embeddings=512).train()


def test_trl_on_a_quantised_model(folder):
    pytest.importorskip("bitsandbytes", reason="runs the README's 4-bit model: pip install 'peft-sparse[quantization]'")
    pytest.importorskip("trl", reason="runs TRL's trainer: pip install 'peft-sparse[trl]'")
    name = "HuggingFaceTB/SmolLM2-135M"  # a folder of this name comes before the Hub
    tiny_model().save_pretrained(name)
    tokenizer_in(name)
    Path("rows.jsonl").write_text('{"text": "the old cat sees a red bird"}\n' * 16)
    short = QUANTIZED.replace("max_steps=400", "max_steps=2, use_cpu=True, bf16=False, report_to=[]")
    assert short != QUANTIZED
    exec(short, {})
    config = PeftConfig.from_pretrained("my-adapter")
    linear = sum(p.numel() for n, p in tiny_model().named_parameters() if "_proj" in n)
    assert sum(config.counts.values()) == round(0.02 * linear)
    model = PeftModel.from_pretrained(tiny_model(), "my-adapter")
    assert not torch.equal(output(model), output(tiny_model()))


def test_language_adapters_task_and_zero_shot(folder):
    name = "FacebookAI/xlm-roberta-base"
    tiny_bert(BertForMaskedLM).save_pretrained(name)
    tokenizer_in(name)
    Path("quechua.txt").write_text("the old cat sees a red bird\na bird sees the cat\n" * 16)
    short = LANGUAGE.replace("max_steps=30_000", "max_steps=2, use_cpu=True, report_to=[], save_strategy='no'")
    for language in ("quechua", "english"):
        exec(short.replace("quechua", language).replace("english.txt", "quechua.txt"), {})
        config = PeftConfig.from_pretrained(language)
        assert not any("Norm" in tensor for tensor in config.counts)
        assert config.l1 == 0.1

    args = TrainingArguments(output_dir="task-run", max_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    task_rows = [{"input_ids": [5, 6, 7, 8], "labels": label} for label in (0, 1) * 8]
    names = {"classifier": tiny_bert(BertForSequenceClassification), "args": args, "task_rows": task_rows}
    names |= {"collate": collate}
    exec(TASK_ON_SOURCE, names)
    assert names["model"].active_adapters == ["english", "task"]
    fresh = PeftModel.from_pretrained(tiny_bert(BertForSequenceClassification), "english", adapter_name="english")
    frozen = {name: delta.values for name, *_, delta in iter_deltas(names["model"], "english")}
    saved = {name: delta.values for name, *_, delta in iter_deltas(fresh, "english")}
    assert saved.keys() == frozen.keys()
    assert all(torch.equal(frozen[name], values) for name, values in saved.items())
    task = [delta.values for *_, delta in iter_deltas(names["model"], "task")]
    assert any(bool(values.any()) for values in task)

    names = {"new_classifier": tiny_bert(BertForSequenceClassification)}
    exec(ZERO_SHOT, names)
    assert names["model"].active_adapters == ["quechua-task"]
    alone = PeftModel.from_pretrained(tiny_bert(BertForSequenceClassification), "adapters/task")
    assert not torch.equal(output(names["model"]), output(alone))


def test_switching_and_merging(folder):
    for seed, name in enumerate(["english", "quechua"]):
        config = RandConfig(density=0.1, init_weights=False, seed=seed)
        get_peft_model(tiny_model(), config).save_pretrained(name)
    names: dict = {"base": tiny_model().eval(), "batch": {"input_ids": torch.arange(24).reshape(3, 8)}}
    exec(SWITCHING, names)
    rows = names["mixed"].logits
    model = names["model"].eval()
    assert torch.equal(rows[2], names["plain"].logits[2])
    for row, name in enumerate(["english", "quechua"]):
        model.set_adapter(name)
        torch.testing.assert_close(rows[row], model(**names["batch"]).logits[row])
    exec(MERGING, names)
    merged = LlamaForCausalLM.from_pretrained("merged").eval()
    torch.testing.assert_close(merged(**names["batch"]).logits[1], rows[1])


def test_stacking_and_adapter_hub(folder):
    names: dict = {"base": tiny_bert(BertForMaskedLM)}
    exec(STACKING, names)
    model = names["model"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split("bottleneck_adapters.")[1].split(".")[0] for name in trained} == {"quechua", "task"}
    assert any("layer.0." in name for name, _ in model.named_parameters() if "bottleneck_adapters" in name)
    # MAD-X 2.0: the last layer has neither.
    assert not any("layer.1." in name for name, _ in model.named_parameters() if "bottleneck_adapters" in name)

    save_adapter_hub(model, "quechua-from-adapterhub", adapter_name="quechua")
    model.set_adapter("quechua")
    expected = output(model)
    names = {"base": model.unload()}
    exec(ADAPTER_HUB, names)
    assert torch.equal(output(names["model"]), expected)
    assert sorted(path.name for path in (folder / "back-to-adapterhub").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]


def test_looking_at_adapters(folder):
    for seed, name in enumerate(["language", "task"]):
        config = RandConfig(density=0.1, target_modules="all", init_weights=False, seed=seed)
        get_peft_model(tiny_model(), config).save_pretrained(name)
    names: dict = {}
    exec(LOOKING, names)
    assert [group.name for group in names["report"].groups][:2] == ["embeddings", "model.layers.0"]
    assert 0 < names["found"].total.cancelled < 0.5
    assert (folder / "adapters.png").read_bytes().startswith(b"\x89PNG")


def test_many_languages(folder, monkeypatch):
    vectors = {"ind": [0.0, 1, 1], "jav": [0.0, 1, 1], "eng": [1.0, 1, 0], "ace": [0.0, 1, 1]}
    monkeypatch.setattr("peft_sparse.typology.table.load_typology", lambda: Typology.from_vectors(vectors))
    model = get_peft_model(tiny_model(), RandConfig(density=0.05), adapter_name="task")
    for seed, name in enumerate(["indonesian", "javanese", "english"]):
        model.add_adapter(name, RandConfig(density=0.05, init_weights=False, seed=seed))
    names: dict = {"model": model}
    exec(UNSEEN_LANGUAGE, names)
    assert model.active_adapters == ["acehnese"]
    assert names["weights"]["ind"] == names["weights"]["jav"] > names["weights"]["en"]

    model.set_adapter("task")
    args = TrainingArguments(
        output_dir="out", max_steps=4, per_device_train_batch_size=1, report_to="none", save_strategy="no"
    )
    names |= {"args": args, "collate": collate, "indonesian_rows": rows(20), "javanese_rows": rows(9)}
    exec(SEVERAL_LANGUAGES, names)
    assert sum(names["switch"].counts.values()) == 4
    assert model.active_adapters[1] == "task"


def test_parsing(folder):
    tokenizer_in("encoder")
    tiny_bert(BertForMaskedLM).save_pretrained("encoder")
    args = TrainingArguments(output_dir="out", max_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    sentence = {"words": ["the", "cat", "sees"], "heads": [2, 3, 0], "relations": ["det", "nsubj", "root"]}
    tokenizer = PreTrainedTokenizerFast.from_pretrained("encoder")
    names = {"encoder": "encoder", "tokenizer": tokenizer, "treebank": [sentence] * 8, "args": args}
    exec(PARSING, names)
    base = names["BiaffineParser"].from_pretrained("encoder")
    loaded = PeftModel.from_pretrained(base, "parser").eval()
    inputs = names["ParserCollator"](tokenizer)(names["rows"][:1])
    with torch.no_grad():
        expected = names["model"].eval()(**inputs, output_scores=True)
        found = loaded(**inputs, output_scores=True)
    assert expected.arc_scores.isfinite().all()
    assert torch.equal(found.arc_scores, expected.arc_scores)
    assert torch.equal(found.loss, expected.loss)


def test_mixing(folder, monkeypatch):
    translated = []

    def translate(rows, *args, fields, source, target):
        translated.append((fields, source, target))
        return SimpleNamespace(rows=[{**row, "text": row["text"].upper()} for row in rows])

    monkeypatch.setattr("peft_sparse.training.languages.translate.translate_rows", translate)
    labelled = [{"text": f"row {i}", "label": i % 2} for i in range(50)]
    names = {"indonesian_rows": labelled, "acehnese_rows": labelled, "translator": None, "tokenizer": None}
    names["encode"] = lambda rows: [row["text"] for row in rows]
    exec(MIXING, names)
    assert translated == [(["text"], "ind_Latn", "ace_Latn")]
    # 50 rows in batches of 16, twice, and one batch of ten rows ten times.
    assert names["mixed"].counts == {"ind": 20, "ace nllb": 20, "ace gold": 50}


def test_soft_masks(folder):
    args = TrainingArguments(output_dir=str(folder / "out"), max_steps=2, report_to="none", save_strategy="no")
    names: dict = {"base": tiny_model(), "args": args, "rows": rows(16), "collate": collate}
    exec(SOFT_MASKS, names)
    assert names["trainer"].mask_state.global_step == names["trainer"].state.global_step == 2
    sparse = PeftModel.from_pretrained(tiny_model(), "task")
    counts = sparse.peft_config["default"].counts
    linear = sum(tiny_model().get_parameter(name).numel() for name in counts)
    assert sum(counts.values()) == round(0.05 * linear)
    assert not torch.equal(output(sparse), output(tiny_model()))


def test_extracting(folder, capsys):
    base, tuned = tiny_model(), tiny_model()
    tuned.model.layers[0].mlp.up_proj.weight.data += torch.randn(64, 32)
    base.save_pretrained("base-model")
    tuned.save_pretrained("tuned-model")
    exec(EXTRACTING, {})
    assert "% of the squared difference, in " in capsys.readouterr().out
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base-model"), "extracted")
    assert not torch.equal(output(model), output(base))


def test_importing(folder, capsys):
    base = tiny_model()
    base.save_pretrained("my-base-model")
    Path("sft-folder").mkdir()
    name = "model.layers.0.mlp.up_proj.weight"
    first = {"size": base.get_parameter(name).shape, "index_steps": [0, 5], "values": torch.tensor([1.0, 2.0])}
    torch.save({"diffs": {name: first}, "abs": {}}, "sft-folder/pytorch_diff.bin")
    exec(IMPORTING, {})
    assert capsys.readouterr().out == "2 weights in 1 tensors, heads ()\n"
    merged = PeftModel.from_pretrained(tiny_model(), "imported").merge_and_unload()
    assert [int(n) for n in (merged.get_parameter(name) - base.get_parameter(name)).round()[[0, 5], 0]] == [1, 2]
    assert torch.load("back/pytorch_diff.bin", weights_only=True)["diffs"][name]["index_steps"] == [0, 5]


def test_a_fitted_rate():
    names: dict = {"base": tiny_model()}
    exec(FITTED, names)
    config = names["model"].peft_config["default"]
    assert (config.fitted_rate, config.criterion) == (True, "gradient")


def test_decay_of_deltas_alone():
    names: dict = {"base": tiny_model()}
    exec(DECAY, names)
    decayed = {id(p) for g in names["optimizer"].param_groups if g["weight_decay"] == 30.0 for p in g["params"]}
    assert decayed == {id(p) for p in names["model"].parameters() if p.requires_grad}


def test_criteria_of_gradients(folder):
    names: dict = {"base": tiny_model(layers=3), "batches": [collate(rows(4)[i : i + 2]) for i in (0, 2)]}
    exec(ONE_SHOT, names)
    counts = PeftConfig.from_pretrained("one-shot").counts
    linear = sum(p.numel() for n, p in tiny_model(layers=3).named_parameters() if "_proj" in n)
    assert sum(counts.values()) == round(0.01 * linear)
    last = sum(count for name, count in counts.items() if "layers.2." in name)
    assert last == round(sum(counts.values()) * 0.02 / 0.98)


def test_generating_adapters(folder, monkeypatch):
    made = torch.Generator().manual_seed(0)
    vectors = {code: (torch.rand(289, generator=made) < 0.5).float() for code in ("eng", "quy", "ace")}
    monkeypatch.setattr("peft_sparse.load_typology", lambda: Typology.from_vectors(vectors), raising=False)
    batches = [{**collate(rows(2)), "language": code} for code in ("eng", ["eng", "quy"])]
    ids = torch.arange(8)[None]
    names: dict = {"base": tiny_model(), "batches": batches, "ids": ids}
    exec(GENERATING, names)
    trained = {name: p for name, p in names["model"].named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    loaded = PeftModel.from_pretrained(tiny_model(), "acehnese")
    names["model"].eval().set_language("ace")
    torch.testing.assert_close(output(loaded), output(names["model"]))
    assert (folder / "mad-g" / "adapter_model.safetensors").is_file()
    exec(FEATURES, names)
    assert len(names["importance"].top()) == 289
    assert (folder / "features.png").read_bytes().startswith(b"\x89PNG")


def test_distilling(folder):
    def classifier() -> BertForSequenceClassification:
        return bert(BertForSequenceClassification, vocab_size=50, num_hidden_layers=4, num_labels=3).train()

    for name, heads in (("ind", None), ("jav", None), ("task", ["classifier"])):
        config = RandConfig(num_weights=50, init_weights=False, target_modules="all", modules_to_save=heads)
        get_peft_model(classifier(), config).save_pretrained(folder / f"small-{name}")
    text = [{"input_ids": torch.tensor(row["input_ids"])} for row in rows(4)]
    task = [{**row, "labels": number % 3} for number, row in enumerate(text)]
    batches = MultiSourceDataset({"ind": text, "jav": text}, num_batches=2, batch_size=2)
    names = {
        "encoder": classifier(), "whole_classifier": classifier(), "batches": batches, "task": task,
        "collate": MultiSourceCollator(torch.utils.data.default_collate), "get_peft_model": get_peft_model,
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "LotteryTicketConfig": LotteryTicketConfig,
        "args": TrainingArguments("out", max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to=[]),
    }  # fmt: skip
    exec(DISTILLING, names)
    released = AutoModelForSequenceClassification.from_pretrained("ind-jav")
    assert released.config.num_hidden_layers == 2
    loaded = PeftModel.from_pretrained(released, "sentiment")
    torch.testing.assert_close(output(loaded), output(names["tuned"]))


def test_every_snippet_is_run():
    run = [PLAIN_LOOP, SERVING, TWO_PHASES, QUANTIZED, LANGUAGE, TASK_ON_SOURCE, ZERO_SHOT, SWITCHING, MERGING]
    run += [SOFT_MASKS, LOOKING, EXTRACTING, ONE_SHOT, FITTED, DECAY, STACKING, ADAPTER_HUB]
    run += [GENERATING, FEATURES, IMPORTING, BESIDE_LORA, BOTH_LOADED, PART_OF_A_MODEL]
    run += [UNSEEN_LANGUAGE, SEVERAL_LANGUAGES, DISTILLING, PARSING, MIXING]
    assert sorted(SNIPPETS) == sorted(run)


def test_ci_runs_the_documented_test_command():
    commands = re.findall(r"```bash\n(.*?)\n```", README)
    assert len(commands) == 2
    install, tests = commands[1].split(" && ")
    script = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    assert install.replace("pip install", "pip install --quiet") in script
    assert script[-1] == tests == "pytest -n 2"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / commands[0].split("python ")[1]).is_file()


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES], ids=lambda path: path.stem)
def test_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    paths = re.findall(r"`((?:peft_sparse|tests|examples|\.ci|\.github)/[\w./-]*)`", text)
    assert links or paths
    assert [name for name in links if not (path.parent / name).exists()] == []
    assert [name for name in paths if not (ROOT / name).exists()] == []


def test_every_guide_is_linked_from_the_readme():
    assert [path.name for path in GUIDES if f"](examples/{path.name})" not in README] == []


def test_the_errors_of_the_troubleshooting_guide_are_those_of_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "peft_sparse").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    guide = (ROOT / "examples" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| ")]
    quoted = [
        text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if " " in text and "KeyError" not in text
    ]
    assert len(quoted) > 20
    assert [text for text in quoted if text not in joined] == []


def test_avoided_phrases():
    avoided = re.compile(
        r"\b(as ever|by itself|none of ours|whoever|stands|a training\b(?! (run|loop|step)))", re.IGNORECASE
    )
    found = {path.name: avoided.findall(path.read_text("utf-8")) for path in [ROOT / "README.md", *GUIDES]}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}
