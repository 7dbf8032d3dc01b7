"""Distillation in trainers: what the loss is, who learns, what is written, and the phases of sparse trainers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModel,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BloomConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    ModernBertConfig,
    RoFormerConfig,
    Trainer,
    XGLMConfig,
)

from peft_sparse import (
    ConfigError,
    DeftXConfig,
    LotteryTicketConfig,
    MadGConfig,
    MultiSourceCollator,
    MultiSourceDataset,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    evaluation_batches,
    iter_deltas,
    resident,
    sparse_trainer,
)
from peft_sparse.distillation import DistillationLoss, DistillationTrainer, Teacher, distilled_trainer, make_student
from peft_sparse.distillation.attention import AttentionMaps, is_causal, is_checkpointing
from peft_sparse.distillation.losses import attention_loss, hidden_loss, pair_mask, prediction_loss, prediction_mask
from tests.support.tokenizers import make_bert, make_llama
from tests.support.training import make_args

IDS = torch.tensor([[1, 5, 7, 9, 2], [4, 6, 8, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
LABELLED = {**BATCH, "labels": torch.tensor([0, 2])}


def rows(count: int = 8, *, labels: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        ids = torch.randint(1, 40, (5,), generator=generator)
        ids[5 - number % 3 :] = 0
        found.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
        if labels:
            found[-1]["labels"] = int(ids[0]) % 3
    return found


def make_trainer(folder, student, teacher, *, cls=DistillationTrainer, labels=False, dense_args=None, **changes):
    loss, layers = changes.pop("loss", "general"), changes.pop("layers", None)
    more = {} if dense_args is None else {"dense_args": dense_args}
    return cls(
        model=student, teacher=teacher, loss=loss, layers=layers, args=make_args(folder, **{"max_steps": 2, **changes}),
        train_dataset=rows(labels=labels), eval_dataset=rows(4, labels=labels), **more,
    )  # fmt: skip


def classifier(**changes):
    return make_bert(40, cls=BertForSequenceClassification, num_labels=3, **changes)


@torch.no_grad()
def by_hand(student, teacher, batch, layers, *, causal=False, next_token=False, windows=None) -> dict[str, float]:
    """The three terms, from the models' own outputs in eager attention and float64."""
    results = []
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        results.append(model(**inputs, output_attentions=True, output_hidden_states=True))
    own, target = results
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    windows = windows or [None] * len(layers)
    terms = {
        "attention": attention_loss(
            [one.double() for one in own.attentions],
            [target.attentions[index].double() for index in layers],
            [pair_mask(mask, causal=causal, window=window) for window in windows],
        ),
        "hidden": hidden_loss(
            [one.double() for one in own.hidden_states],
            [target.hidden_states[index].double() for index in (0, *(layer + 1 for layer in layers))],
            mask,
        ),
    }
    if "logits" in own:
        counted = (
            torch.ones(len(mask))
            if own.logits.dim() == 2
            else prediction_mask(mask, batch.get("labels"), next_token=next_token)
        )
        terms["prediction"] = prediction_loss(own.logits.double(), target.logits.double(), counted, temperature=2.0)
    return {name: term.item() for name, term in terms.items()}


