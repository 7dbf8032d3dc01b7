"""The table of a sparse adapter's card: how many weights each layer tunes, and of how many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..core.gaps import read_header
from ..errors import FormatError
from ..selection.anatomy import PARTS, place_of
from .native import canonical_name, parameter_of, tensor_names


def layer_table(counts: Mapping[str, int], sizes: Mapping[str, int] | None = None) -> str:
    """A markdown table of tuned weights: a row per layer (equal neighbours share one), a column per part.

    Args:
        counts: tuned weights by parameter name.
        sizes: number of elements of each of these parameters, for the densities; None leaves the densities out.
    """
    rows: dict[tuple[str, int], dict[str, list[str]]] = {}
    for parameter in counts:
        place = place_of(parameter)
        row = (place.stack, -1 if place.layer is None else place.layer)
        rows.setdefault(row, {}).setdefault(place.part, []).append(parameter)
    parts = [part for part in PARTS if any(part in row for row in rows.values())]

    def cells(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        columns = [groups.get(part, ()) for part in parts]
        everything = [parameter for column in columns for parameter in column]
        return tuple(_cell(column, counts, sizes) for column in [*columns, everything])

    header = ["layer", *parts, "all"]
    lines = [header, ["---", *(["---:"] * (len(header) - 1))]]
    for label, row in _merged((place, cells(rows[place])) for place in sorted(rows)):
        lines.append([label, *row])
    if len(rows) > 1:
        lines.append(["total", *cells({part: [p for p in counts if place_of(p).part == part] for part in parts})])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(parameters: Sequence[str], counts: Mapping[str, int], sizes: Mapping[str, int] | None) -> str:
    if not parameters:
        return ""
    count = sum(counts[name] for name in parameters)
    size = sum(sizes[name] for name in parameters) if sizes else 0
    return f"{count:,} ({count / size:.2%})" if size else f"{count:,}"


def _merged(rows: Iterable[tuple[tuple[str, int], tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Label the rows; a run of layers with equal cells becomes one row."""
    runs: list[tuple[str, int, int, tuple[str, ...]]] = []
    for (stack, index), cells in rows:
        if runs and runs[-1][0] == stack and runs[-1][2] == index - 1 and runs[-1][3] == cells and index > 0:
            runs[-1] = (stack, runs[-1][1], index, cells)
        else:
            runs.append((stack, index, index, cells))
    labelled = []
    for stack, first, last, cells in runs:
        if first < 0:
            label = "outside the layers"
        else:
            label = f"`{stack}.{first}`" if first == last else f"`{stack}.{first}` to `{last}`, each"
        labelled.append((label, cells))
    return labelled


def sizes_in_file(path: Path, counts: Mapping[str, int]) -> dict[str, int] | None:
    """Number of elements of each tuned parameter, from the headers in an adapter file.

    None if the file does not have these counts: transformers writes the config before the weights, so that it may be an
    older one.
    """
    if not path.is_file():
        return None
    sizes: dict[str, int] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                name = canonical_name(key)
                parameter = parameter_of(name)
                if parameter is None or name != tensor_names(parameter)[1]:
                    continue
                header = read_header(file.get_tensor(key), name=name)
                if counts.get(parameter) != header.count:
                    return None
                sizes[parameter] = prod(header.shape)
    except (SafetensorError, FormatError):
        return None
    return sizes if sizes.keys() == counts.keys() else None
