"""What a MAD-G hypernetwork makes of typological features, as a table and as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.table import Table

from ..errors import ConfigError
from ..files import atomic_file
from ..tuners.madg.importance import FeatureImportance

_BAR = {"color": "#1f4e79"}
_ROW_HEIGHT = 0.24
_DPI = 150


def importance_table(importance: FeatureImportance, *, count: int | None = 20) -> Table:
    """The most important features, with their share of the sum of squared norms and their strongest site.

    Args:
        importance: what `MadGModel.feature_importance` gives.
        count: how many; all if None.
    """
    _check_count(count)
    table = Table(title="Typological features, by the norm of their column of W V", box=box.SIMPLE_HEAD)
    table.add_column("feature", overflow="fold")
    table.add_column("norm", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("strongest at", overflow="fold")
    squares = float(importance.total.square().sum()) or 1.0
    for name, norm in importance.top(count):
        column = importance.by_site[:, importance.features.index(name)]
        alike = bool((column == column[0]).all())
        where = "all layers alike" if alike else importance.sites[int(column.argmax())]
        table.add_row(name, f"{norm:.4g}", f"{norm**2 / squares:.2%}", where)
    return table


def plot_importance(importance: FeatureImportance, path: str | os.PathLike[str], *, count: int = 30) -> None:
    """Write a picture of the most important features: their norms, and beside them the norms at each site.

    Args:
        importance: what `MadGModel.feature_importance` gives.
        path: the file; its ending says which format matplotlib writes.
        count: how many features.

    Raises:
        ConfigError: `count` is no positive number, or matplotlib does not write files of that ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _check_count(count)
    top = importance.top(count)
    columns = [importance.features.index(name) for name, _ in top]
    figure = Figure(figsize=(10.0, 1.6 + _ROW_HEIGHT * len(top)), dpi=_DPI, layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in formats:
        raise ConfigError(f"path must end with a format that matplotlib writes ({', '.join(formats)}), got {path!s}.")
    bars, map_axes = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    rows = range(len(top))
    bars.barh(rows, [norm for _, norm in top], **_BAR)
    bars.set_yticks(rows, [name for name, _ in top], fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("norm of the column of W V")
    # Dark is much, on paper too.
    image = map_axes.imshow(importance.by_site[:, columns].T.numpy(), aspect="auto", cmap="Greys", vmin=0)
    map_axes.set_xlabel("site, in the order of the model")
    map_axes.set_xticks(range(len(importance.sites)), range(len(importance.sites)), fontsize=7)
    figure.colorbar(image, ax=map_axes, label="norm at the site")
    figure.suptitle("How much typological features move the generated weights", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=ending)


def _check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise ConfigError(f"count must be at least 1, got {count}.")
