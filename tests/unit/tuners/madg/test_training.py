"""MAD-G in use: the Trainer with a column of languages, a task above a generated adapter, quantised models, the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from peft_sparse import LanguageSwitch, MadGConfig, MultiSourceCollator, MultiSourceDataset
from peft_sparse.tuners.madg.model import state_of
from tests.support.exact import logits
from tests.support.madg import VECTORS, MadGCase, generator_parameters
from tests.support.models import bert, t5
from tests.support.quantized import IDS, assert_same_bytes, load, packed_bytes
from tests.support.training import make_args

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 23, "hidden_size": 8}


def rows(count: int) -> list[dict[str, Any]]:
    made = torch.Generator().manual_seed(1)
    codes = list(VECTORS)
    ids = [torch.randint(23, (6,), generator=made) for _ in range(count)]
    return [{"input_ids": row, "labels": row, "language": codes[i % len(codes)]} for i, row in enumerate(ids)]


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {name: torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels")}
    return {**batch, "language": [example["language"] for example in examples]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    fields = {"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 3, "learning_rate": 0.05, "seed": 3}
    return make_args(folder, remove_unused_columns=False, **{**fields, "save_strategy": "steps", **changes})


def language_model(**changes: Any) -> PeftModel:
    config = {"bottleneck_size": 4, "language_dim": 3, "layer_dim": 2, "dropout": 0.1, "typology": VECTORS, **changes}
    return get_peft_model(bert(**SIZES).train(), MadGConfig(**config))


def trained(folder: Path, *, resume: str | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    model = language_model()
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=rows(16), data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return {name: parameter.detach().clone() for name, parameter in generator_parameters(model)}


def test_trainer_with_a_column_of_languages_and_resume(tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in generator_parameters(language_model())}
    after = trained(tmp_path)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    resumed = trained(tmp_path, resume=f"{tmp_path}/checkpoint-3")
    assert all(torch.equal(resumed[name], after[name]) for name in after)


def test_the_trainer_hands_every_example_its_language(tmp_path):
    """One step of SGD by the Trainer is the step by hand with the languages of the batch, and with no others."""
    batches = []

    class Seen(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"max_steps": 1, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 0, "learning_rate": 1.0}
    model = without_dropout()
    Seen(model, arguments(tmp_path, **options), train_dataset=rows(16), data_collator=collate).train()
    (batch,) = batches
    languages = batch.pop("language")
    assert len(set(languages)) == 2

    def by_hand(codes: list[str]) -> dict[str, torch.Tensor]:
        twin = without_dropout()
        twin(**batch, language=codes).loss.backward()
        return {name: (parameter - parameter.grad).detach() for name, parameter in generator_parameters(twin)}

    right, wrong = by_hand(languages), by_hand(languages[::-1])
    for name, parameter in generator_parameters(model):
        torch.testing.assert_close(parameter.detach(), right[name])
    assert any(not torch.allclose(right[name], wrong[name], rtol=1e-4, atol=1e-6) for name in right)


def test_batches_of_one_language_each(tmp_path):
    """`MultiSourceDataset` and its collator hand every batch its language, and the switch counts them."""
    model = without_dropout()
    seen = []
    model.base_model.model.bert.register_forward_hook(lambda *_: seen.append(state_of(model).current()))
    sources = {code: [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(6)] for code in VECTORS}
    batches = MultiSourceDataset(sources, num_batches=6, batch_size=2)
    switch = LanguageSwitch(model, batches.languages)
    collator = MultiSourceCollator(lambda examples: {n: torch.stack([e[n] for e in examples]) for n in examples[0]})
    before = {name: parameter.detach().clone() for name, parameter in generator_parameters(model)}
    options = arguments(tmp_path, per_device_train_batch_size=1, save_strategy="no")
    Trainer(model, options, train_dataset=batches, data_collator=collator, callbacks=[switch]).train()
    expected = {code: [batches.languages[i] for i in batches.schedule].count(code) for code in VECTORS}
    assert switch.counts == expected
    assert {code: seen.count(code) for code in VECTORS} == expected
    assert all(not torch.equal(before[name], parameter) for name, parameter in generator_parameters(model))


def without_dropout() -> PeftModel:
    model = language_model(dropout=0.0, init_weights=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def test_training_a_task_above_a_generated_language(tmp_path):
    torch.manual_seed(1)
    network = language_model()
    network.generate_adapter("quy").save_pretrained(tmp_path / "quy")
    network.generate_adapter("ace").save_pretrained(tmp_path / "ace")
    base = bert(BertForTokenClassification, **SIZES, num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "quy", adapter_name="quy")
    model.load_adapter(tmp_path / "ace", adapter_name="ace")
    config = network.generate_adapter("quy").config
    config.task_type = "TOKEN_CLS"
    model.add_adapter("task", config)
    model.base_model.set_adapter(["quy", "task"])
    model.set_requires_grad("quy", requires_grad=False)
    model.train()(input_ids=IDS, labels=IDS % 3).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(".task." in name for name in with_gradient)


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "TOKEN_CLS", "SEQ_2_SEQ_LM"])
def test_every_kind_of_peft_model_takes_the_language(task):
    if task == "SEQ_2_SEQ_LM":
        base = t5(vocab_size=23, num_layers=2)
    else:
        base = bert({"TOKEN_CLS": BertForTokenClassification, "FEATURE_EXTRACTION": BertModel}[task], **SIZES)
    options = {"bottleneck_size": 3, "language_dim": 2, "typology": VECTORS, "init_weights": False}
    model = get_peft_model(base.eval(), MadGConfig(**options, task_type=task)).eval()
    inputs = {"input_ids": IDS, **({"labels": IDS} if task == "SEQ_2_SEQ_LM" else {})}

    @torch.no_grad()
    def output(**language: Any) -> torch.Tensor:
        found = model(**inputs, **language)
        return found.last_hidden_state if task == "FEATURE_EXTRACTION" else found.logits

    codes = ["quy", "ace", "mlt"]
    each = [output(language=code) for code in codes[: len(IDS)]]
    torch.testing.assert_close(output(language=codes[: len(IDS)]), torch.stack([e[i] for i, e in enumerate(each)]))
    with model.set_language("ace"):
        assert torch.equal(output(), each[1])
    assert not torch.allclose(each[0], each[1])


@pytest.mark.parametrize("bits", ["nf4, double", "8 bit"])
def test_on_a_quantised_model(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = load(bits)

    def packed(model):
        return {name.replace("base_layer.", ""): tensor for name, tensor in packed_bytes(model).items()}

    before, own = packed(base), logits_of(base)
    torch.manual_seed(0)
    config = MadGConfig(bottleneck_size=4, language_dim=3, typology=VECTORS, init_weights=False, language="quy")
    model = get_peft_model(base, config)
    found = logits_of(model)
    assert (found - own).abs().max() > 1e-2
    model(input_ids=IDS, labels=IDS, language=[*["quy", "ace"] * len(IDS)][: len(IDS)]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in generator_parameters(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(bits), tmp_path).train()
    torch.testing.assert_close(logits_of(loaded), found)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), found)
    assert_same_bytes(packed(loaded.unload()), before)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_the_card_that_is_pushed(monkeypatch, tmp_path):
    seen = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        seen["card"] = (Path(working_dir) / "README.md").read_text()

    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    model = MadGCase("MAD-G-LS").model(language="quy")
    logits(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\nTemplate\n")
    model._upload_modified_files(str(tmp_path), "me/adapter")
    assert 'model.set_language("quy")' in seen["card"]
    assert "layer embedding 3 (MAD-G-LS)" in seen["card"]
    assert "Template" in seen["card"]


@pytest.mark.slow
@pytest.mark.parametrize("request_", ["MAD-G", "MAD-G-LS", "MAD-G on pre-norm"])
def test_torch_compile(request_):
    torch._dynamo.reset()
    model = MadGCase(request_).model(language="quy")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))
    model.set_language("ace")
    torch.testing.assert_close(logits(compiled), logits(model))
