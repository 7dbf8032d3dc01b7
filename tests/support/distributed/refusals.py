"""What several processes must be told and not left to find out: every function runs in each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_sparse import SparseError, SpielAGConfig, iter_deltas, start_dense_phase, start_sparse_phase
from peft_sparse.training import distributed
from tests.support.distributed.training import batch, make_bert, make_config, make_optimizer, shard


class Gated(nn.Module):
    """Two tuned layers, and a trained one before them that a batch may pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 16)
        self.gate = nn.Linear(16, 16)

    def forward(self, x: Tensor, gate: bool, skip: bool = False) -> Tensor:
        x = x + self.gate(x) if gate else x
        hidden = torch.relu(self.first(x))
        return hidden if skip else self.second(hidden)


def gated(**fields: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    quick = {"reselection_steps": 2, "estimation_steps": 1, "total_steps": 20}
    targets = {"target_modules": ["first", "second"], "modules_to_save": ["gate"], "density": 0.1}
    model = get_peft_model(Gated(), SpielAGConfig(**quick, **targets, **fields))
    return model, DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1e-5)


def x_of(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def unused_parameters(in_own_group: bool = True) -> dict[str, Any]:
    """A head that each batch reaches on one process alone, whose bucket DDP then reduces earlier on the other."""
    if not in_own_group:
        distributed._own_group = lambda: dist.group.WORLD
    model, wrapped = gated()
    made = make_optimizer("adamw", model)
    for step in range(5):
        wrapped(x_of(step), gate=dist.get_rank() == step % 2).square().mean().backward()
        made.step()
        made.zero_grad()
    return {name: d.indices.clone() for name, _, _, d in iter_deltas(model)}


def told(do: Any) -> tuple[str, str]:
    """The class and the text of our own error."""
    try:
        do()
    except SparseError as error:
        return type(error).__name__, str(error)
    return "", ""


def skipped_layer() -> tuple[str, str]:
    _, wrapped = gated()
    return told(lambda: wrapped(x_of(0), gate=True, skip=dist.get_rank() == 1).square().mean().backward())


def train(model: nn.Module, wrapped: nn.Module, steps: int = 4, optimizer: str = "adamw") -> None:
    made = make_optimizer(optimizer, model)
    for step in range(steps):
        wrapped(**batch(step)).loss.backward()
        made.step()
        made.zero_grad()


def no_wrapper() -> tuple[str, str]:
    """Gradients that nobody averages: the values drift apart, and with them what is dropped."""
    model = get_peft_model(make_bert(dropout=0.0), make_config("ag", total_steps=20))
    return told(lambda: train(model, model, steps=12))


def global_budget() -> tuple[str, str]:
    model = get_peft_model(make_bert(dropout=0.0), make_config("ag", total_steps=20, budget="global"))
    return told(lambda: train(model, DistributedDataParallel(model)))


def fsdp1() -> tuple[str, str]:
    model = get_peft_model(make_bert(dropout=0.0), make_config("ma", total_steps=20))
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return told(lambda: train(wrapped, wrapped))


def wrapped_too_early() -> list[tuple[str, str]]:
    model = get_peft_model(make_bert(dropout=0.0), make_config("lottery"))
    wrapped = DistributedDataParallel(model)
    dense = told(lambda: start_dense_phase(wrapped))
    start_dense_phase(model)
    return [dense, told(lambda: start_sparse_phase(wrapped))]


def ignored_by_ddp() -> dict[str, Any]:
    """Which buffers DDP broadcasts in every forward, and whether ours survive one."""
    base = make_bert(dropout=0.0)
    base.register_buffer("mine", torch.zeros(1) + dist.get_rank())
    model = get_peft_model(base, make_config("rand"))
    wrapped = DistributedDataParallel(model)
    supports = {name: d.indices.clone() for name, _, _, d in iter_deltas(model)}
    wrapped(**batch(0)).loss.backward()
    return {
        "broadcast": sorted(wrapped.named_module_buffers),
        "mine": float(base.mine),
        "unchanged": all(torch.equal(d.indices, supports[name]) for name, _, _, d in iter_deltas(model)),
    }


def fsdp_verbs(folder: str) -> dict[str, Any]:
    """What can and cannot be done to a model that FSDP2 has sharded."""
    model = get_peft_model(make_bert(dropout=0.0), make_config("rand", init_weights=False))
    values = {name: d.values.detach().clone() for name, _, _, d in iter_deltas(model)}
    model.eval()
    own = f"{folder}/{dist.get_rank()}"
    found: dict[str, Any] = {"before": model(**batch(0)).logits.detach()}
    model.save_pretrained(f"{own}/before")
    shard(model)
    found["after"] = model(**batch(0)).logits.detach()
    found["gathered"] = all(torch.equal(d.delta.values, values[name]) for name, _, _, d in iter_deltas(model))
    with model.disable_adapter():
        found["disabled"] = model(**batch(0)).logits.detach()
    model.save_pretrained(f"{own}/after")
    found["merge"] = [told(model.merge_adapter), told(model.merge_and_unload)]
    found["add"] = told(lambda: model.add_adapter("second", make_config("rand")))
    for _, _, _, delta in iter_deltas(model):
        delta.set_support(delta.indices)
    found["zeroed"] = model(**batch(0)).logits.detach()
    set_peft_model_state_dict(model, load_peft_weights(f"{own}/after", device="cpu"))
    found["loaded"] = model(**batch(0)).logits.detach()
    first = next(delta for *_, delta in iter_deltas(model))
    found["resize"] = told(lambda: first.set_support(first.indices[:-1]))
    return found


def sharded_before_the_adapter() -> tuple[str, str]:
    base = make_bert(dropout=0.0)
    fully_shard(base)
    return told(lambda: get_peft_model(base, make_config("rand")))


def dense_phase_of_shards() -> tuple[str, str]:
    model = get_peft_model(make_bert(dropout=0.0), make_config("lottery"))
    shard(model)
    return told(lambda: start_dense_phase(model))
