"""Arguments and options that several commands share, and how commands print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER...", help="Folders, or Hub ids such as owner/name, owner/name/folder, owner/name@revision."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write into.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output.")]
BaseRevision = Annotated[str | None, typer.Option(help="Revision of the base model on the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def say(*lines: str, on_stderr: bool = False) -> None:
    """Print lines as they are: what is in brackets is no markup, and long ones stay whole."""
    console = Console(stderr=on_stderr)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
