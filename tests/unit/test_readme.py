"""README: its Python runs as it stands, its commands are those of CI, its links lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from peft_sparse import (
    LotteryTicketConfig,
    MultiSourceCollator,
    MultiSourceDataset,
    RandConfig,
    Typology,
    save_adapter_hub,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def snippet(marker: str) -> str:
    """The one snippet of the README that contains a text."""
    (found,) = [text for text in SNIPPETS if marker in text]
    return found


PLAIN_LOOP, LOADING, TWO_PHASES = snippet("with resident(model)"), snippet("merge_and_unload()"), snippet("dense_args=")
ADDING_UP, SOFT_MASKS, LOOKING = snippet("add_weighted_adapter("), snippet("AdaSftConfig("), snippet("conflicts(")
EXTRACTING, IMPORTING = snippet("extract_adapter("), snippet("import_adapter(")
ONE_SHOT = snippet("select_by_gradients")
STACKING, ADAPTER_HUB = snippet("invertible="), snippet("load_adapter_hub(")
GENERATING, FEATURES = snippet("MadGConfig("), snippet("plot_importance(")
UNSEEN_LANGUAGE, SEVERAL_LANGUAGES = snippet("for_language("), snippet("MultiSourceDataset(")
DISTILLING = snippet("make_student(")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_model(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=layers, **sizes))


def rows(count: int) -> list[dict[str, list[int]]]:
    made = torch.Generator().manual_seed(1)
    ids = [torch.randint(50, (8,), generator=made).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(8)[None]).logits


def test_plain_loop_and_loading(folder):
    base, pristine = tiny_model(), tiny_model()
    names: dict = {"base": base, "batches": [collate(rows(4))] * 3}
    exec(PLAIN_LOOP, names)
    trained = output(names["model"])
    assert not torch.equal(trained, output(pristine))

    names = {"base": tiny_model()}
    exec(LOADING, names)
    assert torch.equal(output(names["merged"]), trained)
    assert type(names["merged"]) is LlamaForCausalLM


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
    exec(ADDING_UP, names)
    model = names["model"]
    both = output(model)
    model.set_adapter("language")
    assert torch.equal(output(model), language)
    model.base_model.set_adapter(["language", "task"])
    torch.testing.assert_close(output(model), both, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both, language)


def test_stacking_and_adapter_hub(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForMaskedLM(BertConfig(vocab_size=50, **sizes))
    names: dict = {"base": base}
    exec(STACKING, names)
    model = names["model"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split("bottleneck_adapters.")[1].split(".")[0] for name in trained} == {"quechua", "task"}
    assert not any(".task." in name for name in trained if "layer.1." in name)

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
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(vocab_size=50, num_hidden_layers=4, num_labels=3, **sizes))

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
    run = [PLAIN_LOOP, LOADING, TWO_PHASES, ADDING_UP, SOFT_MASKS, LOOKING, EXTRACTING, ONE_SHOT, STACKING, ADAPTER_HUB]
    run += [GENERATING, FEATURES, IMPORTING]
    run += [UNSEEN_LANGUAGE, SEVERAL_LANGUAGES, DISTILLING]
    assert sorted(SNIPPETS) == sorted(run)


def test_ci_runs_the_documented_test_command():
    commands = re.findall(r"```bash\n(.*?)\n```", README)
    assert len(commands) == 2
    install, tests = commands[1].split(" && ")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert install.replace("pip install", "pip install --quiet") in script
    assert script[-1] == tests == "pytest -n 2"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / commands[0].split("python ")[1]).is_file()


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_named_files_exist(text):
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    paths = re.findall(r"`((?:peft_sparse|tests|examples|\.ci|\.github)/[\w./-]*)`", text)
    assert links or paths
    assert [name for name in links + paths if not (ROOT / name).exists()] == []
