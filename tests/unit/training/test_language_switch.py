"""Training on several languages: the batch's adapter is active under the task's, and batches are counted."""

from __future__ import annotations

import shutil

import pytest
import torch

from peft_sparse import (
    ConfigError,
    LanguageSwitch,
    LotteryTicketConfig,
    MultiSourceCollator,
    MultiSourceDataset,
    SparseTrainer,
    evaluation_batches,
    language_below_task,
)
from tests.support.languages import SIZES, make_languages_and_task, make_sources, stack, train_languages
from tests.support.training import assert_same_tensors, base_weights, deltas

ADAPTERS = {language: f"{language}-adapter" for language in SIZES}


def batch_of(language: str) -> dict:
    return MultiSourceCollator(stack)(evaluation_batches({language: make_sources()[language]}, batch_size=3)[:1])


def frozen_weights(model) -> dict:
    return {name: weight for name, weight in base_weights(model).items() if "modules_to_save" not in name}


def test_the_batch_is_computed_under_its_language():
    model = make_languages_and_task().eval()
    with LanguageSwitch(model, SIZES, activate=language_below_task(ADAPTERS, "task")):
        found = {language: model(**batch_of(language)).logits for language in SIZES}
    for language, adapter in ADAPTERS.items():
        inputs = {key: value for key, value in batch_of(language).items() if key != "language"}
        model.base_model.set_adapter([adapter, "task"])
        assert torch.equal(found[language], model(**inputs).logits)
        model.set_adapter("task")
        assert not torch.allclose(found[language], model(**inputs).logits)
    model(**batch_of("eng"))  # the switch is gone
    assert model.active_adapters == ["task"]


def test_the_task_trains_and_the_language_does_not():
    model = make_languages_and_task()
    switch = LanguageSwitch(model, SIZES, activate=language_below_task(ADAPTERS, "task"))
    for language in ("eng", "quy", "quy"):
        model.eval()(**batch_of(language))
        model.train()(**batch_of(language)).loss.backward()
        training = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(".task" in name for name in training)
        assert all(model.get_parameter(name).grad is not None for name in training)
    assert switch.counts == {"eng": 1, "ind": 0, "quy": 2}
    model.base_model.set_adapter([ADAPTERS["quy"], "task"])  # which lets both train
    model.train()(**batch_of("quy"))
    assert all(".task" in name for name, p in model.named_parameters() if p.requires_grad)