MODELS = {
    "classifier": (classifier, LABELLED, {}),
    "encoder": (lambda: make_bert(40, cls=BertModel), BATCH, {}),
    "tagger": (
        lambda: make_bert(40, cls=BertForTokenClassification, num_labels=3),
        {**BATCH, "labels": torch.tensor([[-100, 1, 2, 0, -100], [0, 1, -100, -100, -100]])},
        {},
    ),
    "decoder": (lambda: make_llama(40), BATCH, {"causal": True, "next_token": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_sum_of_its_terms(name, tmp_path):
    make, batch, settings = MODELS[name]
    base = make()
    student = make_student(base, stride=2)
    with torch.no_grad():  # so that the copied layers differ from the teacher's
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    has_logits = name != "encoder"
    weights = DistillationLoss(attention=2.0, hidden=3.0, prediction=5.0 if has_logits else 0.0)
    trainer = make_trainer(tmp_path, student, Teacher(base), loss=weights)
    found = trainer.compute_loss(student, dict(batch))
    expected = by_hand(student, make().eval(), batch, [1, 3], **settings)
    assert all(term > 1e-4 for term in expected.values())
    total = sum(getattr(weights, term) * value for term, value in expected.items())
    assert found.item() == pytest.approx(total, rel=1e-5)
    assert trainer._means(True, "") == pytest.approx(expected, rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    base = classifier()
    trainer = make_trainer(tmp_path, make_student(base, stride=1), Teacher(base))
    assert trainer.compute_loss(trainer.model, dict(LABELLED)).item() == 0


def test_sliding_windows_count_only_what_they_see(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=40, num_hidden_layers=4, layer_types=kinds, sliding_window=3, intermediate_size=32, **sizes
    )
    base = Gemma3ForCausalLM(config).eval()
    other = Gemma3ForCausalLM(config).eval()
    student = make_student(other, stride=2)
    trainer = make_trainer(tmp_path, student, Teacher(base))
    trainer.compute_loss(student, dict(BATCH))
    expected = by_hand(student, base, BATCH, [1, 3], causal=True, next_token=True, windows=[3, None])
    assert trainer._means(True, "") == pytest.approx({k: expected[k] for k in ("attention", "hidden")}, rel=1e-5)


def attention_of(config) -> tuple[bool, list[int | None], list[torch.Tensor]]:
    """What is said of a model's attention, and its maps [B, H, T, T]."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), AttentionMaps(model, range(2)) as caught:
        model(input_ids=torch.arange(5, 13)[None])
    return is_causal(model), [caught.windows[index] for index in range(2)], caught.maps()


SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS_OF_ATTENTION = {
    "bloom": BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
    "xglm": XGLMConfig(vocab_size=40, d_model=16, num_layers=2, attention_heads=2, ffn_dim=24),
    "a decoder of an encoder's kind": RoFormerConfig(**SIZES, is_decoder=True),
    "an encoder of its kind": RoFormerConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3),
    "modernbert": ModernBertConfig(
        **SIZES, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
}


@pytest.mark.parametrize("kind", KINDS_OF_ATTENTION)
def test_which_pairs_count_is_what_the_model_computes(kind):
    causal, windows, maps = attention_of(KINDS_OF_ATTENTION[kind])
    everywhere = torch.ones(1, 8, dtype=torch.long)
    for window, found in zip(windows, maps, strict=True):
        assert torch.equal(found[:, 0] > 0, pair_mask(everywhere, causal=causal, window=window))


@pytest.mark.parametrize(("own", "theirs"), [([0, 1], [0, 1]), ([0, 3], [3, 0])])
def test_a_last_layer_and_one_in_the_middle_are_both_compared_before_the_final_norm(own, theirs, tmp_path):
    base, other = make_llama(40), make_llama(40, seed=1)
    torch.nn.init.uniform_(base.model.norm.weight, 2, 3)
    student = make_student(other, layers=own)
    raw = {}
    for name, model, depth in (("own", student, 2), ("theirs", base, 4)):
        for index in range(depth):
            keep = lambda _, __, output, key=(name, index): raw.update({key: output.detach().double()})  # noqa: E731
            model.model.layers[index].register_forward_hook(keep)
    trainer = make_trainer(tmp_path, student, Teacher(base), loss=DistillationLoss(attention=0.0), layers=theirs)
    found = trainer.compute_loss(student, dict(BATCH)).item()
    embedded = [model.get_input_embeddings()(IDS).detach().double() for model in (student, base)]
    pairs = [(raw["own", place], raw["theirs", index]) for place, index in enumerate(theirs)]
    expected = hidden_loss([embedded[0], *(a for a, _ in pairs)], [embedded[1], *(b for _, b in pairs)],
                           BATCH["attention_mask"])  # fmt: skip
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_of_the_first_layers_starts_without_a_difference(tmp_path):
    base = make_llama(40)
    trainer = make_trainer(tmp_path, make_student(base, layers=[0, 1]), Teacher(base))
    assert trainer.compute_loss(trainer.model, dict(BATCH)).item() == 0


def test_predictions_alone_ask_for_no_layers(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    base = AlbertForSequenceClassification(AlbertConfig(vocab_size=40, embedding_size=8, num_labels=3, **sizes))
    loss = DistillationLoss(attention=0.0, hidden=0.0, prediction=1.0)
    trainer = make_trainer(tmp_path, classifier(), Teacher(base), loss=loss)
    with torch.no_grad():
        found, own, target = trainer.compute_loss(trainer.model, dict(BATCH)), trainer.model(**BATCH), base(**BATCH)
    expected = prediction_loss(own.logits, target.logits, torch.ones(2), temperature=2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_of_another_order_are_refused(tmp_path):
    names = ["negative", "neutral", "positive"]
    base = classifier(id2label=dict(enumerate(names)))
    trainer = make_trainer(tmp_path, make_student(base, stride=2), Teacher(base), loss="teacher_forcing")
    assert trainer.compute_loss(trainer.model, dict(LABELLED)).isfinite()
    for config, match in (
        ({"id2label": dict(enumerate(names[::-1]))}, r"same labels in the same order .*, got \['positive'"),
        ({"problem_type": "regression"}, "distributions over labels that exclude each other"),
    ):
        student = make_student(classifier(**config), stride=2)
        trainer = make_trainer(tmp_path, student, Teacher(classifier(id2label=dict(enumerate(names)))),
                               loss="teacher_forcing")  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            trainer.compute_loss(student, dict(LABELLED))


def test_spans_of_answers(tmp_path):
    base = make_bert(40, cls=BertForQuestionAnswering)
    student = make_student(make_bert(40, cls=BertForQuestionAnswering, initializer_range=0.5), stride=2)
    trainer = make_trainer(tmp_path, student, Teacher(base), loss=DistillationLoss(attention=0, hidden=0, prediction=1))
    found = trainer.compute_loss(student, dict(BATCH)).item()
    total = 0.0
    with torch.no_grad():
        own, target = student(**BATCH), base(**BATCH)
    for name in ("start_logits", "end_logits"):
        for row, length in enumerate([5, 3]):
            one, other = own[name][row, :length].double() / 2, target[name][row, :length].double() / 2
            total -= (other.softmax(0) * one.log_softmax(0)).sum().item() / 4
    assert found == pytest.approx(total, rel=1e-5)


def test_training_learns_logs_each_term_and_writes_the_student_alone(tmp_path):
    base = classifier()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = make_trainer(
        tmp_path, make_student(base, stride=2), Teacher(base), loss="teacher_forcing", labels=True, max_steps=6,
        save_strategy="steps", save_steps=6, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for entry in logs:
        terms = entry["loss_attention"] + entry["loss_hidden"] + entry["loss_prediction"]
        assert entry["loss"] == pytest.approx(terms, rel=1e-3)  # also with accumulated gradients
    assert logs[-1]["loss_hidden"] < logs[0]["loss_hidden"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    written = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert set(written) == set(trainer.model.state_dict())
    assert not isinstance(trainer.teacher, torch.nn.Module)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        sum(metrics[f"eval_loss_{n}"] for n in ("attention", "hidden", "prediction"))
    )
    assert BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6").config.num_hidden_layers == 2


def test_gold_labels_enter_nowhere_but_by_their_own_weight(tmp_path):
    base = classifier()
    student = make_student(base, stride=2)
    trainer = make_trainer(tmp_path, student, Teacher(base), loss="teacher_forcing")
    one = trainer.compute_loss(student, dict(LABELLED))
    other = trainer.compute_loss(student, {**BATCH, "labels": torch.tensor([1, 1])})
    assert torch.equal(one, other)
    weighted = make_trainer(tmp_path, student, Teacher(classifier()), loss=DistillationLoss(prediction=1, labels=2))
    with torch.no_grad():
        labels = student(**LABELLED).loss
        assert weighted.compute_loss(student, dict(LABELLED)).item() == pytest.approx(
            (one + 2 * labels).item(), rel=1e-5
        )


def test_evaluation_gives_the_students_own_logits(tmp_path):
    seen = {}
    base = classifier()
    student = make_student(base, stride=2)
    trainer = make_trainer(tmp_path, student, Teacher(base), labels=True)
    trainer.compute_metrics = lambda found: seen.update(logits=found.predictions, labels=found.label_ids) or {}
    trainer.evaluate()
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows(4, labels=True)]) for key in LABELLED}
    with torch.no_grad():
        expected = student(**batch).logits
    torch.testing.assert_close(torch.tensor(seen["logits"]), expected)
    assert seen["labels"].tolist() == batch["labels"].tolist()


def test_the_terms_of_an_evaluation_add_up_to_its_loss(tmp_path):
    """With a last batch that is smaller than the others."""
    base = classifier()
    student = make_student(base, stride=2)
    torch.nn.init.normal_(student.get_input_embeddings().weight)
    trainer = make_trainer(tmp_path, student, Teacher(base), per_device_eval_batch_size=3)
    found = trainer.evaluate()
    singly = [trainer.compute_loss(student, {k: v[None] for k, v in row.items()}).item() for row in rows(4)]
    assert len({round(loss, 4) for loss in singly}) == 4
    assert found["eval_loss_attention"] + found["eval_loss_hidden"] == pytest.approx(found["eval_loss"], rel=1e-6)


# Languages and adapters


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


# Sparse trainers


@pytest.mark.parametrize(
    "order", [lambda: distilled_trainer(SparseTrainer), lambda: sparse_trainer(DistillationTrainer)]
)
def test_both_phases_of_a_lottery_ticket_go_by_the_teacher(order, tmp_path):
    base = classifier()
    config = LotteryTicketConfig(num_weights=60, modules_to_save=["classifier"])
    student = get_peft_model(make_student(base, stride=2), config)
    frozen = {name: tensor.clone() for name, tensor in student.base_model.model.bert.state_dict().items()}
    trainer = make_trainer(
        tmp_path, student, Teacher(base), cls=order(), labels=True, loss="teacher_forcing", dense_args={"max_steps": 2}
    )
    trainer.train()
    history = [*trainer.dense_state.log_history, *trainer.state.log_history]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["phase"] for entry in logged] == ["dense", "dense", "sparse", "sparse"]
    for entry in logged:
        terms = sum(entry[f"loss_{name}"] for name in ("attention", "hidden", "prediction"))
        assert entry["loss"] == pytest.approx(terms, rel=1e-3)
    assert sum(student.peft_config["default"].counts.values()) == 60
    kept = {n: t for n, t in student.base_model.model.bert.state_dict().items() if n in frozen and "sparse_ft" not in n}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in kept.items())
    student.save_pretrained(tmp_path / "task")
    plain = PeftModel.from_pretrained(make_student(classifier(), stride=2), tmp_path / "task").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**BATCH).logits, student.eval()(**BATCH).logits)


TICKETS = {
    "LT-SFT": lambda **fields: LotteryTicketConfig(**fields),
    "SC-SFT": lambda **fields: LotteryTicketConfig(**fields, budget={r"layer\.0\.": 0.75, r"^(?!.*layer\.0\.)": 0.25}),
    "DeFT-X": lambda **fields: DeftXConfig(**fields, rank=2, residual_density=0.3),
}


# Changes as large as gradients: Adam's first steps are all of one size.
PLAIN_STEPS = {"optim": "sgd", "learning_rate": 0.1}


def selected_by_hand(name: str, folder, base, teacher) -> dict[str, list[int]]:
    """What a full-rank run under the distillation loss says of a ticket's 60 weights."""
    student = make_student(base, stride=2)
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    trainer = make_trainer(
        folder, student, Teacher(teacher), labels=True, loss="teacher_forcing", **PLAIN_STEPS, max_steps=3
    )
    trainer.train()
    moved = {n: (p.detach() - before[n]) for n, p in student.named_parameters() if n.startswith("bert.")}
    scores = {}
    for key, change in moved.items():
        if name == "DeFT-X" and change.dim() == 2 and "embeddings" not in key:
            left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
            leading = (left[:, :2] * values[:2]) @ right[:2]
            rest = change.double() - leading
            kept = rest.abs().flatten().topk(round(0.3 * rest.numel())).indices
            whole = leading.flatten()
            whole[kept] = change.double().flatten()[kept]
            change = whole.reshape(change.shape)
        scores[key] = change.double().abs().flatten()
    groups = [(60, list(scores))]
    if name == "SC-SFT":
        first = [key for key in scores if "layer.0." in key]
        groups = [(45, first), (15, [key for key in scores if key not in first])]
    chosen: dict[str, list[int]] = {key: [] for key in scores}
    for count, keys in groups:
        every = torch.cat([scores[key] for key in keys])
        places = [(key, index) for key in keys for index in range(scores[key].numel())]
        for place in every.topk(count).indices.tolist():
            chosen[places[place][0]].append(places[place][1])
    return {key: sorted(indices) for key, indices in chosen.items()}


@pytest.mark.parametrize("name", [pytest.param(t, marks=[pytest.mark.slow] * (t != "LT-SFT")) for t in TICKETS])
def test_every_ticket_is_drawn_by_the_distillation_loss(name, tmp_path):
    base, teacher = classifier(), classifier(initializer_range=0.5)
    config = TICKETS[name](
        num_weights=60, target_modules="all", target_biases=True, target_norms=True, modules_to_save=["classifier"]
    )
    student = get_peft_model(make_student(base, stride=2), config)
    trainer = make_trainer(
        tmp_path, student, Teacher(teacher), cls=distilled_trainer(SparseTrainer), labels=True,
        loss="teacher_forcing", **PLAIN_STEPS, dense_args={"max_steps": 3},
    )  # fmt: skip
    trainer.train()
    found = {key: delta.indices.tolist() for key, _, _, delta in iter_deltas(student, "default")}
    expected = selected_by_hand(name, tmp_path, classifier(), teacher)
    assert {key: indices for key, indices in found.items() if indices} == {k: v for k, v in expected.items() if v}
    labels = selected_by_hand(name, tmp_path, classifier(), classifier(initializer_range=0.2))
    assert labels != expected  # another teacher, other weights


def test_gradients_of_the_distillation_loss_choose_weights(tmp_path):
    base = classifier()
    chosen = []
    for loss in ("teacher_forcing", "self_taught"):
        config = OneShotConfig(num_weights=40, criterion="fisher", modules_to_save=["classifier"])
        student = get_peft_model(make_student(base, stride=2), config)
        teacher = Teacher(classifier(initializer_range=0.5))
        trainer = make_trainer(tmp_path, student, teacher, cls=distilled_trainer(SparseTrainer), labels=True, loss=loss)
        trainer.train()
        chosen.append({name: delta.indices.tolist() for name, _, _, delta in iter_deltas(student, "default")})
        assert sum(map(len, chosen[-1].values())) == 40
    assert chosen[0] != chosen[1]


def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(tmp_path):
    results = []
    for resume in (False, True):
        base = classifier()
        trainer = make_trainer(
            tmp_path, make_student(base, stride=2), Teacher(base), max_steps=4, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        results.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# Refusals


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    base = classifier()
    student = make_student(base, stride=2)
    cases = [
        (student, None, {}, r"teacher must be a Teacher\(base"),
        (student, base, {}, "got BertForSequenceClassification"),
        (base, Teacher(base), {}, "shares weights with the student"),
        (student, Teacher(make_bert(41)), {}, "same rows of embeddings, got 40 and 41"),
        (student, Teacher(make_bert(40, hidden_size=8)), {}, "same hidden_size, got 16 and 8"),
        (student, Teacher(make_bert(40, num_attention_heads=4)), {}, "same num_attention_heads, got 2 and 4"),
        (student, Teacher(base), {"layers": [1]}, r"for each of the student's 2, got \[1\]"),
        (make_student(student, layers=[0]), Teacher(base), {}, r"made of a model of 2 layers, .*has 4: say"),
        (student, Teacher(base), {"loss": "tf"}, "loss must be one of"),
    ]
    for own, teacher, changes, match in cases:
        with pytest.raises(ConfigError, match=match):
            make_trainer(tmp_path, own, teacher, **changes)
    with pytest.raises(ConfigError, match=r"derived from transformers\.Trainer"):
        distilled_trainer(dict)
    assert distilled_trainer(Trainer) is DistillationTrainer is distilled_trainer(DistillationTrainer)


def test_attention_that_would_be_empty_is_refused(tmp_path):
    base = classifier()
    student = make_student(base, stride=2)
    trainer = make_trainer(tmp_path, student, Teacher(base))
    assert student.config._attn_implementation == base.config._attn_implementation == "eager"
    student.set_attn_implementation("sdpa")
    with pytest.raises(
        ConfigError, match=r"gave no attention probabilities in the layers \[0, 1\] \(attention: sdpa\)"
    ):
        trainer.compute_loss(student, dict(LABELLED))


def test_reentrant_checkpoints_are_refused(tmp_path):
    base = classifier()
    student = make_student(base, stride=2)
    trainer = make_trainer(tmp_path, student, Teacher(base))
    plain = trainer.compute_loss(student, dict(LABELLED))
    plain.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.compute_loss(student, dict(LABELLED)).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="no gradient under reentrant gradient checkpointing"):
        trainer.compute_loss(student, dict(LABELLED))


def test_checkpointing_is_asked_for_under_its_newer_name_where_there_is_one():
    class Older:
        is_gradient_checkpointing = True

    class Newer:
        is_activation_checkpointing = True

        @property
        def is_gradient_checkpointing(self):
            raise FutureWarning("deprecated")

    assert is_checkpointing(Older()) is is_checkpointing(Newer()) is True
    model = classifier()
    assert is_checkpointing(model) is False
    model.gradient_checkpointing_enable()
    assert is_checkpointing(model) is True


def test_without_teacher_it_is_the_plain_trainer(tmp_path):
    losses = []
    for cls, more in ((Trainer, {}), (DistillationTrainer, {"loss": "self_taught"})):
        torch.manual_seed(0)
        trainer = cls(
            model=make_student(classifier(), stride=2),
            args=make_args(tmp_path, max_steps=2),
            train_dataset=rows(labels=True),
            **more,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
