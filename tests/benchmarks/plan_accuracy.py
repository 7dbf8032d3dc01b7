"""What `plan_memory` predicts beside what training takes: peak memory of real steps on the CPU.

    python tests/benchmarks/plan_accuracy.py                      # half an hour and more
    python tests/benchmarks/plan_accuracy.py --only "bert spiel_ag"

Every case trains in a process of its own, with the method's own optimizer. Measured is the high-water mark of the
process's resident memory, as Linux keeps it, less what it held before the model was made. The same training of a model
with a single layer comes before that, so that code and workspaces of torch's libraries, some 100 MB, are there already,
also what oneDNN makes for every shape of a product that it sees, 9 MB here in bfloat16. malloc is told to give every
larger block back at once (MALLOC_MMAP_THRESHOLD_): what it keeps otherwise is no property of a training.

Cases in 4 bits need bitsandbytes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from step_time import resident_bytes
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import BertConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from peft_sparse import (
    SM3,
    AdaSftConfig,
    BottleneckConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseAdamW,
    SparseConfig,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    plan_memory,
    resident,
    select_by_gradients,
    start_dense_phase,
    start_weight_phase,
)
from peft_sparse.checkpoints.architecture import class_name_of

BATCH, LENGTH = 4, 256
TOLERANCE = 0.10


def llama(hidden: int, intermediate: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=4000,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    )


def bert(hidden: int, intermediate: int, layers: int) -> BertConfig:
    return BertConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=20000,
        architectures=["BertForSequenceClassification"],
    )


MODELS = {"llama": llama, "bert": bert}
SIZES = {"small": (512, 1376, 4), "one layer": (512, 1376, 1)}
SPIEL = {"density": 0.02, "total_steps": 10_000}
METHODS: dict[str, PeftConfig | None] = {
    "rand": RandConfig(density=0.02, target_modules="all-linear"),
    "rand fitted": RandConfig(density=0.02, target_modules="all-linear", fitted_rate=True),
    "one_shot": OneShotConfig(density=0.02, target_modules="all-linear", criterion="fisher", selection_passes=1),
    "spiel_ag updates": SpielAGConfig(**SPIEL, target_modules="all-linear", nomination_updates=2),
    "rand all": RandConfig(density=0.02, target_modules="all"),
    "spiel_ag": SpielAGConfig(**SPIEL, target_modules="all-linear"),
    "spiel_ag all": SpielAGConfig(**SPIEL, target_modules="all"),
    "spiel_ma": SpielMAConfig(**SPIEL, target_modules="all-linear"),
    "lottery_ticket": LotteryTicketConfig(density=0.02, target_modules="all"),
    "ada_sft": AdaSftConfig(),
    "bottleneck": BottleneckConfig(),
    "lora": LoraConfig(r=8, target_modules="all-linear"),
    "full": None,
}
# What `plan_memory` is told.
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "4-bit": {"load_in_4bit": True},
}
CASES = [
    *(f"{model} {method}{way}" for model in MODELS for method in METHODS for way in ("", ", checkpointing")),
    *(f"llama {method}, {way}" for method in ("rand", "lora") for way in ("bfloat16", "4-bit")),
]


def parse(case: str) -> tuple[str, str, dict[str, Any]]:
    name, _, way = case.partition(", ")
    model, _, method = name.partition(" ")
    return model, method, WAYS[way]


def build(
    config: PretrainedConfig,
    *,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, class_name_of(config))(config).train().to(dtype)
    if load_in_4bit:
        quantise(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def quantise(model: PreTrainedModel) -> None:
    """Pack the weights of linear layers, as transformers does when it loads a model in 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    linears = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head]
    while linears:
        name, linear = linears.pop()
        packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype)
        packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to("cpu"))


def optimizer_for(model: nn.Module, method: str) -> Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if method.startswith("spiel_ma"):
        return SM3(trained, lr=1e-2, deltas=[delta for _, _, _, delta in iter_deltas(model)])
    if method.startswith("spiel_ag"):
        return SparseAdamW(trained, lr=1e-4)
    return AdamW(trained, lr=1e-4, fused=True)


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    config = getattr(model, "base_model", model).config
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": torch.zeros(BATCH, dtype=torch.long) if config.model_type == "bert" else ids}


def train(model: nn.Module, method: str, steps: int) -> None:
    optimizer = optimizer_for(model, method)
    batch = batch_for(model)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(case: str, size: str) -> None:
    """A few steps of a case; those in which SpIEL estimates gradients are among them."""
    name, method, way = parse(case)
    model = build(MODELS[name](*SIZES[size]), **way)
    config = copy.deepcopy(METHODS[method])
    tuned = model if config is None else get_peft_model(model, config)
    with ExitStack() as stack:
        if isinstance(config, OneShotConfig):
            select_by_gradients(tuned, [batch_for(tuned)] * 2)
        if isinstance(config, LotteryTicketConfig):
            phase = stack.enter_context(start_dense_phase(tuned))
        elif isinstance(config, SparseConfig) and not way.get("load_in_4bit"):
            stack.enter_context(resident(tuned))
        # By then SpIEL has estimated gradients and replaced weights, and every other method all its states.
        train(tuned, method, steps=7 if method.startswith("spiel") else 2)
        if isinstance(config, AdaSftConfig):
            start_weight_phase(tuned)
            train(tuned, method, steps=2)
        if isinstance(config, LotteryTicketConfig):
            phase.abort()


def measure(case: str) -> int:
    """Bytes that a case takes at most; for a fresh process."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    run(case, "one layer")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # The high-water mark starts over.
    before = resident_bytes("VmRSS")
    run(case, "small")
    return resident_bytes("VmHWM") - before


def measured(case: str) -> int:
    command = [sys.executable, __file__, "--measure", case]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def predicted(case: str) -> int:
    name, method, way = parse(case)
    plan = plan_memory(
        MODELS[name](*SIZES["small"]),
        METHODS[method],
        batch_size=BATCH,
        sequence_length=LENGTH,
        device="cpu",
        **way,
    )
    # The dense phase alone is run.
    return plan.phases[0].total if method == "lottery_ticket" else plan.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name starts with this")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure is not None:
        print(measure(options.measure))
        return
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("Peak memory can be measured on Linux alone.")
    console = Console(width=100)
    console.print("case: predicted MB, measured MB, ratio")
    for case in [c for c in CASES if c.startswith(options.only or "")]:
        plan, real = predicted(case), measured(case)
        verdict = "" if abs(plan / real - 1) <= TOLERANCE else f"off by more than {TOLERANCE:.0%}"
        console.print(f"{case:32} {plan / 2**20:6.0f} {real / 2**20:6.0f} {plan / real:7.3f}  {verdict}")


if __name__ == "__main__":
    main()
