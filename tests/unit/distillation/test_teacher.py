"""Teachers with adapters: languages below a task, generated ones, `resident`, and whom they teach."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    BertForSequenceClassification,
    BertModel,
)

from peft_sparse import (
    ConfigError,
    MadGConfig,
    MultiSourceCollator,
    MultiSourceDataset,
    RandConfig,
    evaluation_batches,
    iter_deltas,
    resident,
)
from peft_sparse.distillation import DistillationTrainer, Teacher, make_student
from tests.support.distillation import BATCH, classifier, rows
from tests.support.tokenizers import make_bert
from tests.support.training import make_args


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("ind", "jav")):
        config = RandConfig(num_weights=300, init_weights=False, seed=seed, target_modules="all")
        torch.manual_seed(seed)
        get_peft_model(classifier(), config).save_pretrained(folder / name)
    torch.manual_seed(9)
    config = RandConfig(num_weights=200, init_weights=False, modules_to_save=["classifier"])
    task = get_peft_model(classifier(), config)
    torch.nn.init.normal_(task.base_model.model.classifier.modules_to_save["default"].weight)
    task.save_pretrained(folder / "task")
    return folder


@torch.no_grad()
def merged(folder, *names):
    model = classifier()
    for name in names:
        model = PeftModel.from_pretrained(model, folder / name).merge_and_unload()
    return model.eval()(**BATCH).logits


@torch.no_grad()
def test_a_teacher_speaks_each_language_below_the_task(adapters):
    teacher = Teacher(
        classifier(), languages={"ind": adapters / "ind", "jav": adapters / "jav"}, task=adapters / "task"
    )
    for language in ("ind", "jav", "ind"):
        found = teacher(language, **BATCH).logits
        torch.testing.assert_close(found, merged(adapters, language, "task"))
    assert not torch.allclose(merged(adapters, "ind", "task"), merged(adapters, "jav", "task"))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    with pytest.raises(
        ConfigError, match=r"must be one that the teacher has an adapter for \(\['ind', 'jav'\]\), got 'min'"
    ):
        teacher("min", **BATCH)
    with pytest.raises(ConfigError, match="got None"):
        teacher(**BATCH)
    alone = Teacher(classifier(), languages={"ind": adapters / "ind"})
    torch.testing.assert_close(alone(**BATCH).logits, merged(adapters, "ind"))


@torch.no_grad()
def test_a_teacher_in_a_model_that_others_use(adapters):
    """Adapters that are there keep their weights, whatever they are called, and another's switch is undone."""
    model = PeftModel.from_pretrained(classifier(), adapters / "ind", adapter_name="task")
    held = {name: delta.values.clone() for name, _, _, delta in iter_deltas(model, "task")}
    teacher = Teacher(model, languages={"ind": "task", "jav": adapters / "jav"}, task=adapters / "task")
    assert all(torch.equal(delta.values, held[name]) for name, _, _, delta in iter_deltas(model, "task"))
    expected = {language: merged(adapters, language, "task") for language in ("ind", "jav")}
    torch.testing.assert_close(teacher("ind", **BATCH).logits, expected["ind"])
    model.set_adapter("task")
    torch.testing.assert_close(teacher("ind", **BATCH).logits, expected["ind"])
    torch.testing.assert_close(teacher("jav", **BATCH).logits, expected["jav"])


