"""Time and memory on a GPU beside PEFT's LoRA, SHiRA and Super-Tuning at equal counts, on Llama-2-7B's shape.

    python tests/benchmarks/gpu.py                        # everything, under nine minutes on one H100
    python tests/benchmarks/gpu.py --minutes 3            # the first rows alone
    python tests/benchmarks/gpu.py --layers 8             # a quarter of the model
    python tests/benchmarks/gpu.py --only "step ,"        # rows whose name holds one of these
    python tests/benchmarks/gpu.py --tiny                 # the rehearsal on a CPU, its numbers mean nothing
    python tests/benchmarks/gpu.py --table results.jsonl  # a table of what an earlier run wrote

Each row is one JSON line, printed and added to --out as soon as it is measured; rows come in the order of their
importance, and one that would not fit into --minutes is left out. Weights are random (nothing is downloaded) in
bfloat16; a step is forward, backward, optimizer and zero_grad of one sequence of --length tokens, all seven kinds of
linear layers tuned, as many weights as LoRA of --rank trains. Steps are timed by device events, one by one, with the
device idle before each, so that launching counts where it is what takes the time. A method's steps come in --blocks
blocks, between which the other methods take their turn, so that a drift of the card would show in its quartiles. Peak
memory is what torch had allocated at most, the model included. SpIEL's steps are not alike: blocks are cycles of 20
updates, estimation and replacement included, and the mean over them is what counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from step_time import frozen, with_ages, with_covers
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import OneShotConfig, RandConfig, SpielAGConfig, SpielMAConfig, resident
from peft_sparse.core.backends import products, reference, sddmm
from peft_sparse.core.overlay import Overlay
from peft_sparse.selection.rows import random_in_rows
from peft_sparse.selection.top_k import top_k

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


def step_rows(options: argparse.Namespace, *, checkpointing: bool) -> Iterator[dict[str, Any]]:
    """One row for each method, after its last block."""
    options.checkpointing = checkpointing
    blocks = {m.name: [] for m in METHODS}
    facts: dict[str, dict[str, Any]] = {}
    for block in range(options.blocks):
        for method in METHODS:
            if block and (method.changes or "error" in facts[method.name]):
                continue
            try:
                measured, facts[method.name] = step_block(method, options)
                blocks[method.name] += measured
            except torch.OutOfMemoryError as error:
                facts[method.name] = {"error": str(error).partition(".")[0]}
                gc.collect()
                torch.cuda.empty_cache()
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
            if name in LINEARS and not options.tiny:
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed.to(options.device))
    options.model.is_loaded_in_4bit = not options.tiny
    for method in [
        m for m in METHODS if m.name in ("frozen", "LoRA", "SpIEL-AG", "SpIEL-MA", "Rand, a tenth of the rows")
    ]:
        measured, facts = step_block(method, options)
        yield {"method": method.name, **spread(measured), **facts}


# In the order of their importance: name, rows, seconds that they take at most on an H100 with all layers.
ROWS: list[tuple[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]], int]] = [
    ("correctness", correctness, 40),
    ("step", lambda options: step_rows(options, checkpointing=False), 160),
    ("step, checkpointing", lambda options: step_rows(options, checkpointing=True), 160),
    ("gradient", gradient_rows, 10),
    ("generation", generation_rows, 40),
    ("switching", switching_rows, 30),
    ("selection", selection_rows, 30),
    ("NF4", quantised_rows, 60),
]


def environment(options: argparse.Namespace) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if options.device == "cuda" else "none: a rehearsal on the CPU"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    layers = options.model.config.num_hidden_layers
    return {
        "card": card,
        "date": date.today().isoformat(),
        "versions": versions,
        "layers": layers,
        "length": options.length,
        "rank": options.rank,
        "dtype": "bfloat16",
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of the steps, relative to LoRA and to the frozen model."""
    found = ["| | method | trained | ms a step (quartiles) | / LoRA | / frozen | peak GiB | / LoRA |", "|" + "---|" * 8]
    for kind in dict.fromkeys(line["row"] for line in lines if line["row"].startswith(("step", "NF4"))):
        rows = {line["method"]: line for line in lines if line["row"] == kind and "method" in line}
        for name, row in rows.items():
            if "mean_ms" not in row:
                found.append(f"| {kind} | {name} | | {row.get('error')} | | | | |")
                continue
            # The mean of a cycle, and of steps that are alike the median.
            own, lora_ms, frozen_ms = (
                r.get("mean_ms" if "cycle_ms" in r else "median_ms", float("nan"))
                for r in (row, rows.get("LoRA", {}), rows.get("frozen", {}))
            )
            low, high = row["quartiles_ms"]
            peak, lora_peak = row.get("peak_gib", float("nan")), rows.get("LoRA", {}).get("peak_gib", float("nan"))
            found.append(
                f"| {kind} | {name} | {row['trained']:,} | {own:.1f} ({low:.1f}-{high:.1f}) | {own / lora_ms:.3f} "
                f"| {own / frozen_ms:.3f} | {peak:.2f} | {peak / lora_peak:.3f} |"
            )
    return "\n".join(found)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows that fit into the time."""
    begin = time.monotonic()
    options.model = make_model(options)
    yield {"row": "environment", **environment(options), "seconds": round(time.monotonic() - begin, 1)}
    for name, make, seconds in ROWS:
        if options.only and not any(part in name for part in options.only):
            continue
        share = 1.0 if not options.layers else min(1.0, options.layers / LLAMA_7B[2] + 0.1)
        left = 60 * options.minutes - (time.monotonic() - begin)
        if seconds * share > left:
            yield {"row": name, "skipped": f"takes up to {seconds * share:.0f} s, {left:.0f} s are left"}
            continue
        started = time.monotonic()
        for row in make(options):
            yield {"row": name, **row, "at_s": round(time.monotonic() - begin, 1)}
        yield {"row": name, "took_s": round(time.monotonic() - started, 1)}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than 32; step times are then a share")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of rows")
    parser.add_argument("--methods", nargs="+", default=[], help="names of methods; all by default")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU")
    parser.add_argument("--out", type=Path, help="a file that gets the lines, too")
    parser.add_argument("--table", type=Path, help="print the table of such a file, measure nothing")
    options = parser.parse_args(arguments)
    options.device, options.checkpointing = "cpu" if options.tiny else "cuda", False
    if options.tiny:
        options.length, options.rank, options.steps = 32, 2, 2
    if options.methods:
        METHODS[:] = [method for method in METHODS if method.name in options.methods]
    return options


def main() -> None:
    options = parsed()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is at hand; --tiny rehearses on the CPU")
    lines = []
    for line in run(options):
        lines.append(line)
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print(table(lines))
    if any(line.get("ok") is False for line in lines):
        sys.exit("a result is wrong, see above")


if __name__ == "__main__":
    main()
