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
from ..selection.anatomy import ATTENTION
from .report import AdapterReport, LayerGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

KINDS = ("distribution", "overlap", "tokens")

_WIDTH = 9.0
_DPI = 150
# Told apart by lightness and hatching, so that a grey print shows the same.
_ATTENTION = {"facecolor": "#1f4e79", "edgecolor": "#12304b"}
_REST = {"facecolor": "#f6d7a7", "edgecolor": "#8a5a1c", "hatch": "////"}
_OUTSIDE = {"facecolor": "#e3e3e3", "edgecolor": "#707070", "hatch": ".."}
_LINE = "#505050"
# Behind a number that a line may cross.
_BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_MAX_NUMBERED_BARS = 26
# Letters that fit above a picture as wide as the figure, and beside the matrix of overlaps.
_TITLE_LENGTH, _LABEL_LENGTH = 75, 30
# Fonts that know more scripts than matplotlib's own, used where they are installed.
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Arial Unicode MS", "Segoe UI")


@dataclass(frozen=True)
class Bar:
    """A bar of the distribution plot.

    Attributes:
        group: a layer's number, or "embeddings", or "other".
        stack: path of the list of layers; "" outside of layers.
        attention: share that the layer's attention has of the adapter's weights, or of its squared change; 0 outside
            of layers.
        rest: share that its other parts have, and everything outside of layers.
    """

    group: str
    stack: str
    attention: float
    rest: float

    @property
    def height(self) -> float:
        """Share of the whole adapter."""
        return self.attention + self.rest


@dataclass(frozen=True)
class Panel:
    """A picture to be drawn.

    Attributes:
        kind: one of `KINDS`.
        title: what stands above it.
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


def distribution(report: AdapterReport) -> list[Bar]:
    """Shares of an adapter's weights by layer, attention apart from the rest (SC-SFT, Fig. 1 and 2).

    Where a uniform budget makes the layers equal, shares of the squared change.
    """
    sizes = [_sizes(group, of_change=report.shows_change) for group in report.groups]
    total = sum(sum(by_part.values()) for by_part in sizes) or 1
    return [_bar(group, by_part, total) for group, by_part in zip(report.groups, sizes, strict=True)]


def _sizes(group: LayerGroup, *, of_change: bool) -> Mapping[str, float]:
    return group.squares if of_change else {part: tally.count for part, tally in group.parts.items()}


def _bar(group: LayerGroup, sizes: Mapping[str, float], total: float) -> Bar:
    attention = sizes.get(ATTENTION, 0) if group.layer is not None else 0
    label = group.name if group.layer is None else str(group.layer)
    return Bar(label, group.stack, attention / total, (sum(sizes.values()) - attention) / total)


# Panels


def distribution_panel(reports: Sequence[AdapterReport]) -> Panel:
    """How each adapter's weights are spread over the layers."""

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots(len(reports), 1, squeeze=False)[:, 0]
        bars = [distribution(report) for report in reports]
        limit = _limit([bar for row in bars for bar in row])
        for ax, row, report in zip(axes, bars, reports, strict=True):
            _draw_bars(ax, row, limit, of_what="squared change" if report.shows_change else "weights")
            density = report.total.density
            size = f"{report.total.count:,} weights" + ("" if density is None else f", density {density:.2%}")
            _title(ax, report.name, f"{report.method}, {size}")

    change, weights = "How the change is spread over the layers", "Where the tuned weights lie"
    title = change if all(report.shows_change for report in reports) else weights
    return Panel("distribution", title, 0.3 + 2.7 * len(reports), draw)


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
        id_prefix: what the ids of an SVG begin with, so that several can stand in one page.
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
    ax.set_title(details, loc="right", fontsize=8, color=_LINE)


