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
    to: Annotated[str, typer.Option(help="The format: composable-sft (pytorch_diff.bin, which BiStil reads as well).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output.")] = False,
) -> None:
    """Write a sparse adapter in the format of another library, without its model."""
    exported = export_adapter(adapter, output, to=to, overwrite=overwrite)
    Console().print(
        f"Exported {exported.num_weights:,} weights: {exported.file}", markup=False, highlight=False, soft_wrap=True
    )
