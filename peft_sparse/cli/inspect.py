"""`peft-sparse inspect`: what is in adapters, and how they relate."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from ..inspection.reading import read_adapters
from ..inspection.report import document, pairwise, report_on
from ..inspection.sheets import report_sheets
from ..tables import to_rich
from . import app


@app.command(name="inspect")
def inspect_adapters(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...", help="Folders, or Hub ids such as owner/name, owner/name/folder, owner/name@revision."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show where an adapter's weights lie, how large they are and where it comes from.

    Several adapters are also compared: overlap, opposite signs, cosine. Base models are not read.
    """
    read = read_adapters(adapters)
    reports, pairs = [report_on(adapter) for adapter in read], pairwise(read)
    if as_json:
        typer.echo(json.dumps(document(reports, pairs), indent=2))
    else:
        Console().print(to_rich(report_sheets(reports, pairs)))
