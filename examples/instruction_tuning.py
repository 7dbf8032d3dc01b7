"""Teach a small language model a house style by tuning one weight in a hundred; save, reload, compose and merge it.

    python examples/instruction_tuning.py

tunes SmolLM2-135M-Instruct by SpIEL-AG on 180 built-in questions, whose answers are one short sentence and a subject
in brackets. `--model` and `--data` take your own (questions and answers, or with `--text-column` just text);
`--method` compares Rand-SFT, half random weights and half by gradients, SpIEL-MA, LT-SFT, DeFT-X and LoRA at the same
number of weights; `--load-in-4bit` quantises the base; `--plot ages.png` shows when the tuned weights were grown.
"""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from _instructions import answers, encode, held_out_loss, logits, opening, read_pairs
from _methods import LEARNING_RATE, LEARNING_RATES, TWO_PHASES, Method, adapter_config, four_bit, plot_ages, train
from _models import multiplies_bfloat16, smollm2
from _readers import run
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

console = Console()


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def agrees(name: str, found: torch.Tensor, expected: torch.Tensor, *, tolerance: float) -> bool:
    """Say and return whether two models' logits differ by at most `tolerance` of the largest logit."""
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    verdict = "[green]agrees[/]" if error <= tolerance else "[bold red]differs[/]"
    console.print(f"{name} model: {verdict} with the trained one (logits within {error:.1e}, allowed {tolerance:g})")
    return error <= tolerance


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id. \\[default: SmolLM2-135M-Instruct]")] = "",
    data: Annotated[
        str,
        typer.Option(
            help="A file (CSV, JSONL, Parquet, text), a folder with train.*, or a Hub id, also as id:configuration. "
            "\\[default: a built-in house style]"
        ),
    ] = "",
    question_column: Annotated[str, typer.Option(help="What the data call the question.")] = "",
    answer_column: Annotated[str, typer.Option(help="What the data call the answer.")] = "",
    text_column: Annotated[str, typer.Option(help="Of data without questions: their text, learnt as it is.")] = "",
    method: Annotated[Method, typer.Option(help="How the trained weights are chosen.")] = Method.spiel_ag,
    density: Annotated[float, typer.Option(help="Share of the linear layers' weights to train.")] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; LT-SFT and DeFT-X take them in each phase.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 4,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. \\[default: the method's]")] = None,
    dense_learning_rate: Annotated[float, typer.Option(help="The same, in a dense phase.")] = 5e-5,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the base. \\[default: bfloat16 where it is fast and the method has one phase]"),
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantise the base to NF4 (needs bitsandbytes).")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw when the tuned weights were grown (SpIEL).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out questions to answer before and after.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the random weights and of the order of the rows.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the adapter is saved.")] = Path("outputs/instruction_tuning"),
) -> None:
    """Fine-tune on instructions; show held-out loss and answers before and after; save, reload, compose, merge."""
    start = time.perf_counter()
    set_seed(seed)
    columns = {"question": question_column, "answer": answer_column, "text": text_column}
    columns = {field: name for field, name in columns.items() if name}
    pairs, held_out_pairs = read_pairs(data, columns=columns)
    source = model or smollm2()
    # A dense phase moves the weights themselves, by steps too small for bfloat16.
    in_float32 = method in TWO_PHASES or not multiplies_bfloat16()
    dtype = dtype or (Dtype.float32 if in_float32 else Dtype.bfloat16)
    loading = {"dtype": getattr(torch, dtype.value)}
    if load_in_4bit:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loading |= {"quantization_config": four_bit(loading["dtype"]), "device_map": device}
    base = AutoModelForCausalLM.from_pretrained(source, **loading)
    config = adapter_config(method, density, seed, base)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows, held_out = encode(tokenizer, pairs), encode(tokenizer, held_out_pairs)
    asked = held_out_pairs[:: max(1, len(held_out_pairs) // samples)][:samples]
    console.print(f"{source} in {dtype.value}: {len(rows)} rows to train on, {len(held_out)} held out")
    loss_before, before = held_out_loss(base, held_out), answers(base, tokenizer, asked)

    if load_in_4bit:
        # On some processors bitsandbytes packs 4-bit weights anew when it first evaluates them, and rounds scales.
        base = AutoModelForCausalLM.from_pretrained(source, **loading)
    tuned = get_peft_model(base, config)
    train(
        tuned,
        rows,
        method,
        dense_learning_rate,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate or LEARNING_RATES.get(method, LEARNING_RATE),
        seed=seed,
        output_dir=str(output / "trainer"),
    )
    loss_after = held_out_loss(tuned, held_out)
    console.print(f"held-out loss a token: {loss_before:.3f} before, [bold]{loss_after:.3f}[/] after")

    tuned.save_pretrained(output)
    count, size = tuned.get_nb_trainable_parameters()[0], (output / "adapter_model.safetensors").stat().st_size
    console.print(f"{count:,} trained weights in {size:,} bytes, {size / count:.2f} each: {output}")

    expected = logits(tuned, held_out[:4])
    fresh = AutoModelForCausalLM.from_pretrained(source, **loading)
    fresh = fresh if load_in_4bit else fresh.to(tuned.device)
    reloaded = PeftModel.from_pretrained(fresh, output)
    # A sparse delta is exact: the same sum, rounded once, trained, reloaded and merged. LoRA rounds its product when
    # it is merged, and on 4 bits its layers run bitsandbytes' own kernels.
    is_lora = method is Method.lora
    tolerance = 0.05 if is_lora and load_in_4bit else 0.0
    same = agrees("reloaded", logits(reloaded, held_out[:4]), expected, tolerance=tolerance)
    if not is_lora:  # LoRA's sums are of its factors, and only near.
        reloaded.load_adapter(output, adapter_name="again")
        reloaded.add_weighted_adapter(["default", "again"], [0.5, 0.5], "composed")
        reloaded.set_adapter("composed")
        same &= agrees("composed", logits(reloaded, held_out[:4]), expected, tolerance=0.0)
    # Quantising the sum again would lose most of the delta: it goes into the dequantised weights, which LoRA cannot do.
    merged = reloaded.merge_and_unload(**({"dequantize": True} if load_in_4bit and not is_lora else {}))
    tolerance = (1.0 if load_in_4bit else 0.05) if is_lora else 0.0
    same &= agrees("merged", logits(merged, held_out[:4]), expected, tolerance=tolerance)

    table = Table("question", "before", "after", title="answers to held-out questions", show_lines=True)
    for row in zip(map(opening, asked), before, answers(merged, tokenizer, asked), strict=True):
        table.add_row(*map(escape, row))
    console.print(table)
    if plot is not None and plot_ages(tuned, plot):
        console.print(f"ages of the tuned weights: {plot}")
    console.print(f"{time.perf_counter() - start:.0f} seconds in all")
    if not same:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
