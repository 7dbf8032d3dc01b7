"""`peft-sparse plot`: pictures of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..inspection.page import save_plot
from . import app
from ._options import Adapters, say


@app.command(name="plot")
def plot_to_file(
    adapters: Adapters,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .png, .svg or .html.")],
    kind: Annotated[str, typer.Option(help="distribution, overlap, tokens, or all.")] = "all",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id. By default that of the adapter or its base model.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many tokens to show at most.")] = 20,
) -> None:
    """Draw how weights are spread over layers, how far adapters overlap, and which tokens changed most."""
    try:
        save_plot(adapters, output, kind=kind, tokenizer=tokenizer, top=top)
    except ImportError as error:
        # Nothing is broken: an optional package is missing, and the message says which.
        raise ConfigError(str(error)) from error
    say(f"wrote {output}", on_stderr=True)
