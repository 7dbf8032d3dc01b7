"""`peft-sparse translate`: rows translated by a sequence-to-sequence model, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import app
from ._options import say


@app.command()
def translate(
    rows: Annotated[Path, typer.Argument(help="Rows: .jsonl, an object a line; or text, a line each.")],
    model: Annotated[str, typer.Argument(help="A translation model: directory or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl file to write.")],
    field: Annotated[list[str] | None, typer.Option(help='Field to translate; repeat it. "text" by default.')] = None,
    source: Annotated[str | None, typer.Option(help="Code of the rows' language, as the tokenizer has it.")] = None,
    target: Annotated[str | None, typer.Option(help="Code of the language to translate into.")] = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter of the model: directory or Hub id.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a tokenizer that has more codes than the model's.")
    ] = None,
    prefix: Annotated[str, typer.Option(help='Put before every text, such as "translate English to German: ".')] = "",
    batch_size: Annotated[int, typer.Option(help="Texts at a time.")] = 16,
    max_length: Annotated[int, typer.Option(help="Longest text and translation, in subwords.")] = 256,
    beams: Annotated[int | None, typer.Option(help="Of beam search. By default what the model's config says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows, from the start.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
) -> None:
    """Translate fields of labelled rows; labels stay. Stopped, the same command goes on where it was."""
    from ..training.languages.translate_file import translate_file

    done = translate_file(
        rows,
        output,
        model=model,
        fields=tuple(field or ("text",)),
        adapter=adapter,
        tokenizer=tokenizer,
        revision=revision,
        limit=limit,
        show_progress=True,
        source=source,
        target=target,
        prefix=prefix,
        batch_size=batch_size,
        max_length=max_length,
        generation=None if beams is None else {"num_beams": beams},
    )
    resumed = f" ({done.num_resumed:,} of them by an earlier run)" if done.num_resumed else ""
    cut = f"; {done.num_cut:,} texts and {done.num_unfinished:,} translations were cut at {max_length} subwords"
    say(f"Translated {len(done.rows):,} rows{resumed}{cut if done.num_cut or done.num_unfinished else ''}: {done.path}")
