"""What `gpu.py` trains: one base model, methods on it one after the other, and a clock."""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import mean, median, quantiles
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from step_time import frozen, with_ages, with_covers
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import RandConfig, SpielAGConfig, SpielMAConfig, resident
from peft_sparse.selection import rows

# hidden size, width of the feed-forward, layers, heads, vocabulary
LLAMA_7B = (4096, 11008, 32, 32, 32000)
TINY = (64, 176, 2, 4, 500)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CYCLE = 20


def fused_adamw(_: nn.Module, parameters: list[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        name: unique.
        config: None for the frozen model.
        make_optimizer: from model and parameters.
        is_resident: whether it trains inside `peft_sparse.resident`.
        casts: PEFT's `autocast_adapter_dtype`: adapters in float32 over a bfloat16 model.
        changes: whether its steps differ over a cycle.
    """

    name: str
    config: Callable[[argparse.Namespace], PeftConfig] | None
    make_optimizer: Callable[[nn.Module, list[Tensor]], Optimizer] = fused_adamw
    is_resident: bool = False
    casts: bool = True
    changes: bool = False


def ours(cls: type, **fields: Any) -> Callable[[argparse.Namespace], PeftConfig]:
    return lambda options: cls(equivalent_rank=options.rank, target_modules=LINEARS, **fields)


def lora(options: argparse.Namespace) -> PeftConfig:
    return LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=LINEARS)


def supertuning(options: argparse.Namespace) -> PeftConfig:
    shapes = [tuple(m.weight.shape) for n, m in options.model.named_modules() if n.rpartition(".")[2] in LINEARS]
    share = options.rank * sum(map(sum, shapes)) / sum(o * i for o, i in shapes)
    return SupertuningConfig(sparsity=1 - share, target_modules=LINEARS)


LONG = {"total_steps": 10_000}
METHODS = [
    Method("frozen", None),
    Method("LoRA", lora, casts=False),
    Method("SpIEL-AG", ours(SpielAGConfig, **LONG), with_ages, is_resident=True, changes=True),
    Method("SpIEL-MA", ours(SpielMAConfig, **LONG), with_covers, is_resident=True, changes=True),
    Method("Rand", ours(RandConfig), is_resident=True),
    Method("Rand, a fifth of the rows", ours(RandConfig, support_rows=0.2), is_resident=True),
    Method("Rand, a tenth of the rows", ours(RandConfig, support_rows=0.1), is_resident=True),
    Method("Rand, not resident", ours(RandConfig)),
    Method("LoRA in float32, PEFT's default", lora),
    Method("SHiRA", lambda options: ShiraConfig(r=options.rank, target_modules=LINEARS), casts=False),
    Method("Super-Tuning", supertuning, casts=False),
]


# What may go wrong with one method and leave the others to be measured.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError)


def failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def draw_once() -> None:
    """Remember random supports: all methods start from equal ones, and drawing 160 million takes longer than a step."""
    if not hasattr(rows.random_indices, "cache_info"):
        rows.random_indices = cache(rows.random_indices)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_model(options: argparse.Namespace) -> nn.Module:
    hidden, intermediate, layers, heads, vocabulary = TINY if options.tiny else LLAMA_7B
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        use_cache=True,
    )
    torch.manual_seed(0)
    # Random weights of our own, on the device: torch's and transformers' way to them takes a minute for 7B.
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=options.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(options.device)
    return model.requires_grad_(False)


class Clock:
    """Milliseconds between two calls on the device, or on the CPU where there is none."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        if not self._is_cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def spread(milliseconds: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(milliseconds, n=4) if len(milliseconds) > 1 else milliseconds * 3
    return {
        "median_ms": round(median(milliseconds), 3),
        "quartiles_ms": [round(low, 3), round(high, 3)],
        "mean_ms": round(mean(milliseconds), 3),
        "steps": len(milliseconds),
    }


class Training:
    """A method on the one base model; `close` gives it back as it was."""

    def __init__(self, method: Method, options: argparse.Namespace) -> None:
        self.options, self.stack = options, ExitStack()
        self.model: nn.Module = options.model
        self.tuned: nn.Module = options.model
        embedding = self.model.get_input_embeddings()
        hooks = set(embedding._forward_hooks)
        # What frozen layers pass on needs a gradient, as under any method, also where checkpointing looks at it.
        frozen(self.model)
        self.stack.callback(
            lambda: [embedding._forward_hooks.pop(key) for key in set(embedding._forward_hooks) - hooks]
        )
        if method.config is not None:
            with quiet():
                config = method.config(options)
                self.tuned = get_peft_model(self.model, config, autocast_adapter_dtype=method.casts)
        self.tuned.train()
        parameters = [p for p in self.tuned.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in parameters)
        self.optimizer = method.make_optimizer(self.tuned, parameters) if parameters else None
        if method.is_resident:
            self.stack.enter_context(resident(self.tuned))
        if options.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.stack.callback(self.model.gradient_checkpointing_disable)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (1, options.length), generator=generator)
        self.ids = ids.to(options.device)

    def step(self) -> None:
        self.tuned(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        self.stack.close()
        if self.tuned is not self.model:
            self.options.model = self.tuned.unload()
        self.optimizer = None
        del self.tuned, self.model
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def trained_by(method: Method, options: argparse.Namespace) -> Iterator[Training]:
    training = Training(method, options)
    try:
        yield training
    finally:
        training.close()
