"""Sparse adapters inside other people's machinery: TRL's DPO, FSDP, casts and compilers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_sparse import RandConfig, iter_deltas
from tests.support.exact import IDS, close, logits
from tests.support.sparse import Case, dense_deltas, fill
from tests.support.tokenizers import of_words

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.norm, self.first = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 8)
        self.conv, self.second = nn.Conv1d(8, 6, 2), nn.Linear(6, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.norm(self.tokens(ids))).tanh()
        return self.second(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


SMALL_IDS = torch.tensor([[1, 2, 3, 8], [4, 4, 5, 0]])


def everything() -> RandConfig:
    return RandConfig(density=0.4, target_modules="all", init_weights=False)


@pytest.fixture
def one_process():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_in_one_process(one_process):
    plain = get_peft_model(Net(), everything())
    fill(plain, "default", 0)
    wrapped = FullyShardedDataParallel(copy.deepcopy(plain), use_orig_params=True, device_id=torch.device("cpu"))
    found, wanted = wrapped(SMALL_IDS), plain(SMALL_IDS)
    torch.testing.assert_close(found, wanted)
    assert (wanted - Net()(SMALL_IDS)).abs().max() > 1e-2, "a lost delta would go unnoticed"
    for output in (found, wanted):
        output.square().sum().backward()
    gradients = {
        n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in wrapped.named_parameters() if p.requires_grad
    }
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad and parameter.numel():
            torch.testing.assert_close(gradients[name], parameter.grad)
    reloaded = get_peft_model(Net(), everything())
    set_peft_model_state_dict(reloaded, get_peft_model_state_dict(wrapped))
    torch.testing.assert_close(reloaded(SMALL_IDS), wanted)


def test_dpo_compares_with_a_copy_of_the_adapter(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = of_words(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrs"])
    pairs = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}] * 4)
    case = Case("llama", "rand")
    model = case.model().float()
    options = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 2}
    arguments = trl.DPOConfig(
        str(tmp_path), per_device_train_batch_size=2, logging_steps=1, learning_rate=0.05, save_strategy="no", **options
    )
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    trained, reference = dense_deltas(trainer.model, "default"), dense_deltas(trainer.model, "ref")
    assert trained.keys() == reference.keys()
    assert all(torch.equal(trained[name], reference[name]) for name in trained)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    now = dense_deltas(trainer.model, "default")
    assert any(not torch.equal(now[name], trained[name]) for name in trained)
    assert all(torch.equal(d, reference[name]) for name, d in dense_deltas(trainer.model, "ref").items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_while_merged_unmerges_to_the_cast_base_weights(dtype):
    base = Net()
    wanted = {name: parameter.detach().clone().to(dtype) for name, parameter in base.named_parameters()}
    model = get_peft_model(base, everything())
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    for name, parameter in model.base_model.model.named_parameters():
        if "sparse_ft_" not in name:
            assert torch.equal(parameter, wanted[name.replace("base_layer.", "")]), name


@pytest.mark.parametrize("below", [[], ["other"]], ids=["alone", "on top of a merged adapter"])
def test_safe_merge_sees_an_overflow_of_the_weights_dtype(below):
    model = get_peft_model(Net().half(), everything())
    model.add_adapter("other", everything())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _, _, _, delta in iter_deltas(model, "default"):
        delta.values.data.fill_(1e5)
        assert torch.isfinite(delta.values).all()
    if below:
        model.merge_adapter(below)
    merged = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"adapter .*default seems to be broken: weight \+ delta overflows torch.float16"
    ):
        model.merge_adapter(["default"], safe_merge=True)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], merged[name]) for name in now)
    if below:
        model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "default" not in n)


@pytest.mark.slow
def test_torch_compile_without_graph_breaks():
    torch._dynamo.reset()
    case = Case("llama", "rand")
    model = case.model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(logits(compiled), case.expected(dense_deltas(model, "default")))
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    found = [d.values.grad.clone() for _, _, _, d in iter_deltas(model, "default") if d.count]
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = [d.values.grad for _, _, _, d in iter_deltas(model, "default") if d.count]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
