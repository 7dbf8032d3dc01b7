"""Bottleneck adapters in use: a language learnt by masked language modelling, a task above it, the Trainer, the Hub."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertForTokenClassification, Trainer, TrainingArguments

from peft_sparse import BottleneckConfig
from tests.support.bottleneck import Case, parameters_of, tensors_of
from tests.support.exact import IDS, logits
from tests.support.models import bert
from tests.support.training import make_args

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 23, "hidden_size": 8}


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [{"input_ids": (ids := torch.randint(23, (6,), generator=made)), "labels": ids} for _ in range(count)]


def arguments(folder: Path, **changes) -> TrainingArguments:
    fields = {"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 3, "learning_rate": 0.05, "seed": 3}
    return make_args(folder, **{**fields, "save_strategy": "steps", **changes})


def language_model() -> PeftModel:
    return get_peft_model(bert(**SIZES).train(), BottleneckConfig(bottleneck_size=4, invertible="nice", dropout=0.1))


def test_trainer_and_resume(tmp_path):
    model = language_model()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = tensors_of(model, "default")
    Trainer(model, arguments(tmp_path), train_dataset=rows(16)).train()
    after = tensors_of(model, "default")
    assert all(any(not torch.equal(before[p][n], after[p][n]) for n in before[p]) for p in before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    again = language_model()
    Trainer(again, arguments(tmp_path), train_dataset=rows(16)).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    resumed = tensors_of(again, "default")
    assert all(torch.equal(resumed[p][n], after[p][n]) for p in after for n in after[p])


def test_a_language_below_a_task(tmp_path):
    """MAD-X: the language adapter of a masked language model goes below a task adapter, frozen, and is exchanged."""
    for seed, language in enumerate(("source", "target")):
        model = language_model()
        torch.manual_seed(seed)
        for _, parameter in parameters_of(model, "default"):
            parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / language)
    base = bert(BertForTokenClassification, seed=1, **SIZES, num_labels=3)
    original = copy.deepcopy(base)
    model = PeftModel.from_pretrained(base, tmp_path / "source", adapter_name="source")
    model.load_adapter(tmp_path / "target", adapter_name="target")
    model.add_adapter("task", BottleneckConfig(bottleneck_size=2, task_type="TOKEN_CLS", leave_out=[-1]))
    model.base_model.set_adapter(["source", "task"])
    model.set_requires_grad("source", requires_grad=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".task." in name for name in trained)
    assert any("classifier" in name for name in trained)
    language = tensors_of(model, "source")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(input_ids=IDS, labels=IDS % 3).loss.backward()
    optimizer.step()
    now = tensors_of(model, "source")
    assert all(torch.equal(now[p][n], language[p][n]) for p in now for n in now[p])
    source = logits(model.eval())
    model.base_model.set_adapter(["target", "task"])
    target = logits(model)
    assert (source - target).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "all", selected_adapters=["task"])
    fresh = PeftModel.from_pretrained(original, tmp_path / "target", adapter_name="target")
    fresh.load_adapter(tmp_path / "all" / "task", adapter_name="task")
    fresh.base_model.set_adapter(["target", "task"])
    assert torch.equal(logits(fresh.eval()), target)


def test_the_card_that_is_pushed(monkeypatch, tmp_path):
    case = Case("pfeiffer on post-norm")
    model = case.model()
    seen = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        seen["card"] = (Path(working_dir) / "README.md").read_text()
        seen["files"] = {path.name for path in Path(working_dir).iterdir()}

    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\nTemplate\n")
    model._upload_modified_files(str(tmp_path), "me/adapter")
    assert "import peft_sparse" in seen["card"]
    assert "Template" in seen["card"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= seen["files"]


@pytest.mark.slow
@pytest.mark.parametrize("request_", ["pfeiffer on post-norm", "pfeiffer on pre-norm", "pfeiffer with nice"])
def test_torch_compile(request_):
    torch._dynamo.reset()
    model = Case(request_).model()
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected)