def shortened(name: str, length: int) -> str:
    """A name that is too long without its middle: adapters' names differ at the beginning or at the end."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[len(name) - half :]}"


def _draw_bars(ax: Axes, bars: Sequence[Bar], limit: float, *, of_what: str) -> None:
    places = _places(bars)
    for bar, x in zip(bars, places, strict=True):
        if bar.stack:
            ax.bar(x, bar.attention, 0.8, **_ATTENTION)
            ax.bar(x, bar.rest, 0.8, bottom=bar.attention, **_REST)
        else:
            ax.bar(x, min(bar.rest, limit), 0.8, **_OUTSIDE)
        top = min(bar.height, limit)
        if bar.height > limit:
            _break_bar(ax, x, limit)
        if len(bars) <= _MAX_NUMBERED_BARS or bar.height > limit:
            ax.text(
                x, top + 0.015 * limit, f"{bar.height:.1%}", ha="center", va="bottom", fontsize=7, bbox=_BLANK, zorder=5
            )
    ax.set_ylim(0, 1.1 * limit)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}" if limit >= 0.05 else f"{share:.1%}")
    ax.set_ylabel(f"share of its {of_what}")
    _label_places(ax, bars, places)
    _label_segments(ax, bars, places, limit)


def _places(bars: Sequence[Bar]) -> list[float]:
    """Positions of the bars, with a gap where one list of layers ends."""
    gap = 1.3 + len(bars) / 20
    places: list[float] = []
    for position, bar in enumerate(bars):
        step = 1.0 if position and bars[position - 1].stack == bar.stack else gap
        places.append(places[-1] + step if places else 0.0)
    return places


def _limit(bars: Sequence[Bar]) -> float:
    """Where the axis ends: embeddings that would flatten all layers are cut off, and their number tells the rest."""
    layers = max((bar.height for bar in bars if bar.stack), default=0.0)
    highest = max((bar.height for bar in bars), default=0.0)
    return (highest if highest < 2 * layers or not layers else 1.25 * layers) or 1.0


def _break_bar(ax: Axes, x: float, limit: float) -> None:
    steps = [-0.5, -0.3, -0.1, 0.1, 0.3, 0.5]
    heights = [limit * (0.86 + 0.02 * (-1) ** number) for number in range(len(steps))]
    ax.plot([x + step for step in steps], heights, color="white", linewidth=5, solid_capstyle="butt", zorder=3)
    for shift in (-0.012, 0.012):
        ax.plot([x + s for s in steps], [h + shift * limit for h in heights], color=_LINE, linewidth=0.6, zorder=4)


def _label_places(ax: Axes, bars: Sequence[Bar], places: Sequence[float]) -> None:
    stacks = list(dict.fromkeys(bar.stack for bar in bars if bar.stack))
    for stack in stacks:
        inside = [x for bar, x in zip(bars, places, strict=True) if bar.stack == stack]
        middle = (inside[0] + inside[-1]) / 2
        where = {"xy": (middle, 0), "xycoords": ("data", "axes fraction"), "ha": "center", "va": "top"}
        ax.annotate(f"layers ({stack})", xytext=(0, -20), textcoords="offset points", **where)
    every = -(-len(bars) // _MAX_NUMBERED_BARS)
    shown = [
        (x, bar.group) for bar, x in zip(bars, places, strict=True) if not bar.stack or int(bar.group) % every == 0
    ]
    ax.set_xticks([x for x, _ in shown], [text for _, text in shown])
    ax.tick_params(axis="x", length=0)


def _label_segments(ax: Axes, bars: Sequence[Bar], places: Sequence[float], limit: float) -> None:
    """Names of the two parts of a layer, written beside the last bar that shows them."""
    last_x = places[-1] + 0.4
    lowest = 0.0
    for text, size, middle in (
        ("attention", lambda bar: bar.attention, lambda bar: bar.attention / 2),
        ("feed-forward,\nnorms, other", lambda bar: bar.rest, lambda bar: bar.attention + bar.rest / 2),
    ):
        shown = [(bar, x) for bar, x in zip(bars, places, strict=True) if bar.stack and size(bar)]
        if not shown:
            continue
        bar, x = shown[-1]
        y = middle(bar)
        at = max(y, lowest)
        lowest = at + 0.22 * limit
        ax.annotate(
            text,
            (x + 0.4, y),
            (last_x + 0.5, at),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0},
        )


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
                ax.text(column, row, f"{counts[row]:,}\nweights", ha="center", va="center", fontsize=8, color=_LINE)
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
    ax.barh(range(len(norms)), norms, 0.75, facecolor=_ATTENTION["facecolor"], edgecolor=_ATTENTION["edgecolor"])
    longest = max(norms, default=0.0) or 1.0
    for position, (_, norm, count) in enumerate(tokens.bars):
        ax.text(norm + 0.02 * longest, position, f"{count} of {tokens.width}", va="center", fontsize=7)
    ax.set_xlim(0, 1.3 * longest)
    ax.set_yticks(range(len(texts)), texts)
    ax.set_ylim(len(texts) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel("norm of the row's change")
