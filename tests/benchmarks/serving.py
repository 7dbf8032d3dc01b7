"""Time of serving adapters, beside PEFT's LoRA at equal parameter count: tokens, switches, mixed batches, loading.

    python tests/benchmarks/serving.py                      # one thread, processor time, about three minutes
    python tests/benchmarks/serving.py --preset medium --rounds 30
    python tests/benchmarks/serving.py --model HuggingFaceTB/SmolLM2-135M --density 0.05 --only switches

All ways run in one process, one after the other in every round, and the order rotates, so that whatever slows the
machine slows all alike; what counts is each round's ratio, not the time. "switch" is the next adapter of two made to
act: by unmerging and merging, or inside `resident`; the first token under it is part of it. "mixed" is a batch of six
examples for six adapters. "load" and "add" read an adapter from disk, and add up five.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median, quantiles

import torch
from _console import wide_console
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from rich.table import Table
from step_time import PRESETS, base_model, equal_rank, shapes_of
from torch import nn
from transformers import AutoModelForCausalLM

from peft_sparse import RandConfig, resident

NUM_ADAPTERS = 6
NAMES = [f"adapter{i}" for i in range(NUM_ADAPTERS)]
Ways = dict[str, Callable[[], object]]


class Serving:
    """Models with the same adapters, and the ways to serve them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.stack = options, folder, ExitStack()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 2000, (1, options.prompt), generator=generator)
        self.batch = torch.randint(0, 2000, (NUM_ADAPTERS, options.prompt), generator=generator)
        rank = equal_rank(self.shapes(), options.density)
        self.ours_config = RandConfig(density=options.density, target_modules="all-linear")
        self.lora_config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")

    def base(self) -> nn.Module:
        if self.options.model is None:
            return base_model(self.options).eval().requires_grad_(False)
        dtype = getattr(torch, self.options.dtype)
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype).eval().requires_grad_(False)

    def shapes(self) -> list[tuple[int, int]]:
        """Of the linear layers, without the output matrix."""
        if self.options.model is None:
            return shapes_of(self.options.preset)
        base = self.base()
        return [tuple(m.weight.shape) for m in base.modules() if isinstance(m, nn.Linear) and m is not base.lm_head]

    def tuned(self, config: object, num_adapters: int = 1) -> PeftModel:
        model = get_peft_model(self.base(), config, adapter_name=NAMES[0])
        for seed, name in enumerate(NAMES[1:num_adapters], 1):
            model.add_adapter(name, replace(config, seed=seed) if isinstance(config, RandConfig) else config)
        for i, name in enumerate(NAMES[:num_adapters]):
            generator = torch.Generator().manual_seed(i)
            for parameter in (p for n, p in model.named_parameters() if f".{name}." in n):
                parameter.data.normal_(0, 0.01, generator=generator)
        return model.eval().requires_grad_(False)

    def held_resident(self, model: nn.Module) -> nn.Module:
        self.stack.enter_context(resident(model))
        return model

    def generate(self, model: nn.Module, ids: torch.Tensor, **kwargs: object) -> None:
        length = self.options.tokens
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **kwargs,
            )

    def tokens(self) -> Ways:
        ours, lora = [self.tuned(self.ours_config) for _ in range(3)], [self.tuned(self.lora_config) for _ in range(2)]
        ours[0].merge_adapter()
        lora[0].merge_adapter()
        models = {
            "base": self.base(),
            "ours, merged": ours[0],
            "ours, resident": self.held_resident(ours[1]),
            "ours, unmerged": ours[2],
            "LoRA, merged": lora[0],
            "LoRA, unmerged": lora[1],
        }
        return {name: lambda model=model: self.generate(model, self.ids) for name, model in models.items()}

    def switches(self) -> Ways:
        def merging(model: PeftModel) -> Callable[[], None]:
            turns = count()

            def switch() -> None:
                model.unmerge_adapter()
                model.set_adapter(NAMES[next(turns) % 2])
                model.merge_adapter()

            model.merge_adapter()
            return switch

        def setting(model: PeftModel) -> Callable[[], None]:
            turns = count()

            def switch() -> None:
                model.set_adapter(NAMES[next(turns) % 2])
                with torch.no_grad():
                    model(input_ids=self.ids[:, :1])

            return switch

        def token(model: nn.Module) -> Callable[[], None]:
            def forward() -> None:
                with torch.no_grad():
                    model(input_ids=self.ids[:, :1])

            return forward

        ours = [self.tuned(self.ours_config, 2) for _ in range(2)]
        return {
            "LoRA, merged": merging(self.tuned(self.lora_config, 2)),
            "ours, merged": merging(ours[0]),
            "ours, resident (with a token)": setting(self.held_resident(ours[1])),
            "a token of the base": token(self.base()),
        }

    def mixed(self) -> Ways:
        ours, lora = (self.tuned(config, NUM_ADAPTERS) for config in (self.ours_config, self.lora_config))
        base = self.base()
        return {
            "LoRA": lambda: self.generate(lora, self.batch, adapter_names=NAMES),
            "ours": lambda: self.generate(ours, self.batch, adapter_names=NAMES),
            "base": lambda: self.generate(base, self.batch),
        }

    def loading(self) -> Ways:
        ways = {}
        for kind, config in (("LoRA", self.lora_config), ("ours", self.ours_config)):
            model = self.tuned(config)
            model.save_pretrained(self.folder / kind, selected_adapters=[NAMES[0]])

            def load(model: PeftModel = model, path: Path = self.folder / kind / NAMES[0]) -> None:
                model.load_adapter(path, "loaded")
                model.delete_adapter("loaded")

            ways[kind] = load
        return ways

    def adding(self) -> Ways:
        ways = {}
        for kind, config in (("LoRA", self.lora_config), ("ours", self.ours_config)):
            model = self.tuned(config, NUM_ADAPTERS)

            def add(model: PeftModel = model) -> None:
                model.add_weighted_adapter(NAMES[:5], [0.2] * 5, "sum", combination_type="linear")
                model.delete_adapter("sum")

            ways[kind] = add
        return ways


def measure(ways: Ways, rounds: int, what: str) -> dict[str, list[float]]:
    """{way: seconds of each round}, after one round that is not counted."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(rounds + 1), description=what, transient=True):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            ways[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def rows(seconds: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """Way, milliseconds, and the ratio to the first way with its quartiles."""
    first = next(iter(seconds.values()))
    found = []
    for name, own in seconds.items():
        low, middle, high = quantiles([a / b for a, b in zip(own, first, strict=True)], n=4)
        found.append((name, f"{median(own) * 1e3:.1f}", f"{middle:.2f} ({low:.2f}-{high:.2f})"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--model", help="a causal language model, a folder or a name on the Hub, instead of a preset")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=12, help="at least 2")
    parser.add_argument("--only", nargs="+", choices=["tokens", "switches", "mixed", "loading", "adding"])
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {options.rounds}")
    options.length = 512
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(options, Path(folder))
        for what in options.only or ["tokens", "switches", "mixed", "loading", "adding"]:
            of = options.model or options.preset
            table = Table(title=f"{what}: {of} {options.dtype}, density {options.density:g}, one thread")
            for heading in ("way", "processor ms", "ratio to the first (quartiles)"):
                table.add_column(heading, justify="left" if heading == "way" else "right")
            ways = getattr(serving, what)()
            for row in rows(measure(ways, options.rounds, what)):
                table.add_row(*row)
            wide_console().print(table)
            serving.stack.close()


if __name__ == "__main__":
    main()
