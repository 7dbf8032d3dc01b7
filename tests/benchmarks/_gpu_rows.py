"""The rows that `gpu.py` measures: each function yields dictionaries, as soon as they are known."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu_training import (
    CYCLE,
    FAILURES,
    LINEARS,
    LLAMA_7B,
    METHODS,
    TINY,
    Clock,
    Method,
    failure,
    make_model,
    ours,
    quiet,
    spread,
    trained_by,
)
from torch import Tensor, nn

from peft_sparse import OneShotConfig
from peft_sparse.core.backends import products, reference, sddmm
from peft_sparse.core.overlay import Overlay
from peft_sparse.selection.rows import random_in_rows
from peft_sparse.selection.top_k import top_k


def step_rows(options: argparse.Namespace, *, checkpointing: bool) -> Iterator[dict[str, Any]]:
    """One row for each method, after its last block."""
    options.checkpointing = checkpointing
    methods = [m for m in METHODS if not options.methods or m.name in options.methods]
    blocks: dict[str, list[float]] = {m.name: [] for m in methods}
    facts: dict[str, dict[str, Any]] = {}
    for block in range(options.blocks):
        for method in methods:
            if block and (method.changes or "error" in facts[method.name]):
                continue
            try:
                measured, facts[method.name] = step_block(method, options)
                blocks[method.name] += measured
            except FAILURES as error:
                facts[method.name] = {"error": failure(error)}
                options.model = None
                gc.collect()
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                options.model = make_model(options)
            if block == options.blocks - 1 or method.changes or "error" in facts[method.name]:
                times = spread(blocks[method.name]) if blocks[method.name] else {}
                yield {"method": method.name, "checkpointing": checkpointing, **times, **facts[method.name]}


def step_block(method: Method, options: argparse.Namespace) -> tuple[list[float], dict[str, Any]]:
    clock = Clock(options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with trained_by(method, options) as training:
        for _ in range(2):
            training.step()
        measured = [clock(training.step) for _ in range(CYCLE if method.changes else options.steps)]
        facts: dict[str, Any] = {"trained": training.num_trained}
        if options.device == "cuda":
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if method.changes:
            facts["cycle_ms"] = [round(m, 1) for m in measured]
    return measured, facts


def correctness(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The gradient, a write and a step against float64 and each other, at the sizes that are measured."""
    hidden, intermediate, *_ = TINY if options.tiny else LLAMA_7B
    for shape in ((hidden, hidden), (intermediate, hidden)):
        for share in (None, 0.1):
            grad, x, support = factors(options, shape, share=share)
            (found,) = sddmm.weight_gradients(grad, x, [support], shape, sampled=False)
            exact = reference.sampled_product(grad.double(), x.double(), support, shape)
            error = float((found - exact).norm() / exact.norm())
            yield {"what": "gradient", "shape": shape, "rows": share, "error": error, "ok": error < 1e-5}
        weight = torch.randn(shape, device=options.device).bfloat16()
        values = torch.randn(support.numel(), device=options.device)
        expected = reference.tuned_weight(weight, [(values, support)])
        yield {"what": "write", "shape": shape, "ok": torch.equal(Overlay([support]).add(weight, [values]), expected)}
    before = [parameter.clone() for parameter in options.model.parameters()]
    losses = []
    options.checkpointing = False
    for name in ("Rand", "Rand, not resident"):
        with trained_by(next(m for m in METHODS if m.name == name), options) as training:
            for _ in range(3):
                training.step()
            with torch.no_grad():
                losses.append(float(training.tuned(input_ids=training.ids, labels=training.ids).loss))
    same = all(torch.equal(a, b) for a, b in zip(before, options.model.parameters(), strict=True))
    yield {"what": "resident training", "losses": losses, "ok": abs(losses[0] - losses[1]) < 1e-2 * abs(losses[1])}
    yield {"what": "base weights afterwards", "ok": same}


