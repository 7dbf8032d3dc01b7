"""Pictures of adapters. matplotlib is imported when a picture is made, and none of its global state is touched."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..composition.overlap import Overlap
from ..errors import ConfigError
from .layer_bars import ATTENTION_COLOURS, LINE, Bar, distribution, distribution_of_other, draw_bars, limit_of
from .other_types import OtherReport
from .report import AdapterReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

KINDS = ("distribution", "overlap", "tokens")

_WIDTH = 9.0
_DPI = 150
# Letters that fit above a picture as wide as the figure, and beside the matrix of overlaps.
_TITLE_LENGTH, _LABEL_LENGTH = 75, 30
# Fonts that know more scripts than matplotlib's own, used where they are installed.
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Arial Unicode MS", "Segoe UI")


@dataclass(frozen=True)
class Panel:
    """A picture to be drawn.

    Attributes:
        kind: one of `KINDS`.
        title: what is above it.
        height: in inches.
        draw: draws it into a figure or a part of one.
    """

    kind: str
    title: str
    height: float
    draw: Callable[[Figure | SubFigure], None]


@dataclass(frozen=True)
class TokenBars:
    """The tokens of one adapter that changed most.

    Attributes:
        adapter: its name.
        bars: (text of the token, norm of its row's change, number of tuned entries), the largest first.
        width: entries of a row.
    """

    adapter: str
    bars: Sequence[tuple[str, float, int]]
    width: int


# Panels


def distribution_panel(reports: Sequence[AdapterReport | OtherReport]) -> Panel:
    """How each adapter's weights, or its change, are spread over the layers."""

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots(len(reports), 1, squeeze=False)[:, 0]
        rows = [_row(report) for report in reports]
        limit = limit_of([bar for row in rows for bar in row.bars])
        for ax, row, report in zip(axes, rows, reports, strict=True):
            draw_bars(ax, row.bars, limit, of_what=row.of_what, by_part=row.by_part)
            _title(ax, report.name, row.details)

    # Under a uniform budget all layers have equally many weights, and what is shown is the change.
    shows_weights = {isinstance(report, AdapterReport) and not report.shows_change for report in reports}
    what = "weights or the change are" if True in shows_weights else "the change is"
    title = f"How {what} spread over the layers" if False in shows_weights else "Where the tuned weights lie"
    return Panel("distribution", title, 0.3 + 2.7 * len(reports), draw)


@dataclass(frozen=True)
class _Row:
    """The bars of one adapter: shares `of_what`, with attention apart or not, and what its title says."""

    bars: Sequence[Bar]
    of_what: str
    by_part: bool
    details: str


def _row(report: AdapterReport | OtherReport) -> _Row:
    if isinstance(report, OtherReport):
        of_what, bars = distribution_of_other(report)
        return _Row(bars, of_what, False, f"{report.peft_type}, {report.numel:,} numbers")
    density = report.total.density
    size = f"{report.total.count:,} weights" + ("" if density is None else f", density {density:.2%}")
    of_what = "squared change" if report.shows_change else "weights"
    return _Row(distribution(report), of_what, True, f"{report.method}, {size}")


def overlap_panel(names: Sequence[str], counts: Sequence[int], pairs: Mapping[tuple[str, str], Overlap]) -> Panel:
    """The overlap of each two adapters, with the numbers in the cells.

    Args:
        names: of the adapters.
        counts: how many weights each tunes.
        pairs: their overlaps.

    Raises:
        ConfigError: fewer than two adapters.

    Source: thesis, Fig. 4.4.
    """
    if len(names) < 2:
        raise ConfigError(f"an overlap needs two or more adapters, got {list(names)}")

    def draw(figure: Figure | SubFigure) -> None:
        _draw_matrix(figure.subplots(), names, counts, pairs)

    title = "Weights that two adapters share, in percent of the smaller one's"
    return Panel("overlap", title, 1.0 + max(2.4, 0.85 * len(names)), draw)


def token_panel(found: Sequence[TokenBars]) -> Panel:
    """The tokens whose embeddings each adapter changed most."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    longest = max(len(tokens.bars) for tokens in found)
    title = "Tokens whose embeddings changed most (beside each bar: weights tuned in its row)"

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, tokens in zip(axes, found, strict=False):
            _draw_tokens(ax, tokens)
            name = shortened(tokens.adapter, _TITLE_LENGTH // columns)
            ax.set_title(name, loc="left", fontweight="bold", fontsize=10)
        for ax in axes[len(found) :]:
            ax.set_axis_off()

    return Panel("tokens", title, 0.3 + rows * (0.9 + 0.19 * longest), draw)


# Figures


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install 'peft-sparse[plots]'") from error


def figure_of(panels: Sequence[Panel]) -> Figure:
    """One figure with the panels below one another.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(_WIDTH, sum(panel.height for panel in panels)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=[panel.height for panel in panels])
        for panel, part in zip(panels, parts[:, 0], strict=True):
            part.suptitle(panel.title, x=0.01, ha="left", fontsize=12)
            panel.draw(part)
    return figure


def render(figure: Figure, file_format: str, *, id_prefix: str = "id") -> bytes:
    """A figure as the content of a file.

    Args:
        figure: of `figure_of`.
        file_format: "png", or "svg" with its text as text.
        id_prefix: what the ids of an SVG begin with, so that several can be in one page.
    """
    buffer = io.BytesIO()
    with _style({"svg.fonttype": "none"}):
        figure.savefig(buffer, format=file_format, dpi=_DPI)
    content = buffer.getvalue()
    return _with_ids(content.decode(), id_prefix).encode() if file_format == "svg" else content


def _with_ids(svg: str, prefix: str) -> str:
    """Ids counted in the order in which they occur; many of matplotlib's own are the same in every figure."""
    tags = re.compile(r"<[^<>]+>")
    found = [name for tag in tags.findall(svg) for name in re.findall(r'\bid="([^"]+)"', tag)]
    names = {old: f"{prefix}{number}" for number, old in enumerate(dict.fromkeys(found))}

    def renamed(tag: re.Match[str]) -> str:
        return re.sub(r'(\bid="|url\(#|href="#)([^")]+)', lambda use: use[1] + names.get(use[2], use[2]), tag[0])

    return tags.sub(renamed, svg)


@contextmanager
def _style(changes: Mapping[str, Any] | None = None) -> Iterator[None]:
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    style = {
        "text.parse_math": False,  # tokens hold dollar signs
        "font.family": [name for name in _FONTS if name in installed] or ["sans-serif"],
        "font.size": 9,
        "hatch.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context({**style, **(changes or {})}):
        yield


# Drawing


def _title(ax: Axes, name: str, details: str) -> None:
    # One line above the details, where both do not fit beside each other: all titles of a picture share a baseline.
    raised = "\n " if len(name) + 0.7 * len(details) > _TITLE_LENGTH else ""
    ax.set_title(shortened(name, _TITLE_LENGTH) + raised, loc="left", fontweight="bold", fontsize=10)
    ax.set_title(details, loc="right", fontsize=8, color=LINE)


def shortened(name: str, length: int) -> str:
    """A name that is too long without its middle: adapters' names differ at the beginning or at the end."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[len(name) - half :]}"


def _draw_matrix(
    ax: Axes, names: Sequence[str], counts: Sequence[int], pairs: Mapping[tuple[str, str], Overlap]
) -> None:
    found = {**pairs, **{(b, a): pair for (a, b), pair in pairs.items()}}
    size = len(names)
    shares = [[_share(found.get((a, b))) for b in names] for a in names]
    darkest = max(max(row) for row in shares) or 1.0
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.3 * darkest, aspect="auto")
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            if a == b:
                ax.add_patch(_square(row))
                ax.text(column, row, f"{counts[row]:,}\nweights", ha="center", va="center", fontsize=8, color=LINE)
                continue
            color = "white" if shares[row][column] > 0.75 * darkest else "black"
            lines = _cell(found[a, b], brief=size > 6)
            height = "baseline" if len(lines) > 1 else "center"
            ax.text(column, row, lines[0], ha="center", va=height, fontsize=11, color=color)
            ax.text(column, row + 0.08, "\n".join(lines[1:]), ha="center", va="top", fontsize=7, color=color)
    names = [shortened(name, _LABEL_LENGTH) for name in names]
    ax.set_xticks(range(size), names)
    if max(map(len, names)) > 75 / size:
        ax.tick_params(axis="x", rotation=20)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")

    ax.set_yticks(range(size), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _share(pair: Overlap | None) -> float:
    return (pair.share or 0.0) if pair is not None else 0.0


def _cell(pair: Overlap, *, brief: bool) -> list[str]:
    if pair.share is None:
        return ["-"]
    if brief:
        return [f"{pair.share:.1%}"]
    signs = "" if pair.opposite_share is None else f"opposite signs {pair.opposite_share:.0%}"
    return [f"{pair.share:.1%}", f"by chance {pair.chance:.1%}", *([signs] if signs else [])]


def _square(position: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((position - 0.5, position - 0.5), 1, 1, facecolor="#f4f4f4", edgecolor="#c0c0c0")


def _draw_tokens(ax: Axes, tokens: TokenBars) -> None:
    texts, norms = [text for text, _, _ in tokens.bars], [norm for _, norm, _ in tokens.bars]
    ax.barh(
        range(len(norms)),
        norms,
        0.75,
        facecolor=ATTENTION_COLOURS["facecolor"],
        edgecolor=ATTENTION_COLOURS["edgecolor"],
    )
    longest = max(norms, default=0.0) or 1.0
    for position, (_, norm, count) in enumerate(tokens.bars):
        ax.text(norm + 0.02 * longest, position, f"{count} of {tokens.width}", va="center", fontsize=7)
    ax.set_xlim(0, 1.3 * longest)
    ax.set_yticks(range(len(texts)), texts)
    ax.set_ylim(len(texts) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel("norm of the row's change")
