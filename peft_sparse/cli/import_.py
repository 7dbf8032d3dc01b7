"""`peft-sparse import`: adapters of other libraries, made into ours."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..importing.foreign import COMPOSABLE_SFT
from ..importing.import_adapter import import_adapter
from . import app
from ._options import AsJson, BaseRevision, Output, Overwrite, say


@app.command(name="import")
def import_to_folder(
    where: Annotated[
        str,
        typer.Argument(
            metavar="WHERE",
            help="An adapter of composable-sft, BiStil, SpIEL's fork of PEFT or RoSA: folder, or Hub id "
            "(owner/name[/folder][@revision]).",
        ),
    ],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="The base model: folder or Hub id. What the adapter says by default.")
    ] = None,
    base_revision: BaseRevision = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the adapter on the Hub.")] = None,
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="Import all heads, or none. All but masked language models' by default."),
    ] = None,
    task_type: Annotated[
        str | None, typer.Option(help="SEQ_CLS, TOKEN_CLS, ... What the file shows by default.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels of the head with commas between them, in the order of their ids.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of another library into one of this, without its model."""
    imported = import_adapter(
        where,
        output,
        base=base,
        base_revision=base_revision,
        revision=revision,
        with_head=head,
        task_type=task_type,
        labels=None if labels is None else [label.strip() for label in labels.split(",")],
        overwrite=overwrite,
    )
    if as_json:
        typer.echo(json.dumps(imported.to_dict(), indent=2))
        return
    lines = [f"Imported {imported.num_weights:,} weights in {imported.num_tensors} tensors ({imported.kind})"]
    lines += [f"sparse part: {imported.sparse}"] if imported.sparse else []
    lines += [f"low-rank part, a LoRA adapter of PEFT: {imported.lora}"] if imported.lora else []
    lines.append(f"base model: {imported.base}")
    lines += [f"heads: {', '.join(imported.heads)}"] if imported.heads else []
    lines += [f"labels: {', '.join(imported.labels)}"] if imported.labels else []
    hint = " (--head imports them)" if imported.kind == COMPOSABLE_SFT else ""
    lines += [f"left out: {', '.join(imported.left_out)}{hint}"] if imported.left_out else []
    say(*lines)
