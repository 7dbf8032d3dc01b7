"""`peft-sparse export`: a sparse adapter in another library's format."""

from __future__ import annotations

from typing import Annotated

import typer

from ..importing.export_adapter import export_adapter
from . import app
from ._options import Output, Overwrite, say


@app.command()
def export(
    adapter: Annotated[
        str, typer.Argument(help="The sparse adapter: folder, or Hub id (owner/name[/folder][@revision]).")
    ],
    output: Output,
    to: Annotated[
        str,
        typer.Option(
            help="composable-sft (pytorch_diff.bin, which BiStil reads as well), or one of PEFT's own types: "
            "shira, supertuning, lora."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model, for PEFT's types. What the adapter says by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank, for lora.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a sparse adapter in the format of another library, or as one that PEFT loads without this package."""
    exported = export_adapter(adapter, output, to=to, base=base, rank=rank, overwrite=overwrite)
    lines = [f"Exported {exported.num_weights:,} weights: {exported.file}"]
    if exported.padding:
        lines.append(f"{exported.padding:,} weights beside them are in it with a difference of zero, as {to} demands.")
    if exported.error:
        lines.append(f"The difference is off by {exported.error:.1%} of its norm.")
    say(*lines)
