"""`peft-sparse inspect`: what is in adapters, and how they relate."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from ..inspection.other_types import is_sparse, report_on_other
from ..inspection.reading import read_adapters
from ..inspection.report import document, pairwise, report_on
from ..inspection.sheets import report_sheets
from ..tables import to_rich
from . import app
from ._options import Adapters, AsJson


@app.command(name="inspect")
def inspect_adapters(
    adapters: Adapters,
    as_json: AsJson = False,
) -> None:
    """Show where an adapter's weights lie, how large they are and where it comes from.

    Several sparse adapters are also compared: overlap, opposite signs, cosine. Of other types (bottleneck, MAD-G,
    Ada-SFT, PEFT's own) it shows the tensors by layer. Base models are not read.
    """
    read = read_adapters([adapter for adapter in adapters if is_sparse(adapter)])
    others = [report_on_other(adapter) for adapter in adapters if not is_sparse(adapter)]
    reports, pairs = [report_on(adapter) for adapter in read], pairwise(read)
    if as_json:
        typer.echo(json.dumps(document(reports, pairs, others), indent=2))
    else:
        Console().print(to_rich(report_sheets(reports, pairs, others)))
