"""What the processes of a test train: every function runs in each of them, and in a single one for comparison."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_sparse
from peft_sparse import (
    SM3,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseAdamW,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    iter_reselectors,
    select,
    select_by_gradients,
    start_dense_phase,
    start_sparse_phase,
)
from peft_sparse.core.sharded import whole
from tests.support.training import VOCAB, make_bert

QUICK = {"reselection_steps": 4, "estimation_steps": 2, "total_steps": 20}
CONFIGS = {
    "rand": RandConfig,
    "lottery": LotteryTicketConfig,
    "one shot": OneShotConfig,
    "ag": SpielAGConfig,
    "ma": SpielMAConfig,
}


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def make_config(method: str, **fields: Any) -> Any:
    quick = QUICK if method in ("ag", "ma") else {}
    return CONFIGS[method](**{"density": 0.05, "modules_to_save": ["classifier"], **quick, **fields})


def make_optimizer(name: str, model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if name == "sm3":
        return SM3(trainable, lr, deltas=[d for *_, d in iter_deltas(model)], momentum=0.5)
    return {"adamw": torch.optim.AdamW, "sparse_adamw": SparseAdamW}[name](trainable, lr=lr)


def batch(number: int, rows: int = 8) -> dict[str, Tensor]:
    """This process's share of a batch; all of it in a single process."""
    rank, world = rank_and_world()
    ids = torch.randint(0, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids[rank::world], "labels": (ids[:, 0] % 3)[rank::world]}


def result(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that has to be equal on every process, whole."""
    found: dict[str, Any] = {}
    for name, _, _, delta in iter_deltas(model):
        found[f"indices.{name}"] = delta.indices.clone()
        found[f"values.{name}"] = whole(delta.values).clone()
        if optimizer is not None and delta.count:
            state = optimizer.state[delta.held_values]
            found.update({f"{key}.{name}": whole(t).clone() for key, t in state.items() if key != "age" or t.dim()})
        if delta.l1_coefficient:
            found[f"penalty.{name}"] = torch.tensor(sum(pull.penalty() for pull in delta.pulls()))
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name:
            found[f"head.{name.removeprefix('module.')}"] = whole(parameter).clone()
    for reselector in iter_reselectors(model):
        found.update({f"state.{key}": tensor for key, tensor in reselector.state_dict().items()})
        found["replaced"] = [(r.update, round(r.share_replaced, 6)) for r in reselector.history]
    return found


def several(variants: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """One training after the other, by name: starting processes takes longer than most of them."""
    found = {}
    for name, (case, options) in variants.items():
        found[name] = globals()[case](**options)
        gc.collect()
    return found


def train_ddp(
    method: str,
    optimizer: str,
    *,
    steps: int = 7,
    accumulate: int = 1,
    sync_every: bool = False,
    clip: float | None = None,
    double: bool = True,
    ddp: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A loop of one's own under DDP; without it in a single process."""
    base = make_bert(dropout=0.0, dtype=torch.float64 if double else torch.float32)
    model = get_peft_model(base, make_config(method, **fields))
    wrapped = DistributedDataParallel(model, **(ddp or {})) if dist.is_initialized() else model
    made = make_optimizer(optimizer, model)
    for step in range(steps):
        for micro in range(accumulate):
            if wrapped is not model:
                wrapped.require_backward_grad_sync = sync_every or micro == accumulate - 1
            (wrapped(**batch(100 * step + micro)).loss / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        made.zero_grad()
    return result(wrapped, made)


def lottery_ddp(steps: int = 6) -> dict[str, Any]:
    """LT-SFT by its verbs: DDP is made anew for each phase, because each trains other parameters."""
    model = get_peft_model(make_bert(dropout=0.0, dtype=torch.float64), make_config("lottery"))
    start_dense_phase(model)
    for phase in ("dense", "sparse"):
        wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
        made = make_optimizer("adamw", model, lr=1e-3)
        for step in range(steps):
            wrapped(**batch(step)).loss.backward()
            made.step()
            made.zero_grad()
        if phase == "dense":
            select(wrapped)
            start_sparse_phase(model)
    return result(model, made)


def one_shot_ddp(criterion: str, steps: int = 4) -> dict[str, Any]:
    """Weights chosen by the gradients of three batches, of which each process has its share; then DDP."""
    model = get_peft_model(
        make_bert(dropout=0.0, dtype=torch.float64), make_config("one shot", criterion=criterion, selection_batches=3)
    )
    select_by_gradients(model, [batch(number) for number in range(3)])
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    made = make_optimizer("adamw", model, lr=1e-3)
    for step in range(steps):
        wrapped(**batch(step)).loss.backward()
        made.step()
        made.zero_grad()
    return result(model, made)


def unequal_batches() -> None:
    """One process has a batch more than the other."""
    model = get_peft_model(make_bert(dropout=0.0), make_config("one shot"))
    select_by_gradients(model, [batch(number) for number in range(2 + rank_and_world()[0])])


def shard(model: nn.Module, **options: Any) -> None:
    """FSDP2 as it is meant: every block a unit, the rest another."""
    for block in model.get_base_model().bert.encoder.layer:
        fully_shard(block, **options)
    fully_shard(model, **options)


def train_fsdp(
    method: str,
    optimizer: str,
    *,
    steps: int = 7,
    accumulate: int = 1,
    sync_every: bool = False,
    clip: float | None = None,
    double: bool = True,
    resident: bool = False,
    bfloat16: bool = False,
    reshard: bool = True,
    checkpointing: bool | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A loop of one's own under FSDP2; without it in a single process."""
    if double:
        # FSDP2 wants one dtype of all that trains, and values are float32.
        fields["modules_to_save"] = None
    base = make_bert(dropout=0.0, dtype=torch.float64 if double else torch.float32)
    model = get_peft_model(base, make_config(method, **fields))
    if method == "one shot":
        select_by_gradients(model, [batch(99)])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
        shard(model, reshard_after_forward=reshard, mp_policy=policy)
    made = make_optimizer(optimizer, model)
    with peft_sparse.resident(model) if resident else contextlib.nullcontext():
        for step in range(steps):
            for micro in range(accumulate):
                if dist.is_initialized():
                    model.set_requires_gradient_sync(sync_every or micro == accumulate - 1)
                (model(**batch(100 * step + micro)).loss / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            made.zero_grad()
    return result(model, made)