def factors(
    options: argparse.Namespace, shape: tuple[int, int], *, share: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    grad, x = (torch.randn(options.length, w, device=options.device).bfloat16() for w in shape)
    count = options.rank * sum(shape) if not options.tiny else sum(shape)
    return grad, x, random_in_rows(shape, count, share=share, seed=0, name="w").to(options.device)


def gradient_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The weight gradient on the support: ways to compute it."""
    hidden, intermediate, *_ = TINY if options.tiny else LLAMA_7B
    clock = Clock(options.device)
    for shape in ((hidden, hidden), (intermediate, hidden), (hidden, intermediate)):
        grad, x, support = factors(options, shape)
        _, _, in_rows = factors(options, shape, share=0.1)
        ways: dict[str, Callable[[], object]] = {
            "dense product alone": lambda g=grad, x=x: g.t() @ x,
            "dense, rounded, gathered": lambda g=grad, x=x, s=support: (g.t() @ x).reshape(-1)[s].float(),
            "a tenth of the rows": lambda g=grad, x=x, s=in_rows: products.entries_of_product(g, x, [s]),
        }
        for exponent in (23, 24, 25, 26, 27, 30):

            def tiled(g: Tensor = grad, x: Tensor = x, s: Tensor = support, size: int = 2**exponent) -> None:
                before, products.TILE_BYTES = products.TILE_BYTES, size
                products.entries_of_product(g, x, [s])
                products.TILE_BYTES = before

            ways[f"tiles of {2**exponent / 2**20:g} MiB"] = tiled
        for name, work in ways.items():
            work()
            yield {"what": name, "shape": shape, "count": support.numel(), **spread([clock(work) for _ in range(9)])}


def generation_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds a token, batch 1."""
    options.checkpointing = False
    tokens = 24 if not options.tiny else 4
    clock = Clock(options.device)
    names = ["frozen", "LoRA", "Rand", "Rand, not resident"]
    for name in [*names, "Rand, merged"]:
        method = next(m for m in METHODS if m.name == ("Rand, not resident" if "merged" in name else name))
        with trained_by(method, options) as training:
            model = training.tuned.eval()
            if "merged" in name:
                model.merge_adapter()
            given = {"input_ids": training.ids[:, :32], "attention_mask": torch.ones_like(training.ids[:, :32])}

            def generate(model: nn.Module = model, given: dict[str, Tensor] = given) -> None:
                with torch.no_grad(), quiet():
                    model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

            generate()
            times = spread([clock(generate) / tokens for _ in range(3)])
            if "merged" in name:
                model.unmerge_adapter()
            yield {"method": name, "what": "a token", **times}


def switching_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """From one merged adapter to another, and back."""
    options.checkpointing = False
    clock = Clock(options.device)
    for name in ("LoRA", "Rand, not resident"):
        method = next(m for m in METHODS if m.name == name)
        with trained_by(method, options) as training:
            model = training.tuned.eval()
            with quiet():
                model.add_adapter("other", method.config(options), autocast_adapter_dtype=method.casts)
            model.merge_adapter(["default"])
            turn = iter(["other", "default"] * 4)

            def switch(model: nn.Module = model, turn: Iterator[str] = turn) -> None:
                with quiet():
                    model.unmerge_adapter()
                    model.merge_adapter([next(turn)])

            switch()
            yield {"method": name, "what": "switch while merged", **spread([clock(switch) for _ in range(5)])}
            model.unmerge_adapter()


def selection_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Choosing weights: of one tensor, and of the whole model."""
    hidden, intermediate, *_ = TINY if options.tiny else LLAMA_7B
    clock = Clock(options.device)
    scores = torch.randn(intermediate, hidden, device=options.device).abs()
    k = scores.numel() // 40
    top_k(scores, k, name="scores")
    times = spread([clock(lambda: top_k(scores, k, name="scores")) for _ in range(5)])
    yield {"what": "top-k of one tensor", "scores": scores.numel(), "k": k, **times}
    options.checkpointing = False
    for budget in ("uniform", "global"):
        method = Method(budget, ours(OneShotConfig, criterion="largest_weight", budget=budget))
        begin = time.perf_counter()
        with trained_by(method, options) as training:
            if options.device == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - begin
            yield {"what": f"largest weights, {budget}", "trained": training.num_trained, "seconds": round(took, 2)}


def quantised_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Steps on a 4-bit (NF4) base model. The last rows: the base is not given back."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        yield {"skipped": f"bitsandbytes is not at hand: {error}"}
        return
    options.checkpointing = False
    for _, module in list(options.model.named_modules()):
        for name, linear in list(module.named_children()):
            if name in LINEARS:
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed.to(options.device))
    options.model.is_loaded_in_4bit = True
    for method in [
        m for m in METHODS if m.name in ("frozen", "LoRA", "SpIEL-AG", "SpIEL-MA", "Rand, a tenth of the rows")
    ]:
        if not options.methods or method.name in options.methods:
            measured, facts = step_block(method, options)
            yield {"method": method.name, **spread(measured), **facts}
