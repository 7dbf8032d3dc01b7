"""Distillation in trainers: what the loss is, who learns, what is logged and written, and what is refused."""

from __future__ import annotations

import pytest
import torch
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
    TrainingArguments,
    XGLMConfig,
)

from peft_sparse import (
    ConfigError,
)
from peft_sparse.distillation import DistillationLoss, DistillationTrainer, Teacher, distilled_trainer, make_student
from peft_sparse.distillation.attention import AttentionMaps, is_causal, is_checkpointing
from peft_sparse.distillation.losses import attention_loss, hidden_loss, pair_mask, prediction_loss, prediction_mask
from tests.support.distillation import BATCH, IDS, LABELLED, classifier, make_trainer, rows
from tests.support.tokenizers import make_bert, make_llama
from tests.support.training import make_args


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


def test_several_gpus_of_one_process_are_refused(tmp_path, monkeypatch):
    base = classifier()
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match=r"one GPU a process, got 2 GPUs: .*CUDA_VISIBLE_DEVICES=0"):
        make_trainer(tmp_path, make_student(base, stride=2), Teacher(base))


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
