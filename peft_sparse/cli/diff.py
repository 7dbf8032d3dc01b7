"""`peft-sparse diff`: a sparse adapter out of two checkpoints."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from ..extraction.extract import CHANGED, extract_adapter
from ..extraction.tables import to_rich
from ..selection.budget import Budget
from . import app
from ._options import AsJson, BaseRevision, Output, Overwrite


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The model that was fine-tuned: directory or Hub id.")],
    tuned: Annotated[str, typer.Argument(help="What became of it; or a LoRA, SHiRA or Super-Tuning adapter.")],
    output: Output,
    density: Annotated[float | None, typer.Option(help="Share of the targeted weights to keep, in (0, 1].")] = None,
    num_weights: Annotated[int | None, typer.Option(help="Number of weights to keep.")] = None,
    equivalent_rank: Annotated[int | None, typer.Option(help="As many weights as LoRA of this rank trains.")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Keep every weight that differs, and no other.")] = False,
    criterion: Annotated[str, typer.Option(help="What ranks the weights: change or denoised.")] = "change",
    rank: Annotated[
        str, typer.Option(help="denoised: share of the squared singular values (0.9), or how many directions (64).")
    ] = "0.9",
    residual_density: Annotated[float, typer.Option(help="denoised: share of the other entries that stay.")] = 0.05,
    denoise_embeddings: Annotated[
        bool, typer.Option("--denoise-embeddings", help="denoised: denoise embedding matrices as well.")
    ] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="global (the default), uniform, another name, or several times REGEX=SHARE."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Module to target, or all-linear, or all; repeat it. Everything by default."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Module to leave out; repeat it.")] = None,
    values_dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64. What is needed by default.")
    ] = None,
    base_revision: BaseRevision = None,
    tuned_revision: Annotated[str | None, typer.Option(help="Revision of the tuned model on the Hub.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a sparse adapter out of two checkpoints, without training: where they differ most, and by how much."""
    if changed and num_weights is not None:
        raise ConfigError(f"give --changed or --num-weights, not both; got --num-weights {num_weights}.")
    extraction = extract_adapter(
        base,
        tuned,
        output,
        density=density,
        num_weights=CHANGED if changed else num_weights,
        equivalent_rank=equivalent_rank,
        criterion=criterion,
        rank=_parse_rank(rank),
        residual_density=residual_density,
        denoise_embeddings=denoise_embeddings,
        budget=_parse_budget(budget or ["global"]),
        target_modules=_one_or_list(target),
        exclude_modules=exclude,
        values_dtype=values_dtype,
        base_revision=base_revision,
        tuned_revision=tuned_revision,
        overwrite=overwrite,
        show_progress=True,
    )
    if as_json:
        typer.echo(json.dumps(extraction.to_dict(), indent=2))
    else:
        Console().print(to_rich(extraction))


def _parse_rank(text: str) -> float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise ConfigError(f"--rank must be a share such as 0.9 or a number of directions, got {text!r}.") from error


def _parse_budget(pieces: list[str]) -> Budget:
    """One name, or shares by regex; the regex may hold a "=" itself."""
    if len(pieces) == 1 and "=" not in pieces[0]:
        return pieces[0]
    shares: dict[str, float] = {}
    for piece in pieces:
        pattern, _, share = piece.rpartition("=")
        try:
            shares[pattern] = float(share)
        except ValueError as error:
            raise ConfigError(f"--budget must be a name or REGEX=SHARE, got {piece!r}.") from error
    return shares


def _one_or_list(targets: list[str] | None) -> list[str] | str | None:
    """The names that stand for many modules are texts of their own, as in a config."""
    return targets[0] if targets and len(targets) == 1 and targets[0] in ("all", "all-linear") else targets
