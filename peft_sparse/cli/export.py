"""`peft-sparse export`: a sparse adapter in another library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..importing.export_adapter import export_adapter
from . import app


@app.command()
def export(
    adapter: Annotated[
        str, typer.Argument(help="The sparse adapter: folder, or Hub id (owner/name[/folder][@revision]).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write into.")],
    to: Annotated[
        str,
        typer.Option(
            help="composable-sft (pytorch_diff.bin, which BiStil reads as well), or one of PEFT's own types: "
            "shira, supertuning, lora."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model, for PEFT's types. \\[default: what the adapter says]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank, for lora.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output.")] = False,
) -> None:
    """Write a sparse adapter in the format of another library, or as one that PEFT loads without this package."""
    exported = export_adapter(adapter, output, to=to, base=base, rank=rank, overwrite=overwrite)
    lines = [f"Exported {exported.num_weights:,} weights: {exported.file}"]
    if exported.padding:
        lines.append(f"{exported.padding:,} weights beside them are in it with a difference of zero, as {to} demands.")
    if exported.error:
        lines.append(f"The difference is off by {exported.error:.1%} of its norm.")
    Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
