"""`pytorch_diff.bin` of composable-sft and BiStil: the worked example, real models, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification, BertForMaskedLM, XLMRobertaForMaskedLM

from peft_sparse import import_adapter, inspect_adapter, merge_checkpoint
from peft_sparse.checkpoints.adapter_files import read_adapter
from peft_sparse.checkpoints.shards import Checkpoint
from peft_sparse.errors import ConfigError, FormatError
from peft_sparse.importing.composable_sft import read_composable_sft
from peft_sparse.importing.labels import TASKS, published_base, published_task
from tests.support.foreign_files import (
    IDS,
    MODELS,
    add,
    bert,
    differences,
    encode,
    heads_of,
    with_old_numpy,
    write_diff,
    xlmr,
)


@pytest.fixture
def base(tmp_path):
    model = bert(num_labels=7)
    model.save_pretrained(tmp_path / "base")
    return model


def test_the_worked_example(tmp_path):
    # [[0, .5, 0], [-.25, 0, 2]]: column-major positions 1, 2 and 5, so the steps are 1, 1, 3, values in that order.
    content = {
        "diffs": {
            "m.w.weight": {
                "size": torch.Size([2, 3]),
                "index_steps": [np.int64(1), 1, 3],
                "values": torch.tensor([-0.25, 0.5, 2.0]),
            },
            "m.empty.weight": {"size": torch.Size([3, 3]), "index_steps": [], "values": torch.tensor([])},
        },
        "abs": {"cls.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
    }
    torch.save(content, tmp_path / "pytorch_diff.bin")
    found = read_composable_sft(tmp_path / "pytorch_diff.bin", source="it")
    delta = found.deltas["m.w.weight"]
    assert found.deltas.keys() == {"m.w.weight"}
    assert found.untouched == {"m.empty.weight"}
    assert (delta.indices.tolist(), delta.values.tolist(), delta.shape) == ([1, 3, 5], [0.5, -0.25, 2.0], (2, 3))
    assert delta.to_dense().tolist() == [[0, 0.5, 0], [-0.25, 0, 2]]
    assert found.heads["cls.weight"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("old_numpy", [False, True])
@pytest.mark.parametrize("name", ["bert tokens", "bert sequence", "xlmr sequence"])
def test_merging_the_import_is_adding_the_dense_difference(tmp_path, name, old_numpy):
    make, kind = MODELS[name]
    model = make(kind, num_labels=7)
    model.save_pretrained(tmp_path / "base")
    diffs, heads = differences(model), heads_of(model)
    write_diff(tmp_path / "sft", diffs, heads)
    if old_numpy:
        with_old_numpy(tmp_path / "sft" / "pytorch_diff.bin")
    imported = import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base")
    assert imported.num_weights == sum(int((d != 0).sum()) for d in diffs.values())
    assert imported.heads == ("classifier",)
    assert imported.left_out == ()
    expected = add(model, diffs, heads)

    merged = PeftModel.from_pretrained(make(kind, num_labels=7), tmp_path / "out").merge_and_unload()
    found = dict(merged.named_parameters())
    assert {n for n in found if not torch.equal(found[n], expected[n])} == set()

    merge_checkpoint(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    on_disk = Checkpoint(tmp_path / "merged")
    assert {n for n in on_disk.names() if not torch.equal(on_disk.tensor(n), expected[n])} == set()
    assert set(on_disk.names()) == set(expected)


def test_what_the_result_says_of_itself(tmp_path, base):
    write_diff(tmp_path / "mbert-task-sft-masakhaner", differences(base), heads_of(base))
    imported = import_adapter(tmp_path / "mbert-task-sft-masakhaner", tmp_path / "out", base=tmp_path / "base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    provenance = config["provenance"]
    assert provenance["imported_from"] == str(tmp_path / "mbert-task-sft-masakhaner")
    assert provenance["format"] == "composable-sft"
    assert provenance["sha256"] == imported.sha256
    assert provenance["labels"] == ["B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER", "O"] == list(imported.labels)
    assert (config["method"], config["task_type"], config["modules_to_save"]) == ("fixed", "TOKEN_CLS", ["classifier"])
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Imported from `" in card
    assert "composable-sft" in card
    assert imported.sha256 in card
    assert "B-LOC, B-ORG" in card
    report = inspect_adapter(tmp_path / "out").to_dict()
    assert report["total"]["count"] == imported.num_weights


def test_labels_can_be_given_and_must_be_as_many_as_outputs(tmp_path, base):
    write_diff(tmp_path / "sft", differences(base), heads_of(base))
    labels = list("abcdefg")
    assert import_adapter(tmp_path / "sft", tmp_path / "o", base="some/base", labels=labels).labels == tuple(labels)
    with pytest.raises(ConfigError, match=r"labels must be as many as the head has outputs, 7, got 2"):
        import_adapter(tmp_path / "sft", tmp_path / "o2", base="some/base", labels=["a", "b"])
    assert not (tmp_path / "o2").exists()


def test_language_and_task_add_up(tmp_path, base):
    language, task = differences(base, seed=5), differences(base, seed=6)
    write_diff(tmp_path / "l", language, {"cls.predictions.bias": torch.randn(40)})
    write_diff(tmp_path / "t", task, heads_of(base))
    of_language = import_adapter(tmp_path / "l", tmp_path / "language", base=tmp_path / "base")
    import_adapter(tmp_path / "t", tmp_path / "task", base=tmp_path / "base")
    assert of_language.heads == ()
    assert of_language.left_out == ("cls.predictions.bias",)
    model = PeftModel.from_pretrained(bert(num_labels=7), tmp_path / "language", adapter_name="language")
    model.load_adapter(tmp_path / "task", adapter_name="task")
    model.add_weighted_adapter(["task", "language"], [1.0, 1.0], "both", combination_type="linear")
    model.set_adapter("both")
    expected = bert(num_labels=7)
    both = {name: task[name] + language[name] for name in task}
    expected.load_state_dict(add(base, both, heads_of(base)))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-6)
        assert not torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["bert mlm", "xlmr mlm"])
def test_a_language_adapter_leaves_the_output_matrix_of_a_masked_language_model_alone(tmp_path, name):
    make, kind = MODELS[name]
    model = make(kind)
    diffs = differences(model)
    embeddings = f"{model.base_model_prefix}.embeddings.word_embeddings.weight"
    diffs.setdefault(embeddings, torch.randn(40, 16) * 0.1)
    assert diffs[embeddings].any()
    write_diff(tmp_path / "sft", diffs)
    import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base")
    tuned = PeftModel.from_pretrained(make(kind), tmp_path / "out")
    with torch.no_grad():
        found = tuned(IDS).logits
        # As composable-sft trains: the output matrix untied, and frozen as it was.
        reference = make(kind)
        head = reference.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for parameter, difference in diffs.items():
            reference.get_parameter(parameter).add_(difference)
        assert torch.allclose(found, reference(IDS).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["bert mlm", "xlmr mlm"])
def test_the_head_of_a_masked_language_model_on_request(tmp_path, name):
    make, kind = MODELS[name]
    model = make(kind)
    model.save_pretrained(tmp_path / "base")
    frozen = ("transform.LayerNorm", "decoder")
    heads = {n: t for n, t in heads_of(model).items() if not any(part in n for part in frozen)}
    diffs = differences(model)
    write_diff(tmp_path / "sft", diffs, heads)
    imported = import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base", with_head=True)
    assert imported.left_out == ()
    reference = make(kind)
    output = reference.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    with torch.no_grad():
        for parameter, difference in diffs.items():
            reference.get_parameter(parameter).add_(difference)
        for parameter, tensor in heads.items():
            reference.get_parameter(parameter).copy_(tensor)
        expected = reference(IDS).logits
        tuned = PeftModel.from_pretrained(make(kind), tmp_path / "out")
        assert torch.allclose(tuned(IDS).logits, expected, atol=1e-5)
        assert torch.allclose(tuned.merge_and_unload()(IDS).logits, expected, atol=1e-5)
        merge_checkpoint(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
        on_disk = kind.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(on_disk(IDS).logits, expected, atol=1e-5)


def test_the_head_of_a_masked_language_model_needs_the_base(tmp_path):
    model = bert(BertForMaskedLM)
    write_diff(tmp_path / "sft", differences(model), {"cls.predictions.bias": torch.randn(40)})
    with pytest.raises(ConfigError, match=r"(?s)kept as a difference from the base's own.*--base"):
        import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base", with_head=True)
    assert not (tmp_path / "out").exists()


def test_no_head(tmp_path, base):
    write_diff(tmp_path / "sft", differences(base), heads_of(base))
    imported = import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base", with_head=False)
    assert imported.heads == ()
    assert set(imported.left_out) == {"classifier.weight", "classifier.bias"}
    assert read_adapter(tmp_path / "out").others == {}


def test_bistil(tmp_path, base):
    # Sparse heads are differences from zero; block-sparse layers are none that an adapter could hold.
    heads = {"classifier.weight": encode(torch.eye(7, 16) * 3), "classifier.bias": torch.arange(7.0)}
    write_diff(tmp_path / "sft", differences(base), heads, block_sparses={})
    import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base")
    merged = PeftModel.from_pretrained(bert(num_labels=7), tmp_path / "out").merge_and_unload()
    assert torch.equal(merged.classifier.weight.data, torch.eye(7, 16) * 3)
    assert merged.classifier.bias.tolist() == list(range(7))
    write_diff(tmp_path / "blocks", {}, {}, block_sparses={"bert.pooler": {"parameters": {}, "buffers": {}}})
    with pytest.raises(FormatError, match=r"block-sparse ones \('block_sparses'\)"):
        import_adapter(tmp_path / "blocks", tmp_path / "no", base="some/base")


def test_the_task_by_the_head(tmp_path):
    for name, expected in {"bert tokens": "TOKEN_CLS", "bert sequence": "SEQ_CLS", "xlmr sequence": "SEQ_CLS"}.items():
        make, kind = MODELS[name]
        model = make(kind)
        write_diff(tmp_path / name, differences(model), heads_of(model))
        import_adapter(tmp_path / name, tmp_path / f"{name} out", base="some/base")
        config = json.loads((tmp_path / f"{name} out" / "adapter_config.json").read_text())
        assert (name, config["task_type"]) == (name, expected)


def test_the_base_by_its_vocabulary_and_by_name(tmp_path):
    rows = torch.zeros(119_547, 768)
    rows[5, 7] = 1
    write_diff(tmp_path / "sft", {"bert.embeddings.word_embeddings.weight": rows})
    assert import_adapter(tmp_path / "sft", tmp_path / "out").base == "google-bert/bert-base-multilingual-cased"
    other = {"roberta.encoder.layer.0.attention.self.query.weight": torch.eye(4)}
    write_diff(tmp_path / "xlmr-task-sft-nli", other)
    assert import_adapter(tmp_path / "xlmr-task-sft-nli", tmp_path / "out2").base == "FacebookAI/xlm-roberta-base"
    write_diff(tmp_path / "mine", other)
    with pytest.raises(ConfigError, match=r"does not say which base model it belongs to.*--base"):
        import_adapter(tmp_path / "mine", tmp_path / "out3")
    assert not (tmp_path / "out3").exists()


def test_published_names():
    assert published_task("cambridgeltl/mbert-task-sft-pos-ms") == "pos" == published_task("/x/mbert-task-sft-pos")
    assert published_task("cambridgeltl/xlmr-task-sft-nusax_senti-ms") == "nusax_senti"
    assert published_task("cambridgeltl/mbert-lang-sft-hau-small") is published_task("bert") is None
    assert published_base("cambridgeltl/mbert-lang-sft-hau-small") == "google-bert/bert-base-multilingual-cased"
    assert published_base("roberta") is None
    assert [len(labels) for _, labels in TASKS.values()] == [17, 7, 38, 3, 3, 0]
    for task in ("pos", "masakhaner", "dp"):
        assert list(TASKS[task][1]) == sorted(TASKS[task][1])


def test_another_base_is_refused_by_name(tmp_path, base):
    write_diff(tmp_path / "sft", differences(base), heads_of(base))
    smaller = bert()
    smaller.resize_token_embeddings(33)
    smaller.save_pretrained(tmp_path / "smaller")
    with pytest.raises(
        FormatError, match=r"(?s)does not belong to .*smaller.*word_embeddings.weight: \[40, 16\] in the"
    ):
        import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "smaller")
    xlmr().save_pretrained(tmp_path / "xlmr")
    with pytest.raises(FormatError, match=r"(?s)does not belong to .*xlmr.*lacks \d+ of the \d+ parameters.*bert\."):
        import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "xlmr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config of a transformers model"):
        import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "empty", "sft", "smaller", "xlmr"]


def test_a_base_of_the_hub_that_cannot_be_had_is_only_warned_of(tmp_path, base, caplog):
    write_diff(tmp_path / "sft", differences(base))
    import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base")
    assert "Whether the adapter fits some/base was not checked" in caplog.text


def test_of_a_bare_checkpoint_and_one_of_another_task(tmp_path, base):
    # Names are those of the class that was trained; the base on disk is a masked language model without a pooler.
    bert(BertForMaskedLM).save_pretrained(tmp_path / "mlm")
    write_diff(tmp_path / "sft", differences(base), heads_of(base))
    import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "mlm")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "mlm", num_labels=7)
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    expected = add(bert(BertForMaskedLM), dict(differences(base).items()))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(merged.get_parameter(name), expected[name])


def test_the_adapter_trains_on(tmp_path, base):
    write_diff(tmp_path / "sft", differences(base), heads_of(base))
    import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base")
    model = PeftModel.from_pretrained(bert(num_labels=7), tmp_path / "out", is_trainable=True)
    model(IDS, labels=torch.zeros_like(IDS)).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("sparse_ft_weight" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)


def test_mixed_dtypes_are_kept_exactly(tmp_path):
    diffs = {
        "bert.a.weight": torch.eye(3, dtype=torch.bfloat16),
        "bert.b.weight": torch.eye(3, dtype=torch.float16) * 0.1,
        "bert.c.bias": torch.tensor([0.0, 2.0], dtype=torch.float16),
    }
    write_diff(tmp_path / "sft", diffs)
    import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base")
    found = read_adapter(tmp_path / "out")
    assert found.config["values_dtype"] == "float32"
    for name, difference in diffs.items():
        assert torch.equal(found.deltas[name].to_dense(), difference.float())


def test_what_cannot_be_held_is_refused(tmp_path, base):
    write_diff(tmp_path / "a", {"bert.scale": torch.ones(3)})
    with pytest.raises(FormatError, match=r"changes 'bert.scale', and a sparse adapter holds only"):
        import_adapter(tmp_path / "a", tmp_path / "out", base="some/base")
    write_diff(tmp_path / "b", {"classifier.weight": torch.eye(3)}, {"classifier.bias": torch.ones(3)})
    with pytest.raises(FormatError, match=r"holds 'classifier.bias' whole, in a module whose other parameters"):
        import_adapter(tmp_path / "b", tmp_path / "out", base="some/base")
    write_diff(tmp_path / "c", {"bert.a.weight": torch.zeros(3, 3)})
    with pytest.raises(FormatError, match=r"changes no weight of the base model"):
        import_adapter(tmp_path / "c", tmp_path / "out", base="some/base")
    assert not (tmp_path / "out").exists()


def test_the_output_is_not_overwritten_unless_told_to(tmp_path, base):
    write_diff(tmp_path / "sft", differences(base))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and is not empty"):
        import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base")
    import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base", overwrite=True)
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"
    read_adapter(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"There is no folder"),
        ("empty", r"holds neither pytorch_diff.bin \(composable-sft, BiStil\) nor adapter_config.json"),
        ("lora", r"is of peft_type 'LORA', and only \['SFT', 'ROSA'\]"),
        ("ours", r"is an adapter of this library already"),
        ("both", r"holds pytorch_diff.bin and adapter_config.json, so two adapters"),
    ],
)
def test_other_folders_are_refused(tmp_path, name, message):
    for folder in ("empty", "lora", "ours", "both"):
        (tmp_path / folder).mkdir()
    for folder, kind in {"lora": "LORA", "ours": "SPARSE_FT", "both": "SFT"}.items():
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    write_diff(tmp_path / "both", {})
    with pytest.raises((ConfigError, FormatError), match=message):
        import_adapter(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_file_itself_can_be_named(tmp_path, base):
    write_diff(tmp_path / "sft", differences(base))
    imported = import_adapter(tmp_path / "sft" / "pytorch_diff.bin", tmp_path / "out", base="some/base")
    assert imported.kind == "composable-sft"


def test_tied_matrices_are_found_under_either_name(tmp_path):
    model = xlmr(XLMRobertaForMaskedLM)
    names = [n for n, _ in model.named_parameters()]
    assert "roberta.embeddings.word_embeddings.weight" not in names  # the head is listed first
    write_diff(tmp_path / "sft", {"roberta.embeddings.word_embeddings.weight": torch.ones(40, 16)})
    model.save_pretrained(tmp_path / "base")
    import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base")
    merged = PeftModel.from_pretrained(xlmr(XLMRobertaForMaskedLM), tmp_path / "out").merge_and_unload()
    assert torch.equal(
        merged.roberta.embeddings.word_embeddings.weight, model.roberta.embeddings.word_embeddings.weight + 1
    )
    assert torch.equal(merged.lm_head.decoder.weight, model.lm_head.decoder.weight)
