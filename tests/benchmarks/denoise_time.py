"""Time and memory of DeFT-X's denoising and selection, on the weight matrices of XLM-R.

    python tests/benchmarks/denoise_time.py                             # 12 layers of hidden size 768, 85 million
    python tests/benchmarks/denoise_time.py --embedding 250002          # and the embedding, 277 million
    python tests/benchmarks/denoise_time.py --hidden 1024 --layers 24   # XLM-R large, 302 million

The differences are random, with singular values that fall slowly over a floor of noise, as those of updates by Adam do:
hundreds of directions are needed for 90 % of the squares. They are made one at a time and go through
what `DensePhase.select` does: denoise, then one joint selection. Only that is timed. "kept" is the share of the squared
difference that is left, "MB" the highest resident size less that with the difference at hand (Linux).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _console import wide_console
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from peft_sparse.selection.denoise import denoise_matrix
from peft_sparse.selection.top_k import streamed_top_k

MEGA = 10**6


@dataclass
class Row:
    """What was measured on the matrices of one shape."""

    seconds: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    peak: int = 0


def shapes(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """The weight matrices of the model, the small ones first."""
    hidden, wide = options.hidden, 4 * options.hidden
    yield from [(hidden, hidden)] * (4 * options.layers)
    yield from [(wide, hidden), (hidden, wide)] * options.layers
    if options.embedding:
        yield options.embedding, hidden


def made_difference(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A difference with slowly falling singular values, made without a second tensor of its size."""
    if rows < columns:
        return made_difference(columns, rows, generator).T.contiguous()
    decay = torch.arange(1, columns + 1).float() ** -0.5 + 0.05
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    result = torch.empty(rows, columns)
    for block in result.split(4096):
        torch.mm(torch.randn(block.shape, generator=generator) * decay, rotation, out=block)
    return result.mul_(1e-5)


def resident_bytes(which: str) -> int:
    """ "VmRSS" or "VmHWM" (its high-water mark) of this process; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


def forget_peak() -> int:
    """Let the high-water mark start over; returns what is resident now."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="ascii")
    return resident_bytes("VmRSS")


def measure(options: argparse.Namespace) -> tuple[dict[tuple[int, int], Row], float, int]:
    """Rows by shape, the seconds of the selection itself, and the number of weights."""
    generator = torch.Generator().manual_seed(0)
    wanted = list(shapes(options))
    total = sum(rows * columns for rows, columns in wanted)
    found: dict[tuple[int, int], Row] = {shape: Row() for shape in wanted}
    spent = {"making": 0.0, "denoising": 0.0}

    def scores() -> Iterator[tuple[str, Tensor]]:
        for i, shape in enumerate(wanted):
            start = time.perf_counter()
            difference = made_difference(*shape, generator)
            before = forget_peak()
            begun = time.perf_counter()
            result = denoise_matrix(difference, rank=options.rank, residual_density=options.residual_density)
            seconds = time.perf_counter() - begun
            row = found[shape]
            row.seconds.append(seconds)
            row.ranks.append(result.rank)
            row.shares.append(result.energy_kept / result.energy)
            row.peak = max(row.peak, resident_bytes("VmHWM") - before)
            spent["making"] += begun - start
            spent["denoising"] += seconds
            del difference
            yield str(i), result.difference.abs_()
            progress.advance(task, shape[0] * shape[1])

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("denoising", total=total)
        begun = time.perf_counter()
        chosen = streamed_top_k(scores(), round(options.density * total))
        selecting = time.perf_counter() - begun - sum(spent.values())
    assert sum(indices.numel() for indices in chosen.values()) == round(options.density * total)
    return found, selecting, total


def share_or_count(text: str) -> float:
    return float(text) if "." in text else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embedding", type=int, default=0, help="rows of an embedding matrix; 0 for none")
    parser.add_argument("--rank", type=share_or_count, default=0.9, help="0.9 for a share, 100 for a number")
    parser.add_argument("--residual-density", type=float, default=0.05)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found, selecting, total = measure(options)
    table = Table(title=f"rank {options.rank}, residual density {options.residual_density}, threads: {options.threads}")
    for name in ("matrix", "number", "s each", "s", "rank", "kept", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for (rows, columns), row in found.items():
        seconds = sum(row.seconds)
        table.add_row(
            f"{rows:,} x {columns:,}",
            str(len(row.seconds)),
            f"{seconds / len(row.seconds):.2f}",
            f"{seconds:.1f}",
            f"{min(row.ranks)}-{max(row.ranks)}",
            f"{sum(row.shares) / len(row.shares):.1%}",
            f"{row.peak / MEGA:.0f}" if row.peak else "",
        )
    whole = sum(sum(row.seconds) for row in found.values()) + selecting
    table.add_section()
    table.add_row("joint selection", "", "", f"{selecting:.1f}")
    table.add_row(f"{total / MEGA:.0f} million weights", "", "", f"{whole:.1f}")
    table.add_row("per 100 million", "", "", f"{whole / total * 100 * MEGA:.1f}")
    wide_console().print(table)


if __name__ == "__main__":
    main()
