"""`peft-sparse merge`: adapters into a checkpoint on disk."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..checkpoints.merge import merge_checkpoint
from ..errors import ConfigError
from . import app
from ._options import BaseRevision, Output, Overwrite, say
from ._values import parse_dtype, parse_size


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Checkpoint of the base model: directory or Hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(help="Sparse adapters: folders, or Hub ids (owner/name[/folder][@revision]).")
    ],
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="A factor per adapter, such as 1,0.5 or -1,1. As they are by default.")
    ] = None,
    head_from: Annotated[str | None, typer.Option(help="The adapter whose head to keep, if several have one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. As stored by default.")] = None,
    revision: BaseRevision = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of the files, and so of the memory used.")] = "1GB",
    overwrite: Overwrite = False,
) -> None:
    """Add adapters to a model's weights on disk, one tensor at a time."""
    merged = merge_checkpoint(
        base,
        adapters,
        output,
        weights=None if weights is None else _parse_weights(weights),
        head_from=head_from,
        dtype=None if dtype is None else parse_dtype(dtype),
        revision=revision,
        max_shard_bytes=parse_size(max_shard_size, name="--max-shard-size"),
        overwrite=overwrite,
        show_progress=True,
    )
    say(f"Merged {merged.num_weights:,} weights into {len(merged.changed)} tensors: {merged.directory}")


def _parse_weights(text: str) -> list[float]:
    pieces = [piece for piece in re.split(r"[,\s]+", text) if piece]
    try:
        return [float(piece) for piece in pieces]
    except ValueError as error:
        raise ConfigError(f"--weights must be numbers with commas between them, got {text!r}.") from error