@torch.no_grad()
def test_a_teacher_whose_languages_are_generated(tmp_path):
    vectors = {"ind": torch.tensor([1.0, 0.0, 1.0]), "jav": torch.tensor([0.0, 1.0, 1.0])}
    config = MadGConfig(bottleneck_size=3, language_dim=4, typology=vectors, language="ind", init_weights=False)
    torch.manual_seed(4)
    tuned = get_peft_model(classifier(), config).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    expected = {}
    for language in vectors:
        with tuned.base_model.set_language(language):
            expected[language] = tuned(**BATCH).logits
    tuned.base_model.set_language("jav")
    tuned.base_model.set_language("ind")
    tuned.save_pretrained(tmp_path / "madg")
    assert not torch.allclose(expected["ind"], expected["jav"])
    teacher = Teacher(classifier(), languages=dict.fromkeys(vectors, tmp_path / "madg"))
    assert len(teacher.model.peft_config) == 1
    for language in ("jav", "ind", "jav"):
        assert torch.equal(teacher(language, **BATCH).logits, expected[language])
    with pytest.raises(ConfigError, match="got 'min'"):
        teacher("min", **BATCH)
    with pytest.raises(ConfigError, match="min"):
        Teacher(classifier(), languages={"ind": tmp_path / "madg", "min": tmp_path / "madg"})


@torch.no_grad()
def test_a_resident_teacher_switches_exactly(adapters):
    base = classifier()
    teacher = Teacher(base, languages={"ind": adapters / "ind", "jav": adapters / "jav"}, task=adapters / "task")
    expected = {language: teacher(language, **BATCH).logits for language in ("ind", "jav")}
    pristine = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    with resident(teacher.model):
        for language in ("jav", "ind", "jav", "ind") * 5:
            torch.testing.assert_close(teacher(language, **BATCH).logits, expected[language])
    assert all(torch.equal(tensor, pristine[name]) for name, tensor in teacher.model.state_dict().items())
    for language, logits in expected.items():
        assert torch.equal(teacher(language, **BATCH).logits, logits)


def test_a_student_of_a_resident_teacher_learns_the_same(adapters, tmp_path):
    ends = []
    for is_resident in (False, True):
        languages = {"ind": adapters / "ind", "jav": adapters / "jav"}
        teacher = Teacher(make_bert(40, cls=BertForSequenceClassification, num_labels=3), languages=languages)
        student = make_student(make_bert(40, cls=BertModel), stride=2)
        batches = MultiSourceDataset({"ind": rows(6), "jav": rows(6)}, num_batches=6, batch_size=3, exponent=0.0)
        # Adam would divide what rounding leaves of a gradient of zero by its own size.
        args = make_args(tmp_path, max_steps=6, per_device_train_batch_size=1, learning_rate=0.1, optim="sgd")
        collate = MultiSourceCollator(torch.utils.data.default_collate)
        with resident(teacher.model) if is_resident else nullcontext():
            DistillationTrainer(
                model=student, teacher=teacher, args=args, train_dataset=batches, data_collator=collate
            ).train()
        ends.append(student.state_dict())
    start = make_student(make_bert(40, cls=BertModel), stride=2).state_dict()
    assert not torch.allclose(
        ends[0]["encoder.layer.1.output.dense.weight"], start["encoder.layer.1.output.dense.weight"]
    )
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_batches_of_two_languages_train_a_full_student_in_phase_one(adapters, tmp_path):
    teacher = Teacher(make_bert(40, cls=BertForSequenceClassification, num_labels=3),
                      languages={"ind": adapters / "ind", "jav": adapters / "jav"})  # fmt: skip
    student = make_student(make_bert(40, cls=BertModel), stride=2)
    seen: list[str] = []
    activate = teacher.activate
    teacher.activate = lambda language: (seen.append(language), activate(language))
    batches = MultiSourceDataset({"ind": rows(6), "jav": rows(6)}, num_batches=6, batch_size=3, exponent=0.0)
    collate = MultiSourceCollator(torch.utils.data.default_collate)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=make_args(tmp_path, max_steps=6, per_device_train_batch_size=1,
        per_device_eval_batch_size=1), train_dataset=batches, data_collator=collate,
        eval_dataset=evaluation_batches({"ind": rows(3)}, batch_size=3),
    )  # fmt: skip
    trainer.train()
    assert {"ind", "jav"} == set(seen[:6])
    assert seen[:6].count("ind") == batches.counts["ind"]
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"} <= moved
    metrics = trainer.evaluate()  # without labels there is a loss all the same
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_attention"] + metrics["eval_loss_hidden"])