def test_layers_are_computed_again_in_the_language_of_their_forward_or_not_at_all():
    def gradients(*, checkpointing, together):
        model = make_languages_and_task().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with LanguageSwitch(model, SIZES, activate=language_below_task(ADAPTERS, "task")):
            losses = [model(**batch_of("eng")).loss if together else model(**batch_of("eng")).loss.backward()]
            losses.append(model(**batch_of("quy")).loss)
            sum(losses[not together :]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(checkpointing=False, together=False)
    for how in ({"checkpointing": False, "together": True}, {"checkpointing": True, "together": False}):
        for name, gradient in gradients(**how).items():
            torch.testing.assert_close(gradient, expected[name])
    with pytest.raises(ConfigError, match="layers of a batch in 'eng' again, and 'quy' is active"):
        gradients(checkpointing=True, together=True)


def test_a_model_that_takes_the_language_gets_it():
    taken = []

    class Takes(torch.nn.Module):
        def forward(self, language):
            taken.append(language)

    model = Takes()
    switch = LanguageSwitch(model, ["eng"])
    model(language="eng")
    assert (taken, switch.counts) == (["eng"], {"eng": 1})


def test_batches_that_are_refused():
    model = make_languages_and_task()
    with LanguageSwitch(model, ["eng", "ind"], activate=language_below_task(ADAPTERS, "task")) as switch:
        with pytest.raises(ConfigError, match=r"has no 'language', got \['input_ids'\]: collate it with MultiSource"):
            model(input_ids=torch.zeros(1, 3, dtype=torch.long))
        with pytest.raises(ConfigError, match=r"language must be one of \['eng', 'ind'\] in training, got 'quy'"):
            model.train()(**batch_of("quy"))
        model.eval()(**batch_of("quy"))
        with pytest.raises(ConfigError, match=r"one that has an adapter \(.*\), got 'jav'"):
            model(**{**batch_of("quy"), "language": "jav"})
    assert switch.counts == {"eng": 0, "ind": 0}


@pytest.mark.parametrize("trainer_class", [None, SparseTrainer])
def test_a_trainer_sees_the_batches_and_logs_counts(tmp_path, trainer_class):
    changes = {} if trainer_class is None else {"trainer_class": trainer_class}
    trainer = train_languages(tmp_path, gradient_accumulation_steps=2, **changes)
    batches = MultiSourceDataset(make_sources(), num_batches=16, batch_size=4, seed=3)
    assert sorted(language for language, _, _ in trainer.seen) == sorted(batches[i].language for i in range(16))
    assert all(ids[:, 1].unique().tolist() == [list(SIZES).index(language)] for language, ids, _ in trainer.seen)
    counts = [
        {language: record[f"batches/{language}"] for language in SIZES}
        for record in trainer.state.log_history
        if "loss" in record
    ]
    assert [sum(count.values()) for count in counts] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert counts[-1] == batches.counts == trainer.switch.counts


def test_the_task_learns_and_the_languages_stay(tmp_path):
    model = train_languages(tmp_path).model
    start = make_languages_and_task()
    for adapter in ADAPTERS.values():
        assert_same_tensors(deltas(model, adapter), deltas(start, adapter))
    assert any(values.any() for _, values in deltas(model, "task").values())


def test_resident_mode_changes_nothing(tmp_path):
    plain = train_languages(tmp_path / "plain")
    resident = train_languages(tmp_path / "resident", trainer_class=SparseTrainer)
    for (name, (indices, values)), (_, found) in zip(
        deltas(plain.model, "task").items(), deltas(resident.model, "task").items(), strict=True
    ):
        assert torch.equal(found[0], indices), name
        torch.testing.assert_close(found[1], values, rtol=1e-4, atol=1e-5)
    assert_same_tensors(frozen_weights(resident.model), frozen_weights(make_languages_and_task()))


def test_both_phases_of_a_lottery_ticket(tmp_path):
    ticket = LotteryTicketConfig(num_weights=100, modules_to_save=["classifier"])
    trainer = train_languages(tmp_path, trainer_class=SparseTrainer, task=ticket)
    found = deltas(trainer.model, "task")
    assert sum(len(indices) for indices, _ in found.values()) == 100
    assert_same_tensors(frozen_weights(trainer.model), frozen_weights(make_languages_and_task()))
    for adapter in ADAPTERS.values():
        assert_same_tensors(deltas(trainer.model, adapter), deltas(make_languages_and_task(), adapter))
    dense, sparse = trainer.seen[:8], trainer.seen[8:]
    assert [(language, ids.tolist()) for language, ids, _ in dense] == [
        (language, ids.tolist()) for language, ids, _ in sparse
    ]
    assert sum(trainer.switch.counts.values()) == 8  # of the phase that ran last


def test_resumed_equals_uninterrupted(tmp_path):
    whole = train_languages(tmp_path, save_strategy="steps", save_steps=5)
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = train_languages(tmp_path, save_strategy="steps", save_steps=5, resume=True)
    assert len(resumed.seen) == 3
    for (language, ids, mask), (expected, expected_ids, expected_mask) in zip(
        resumed.seen, whole.seen[5:], strict=True
    ):
        assert language == expected
        assert torch.equal(ids, expected_ids)
        assert torch.equal(mask, expected_mask)
    assert_same_tensors(deltas(resumed.model, "task"), deltas(whole.model, "task"))
    logged = [
        {key: value for key, value in trainer.state.log_history[7].items() if key.startswith(("loss", "batches/"))}
        for trainer in (resumed, whole)
    ]
    assert logged[0] == logged[1]
    assert sum(value for key, value in logged[0].items() if key.startswith("batches/")) == 8


def test_evaluation_by_language(tmp_path):
    trainer = train_languages(tmp_path)
    rows = make_sources()
    figures = trainer.evaluate({lang: evaluation_batches({lang: rows[lang]}, batch_size=5) for lang in SIZES})
    trainer.model.eval()
    for language in SIZES:
        batches = evaluation_batches({language: rows[language]}, batch_size=5)
        losses = [trainer.model(**MultiSourceCollator(stack)([batch])).loss.item() for batch in batches]
        assert figures[f"eval_{language}_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert sum(trainer.switch.counts.values()) == 8  # those of training alone
