"""`peft-sparse shrink`: a model with the tokens of some languages only, and an adapter that follows one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import app
from ._options import Output, Overwrite, say


@app.command()
def shrink(
    model: Annotated[
        str, typer.Argument(help="A model with its tokenizer: directory or Hub id. Or an adapter: --like.")
    ],
    output: Output,
    more_texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXTS]...", help="More files for --texts.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(help="Files of text, a line each (or .jsonl), for each language: FILE or LANGUAGE=FILE."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Keep every N-th layer. Such a model wants distillation.")] = None,
    min_count: Annotated[int, typer.Option(help="How often a language must use a token.")] = 1,
    min_probability: Annotated[float, typer.Option(help="Its least share of the tokens of a language.")] = 0.0,
    drop_characters: Annotated[
        bool, typer.Option("--drop-characters", help="Drop unused characters that bytes can stand in for.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option(help="Instead of texts: a model that shrink wrote, whose vocabulary an adapter gets.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a model down to the tokens that some texts use, which it goes on tokenising as before."""
    files = [*(texts or ()), *(more_texts or ())]
    if (like is None) == (not files):
        raise ConfigError(
            "give --texts FILE... to shrink a model, or --like MODEL to shrink an adapter as that one was."
        )
    if like is not None:
        _shrink_adapter(model, output, like, overwrite)
        return
    from ..distillation.shrink import shrink as shrink_model

    shrunk = shrink_model(
        model,
        output,
        texts=_read(files),
        stride=layers,
        revision=revision,
        overwrite=overwrite,
        min_count=min_count,
        min_probability=min_probability,
        keep_characters=not drop_characters,
    )
    say(
        f"Tokens:     {shrunk.tokens_before:,} -> {shrunk.tokens_after:,}",
        f"Layers:     {shrunk.layers_before} -> {shrunk.layers_after}",
        f"Parameters: {shrunk.parameters_before:,} -> {shrunk.parameters_after:,}",
        f"Megabytes:  {shrunk.bytes_before / 1e6:,.1f} -> {shrunk.bytes_after / 1e6:,.1f}",
    )
    for language, found in shrunk.counted.items():
        new = shrunk.new.get(language)
        held_out = "" if new is None else f"; of new texts about {new.share:.1%}, with {_more(new):+.2%} tokens"
        say(f"{language}: {found.share:.1%} of {found.texts:,} texts tokenised as before{held_out}")
    say(f"Written to {output}")


def _more(found) -> float:
    return found.tokens_after / max(found.tokens_before, 1) - 1


def _shrink_adapter(adapter: str, output: Path, like: Path, overwrite: bool) -> None:
    from ..distillation.adapters import reduce_adapter

    reduced = reduce_adapter(adapter, output, vocabulary=like, overwrite=overwrite)
    for name, lost in reduced.lost.items():
        say(f"{name}: {reduced.kept[name]:,} numbers kept, {lost:,} of tokens that went are lost")
    say(f"Written to {output}" if reduced.lost else f"Nothing in it depends on the vocabulary. Written to {output}")


def _read(files: list[str]) -> dict[str, list[str]]:
    from ..distillation.shrink import read_texts

    found: dict[str, list[str]] = {}
    called: dict[str, str] = {}
    taken: set[tuple[str, Path]] = set()
    for given in files:
        language, sign, path = given.partition("=")
        if not sign or Path(given).is_file():
            language, path = Path(given).stem, given
            if called.setdefault(language, given) != given:
                raise ConfigError(
                    f"{called[language]} and {given} are both called {language!r}: say which languages they are of, "
                    "LANGUAGE=FILE."
                )
        if (language, Path(path).resolve()) not in taken:  # counted once, however often it is named
            taken.add((language, Path(path).resolve()))
            found.setdefault(language, []).extend(read_texts(path))
    return found
