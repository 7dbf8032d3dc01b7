"""The picture of how an adapter's weights, or its change, are spread over the layers of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..selection.anatomy import ATTENTION
from .other_types import OtherReport
from .report import AdapterReport, LayerGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by lightness and hatching, so that a grey print shows the same.
ATTENTION_COLOURS = {"facecolor": "#1f4e79", "edgecolor": "#12304b"}
_REST = {"facecolor": "#f6d7a7", "edgecolor": "#8a5a1c", "hatch": "////"}
_OUTSIDE = {"facecolor": "#e3e3e3", "edgecolor": "#707070", "hatch": ".."}
LINE = "#505050"
# Behind a number that a line may cross.
_BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_MAX_NUMBERED_BARS = 26


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


def distribution(report: AdapterReport) -> list[Bar]:
    """Shares of an adapter's weights by layer, attention apart from the rest (SC-SFT, Fig. 1 and 2).

    Where a uniform budget makes the layers equal, shares of the squared change.
    """
    sizes = [_sizes(group, of_change=report.shows_change) for group in report.groups]
    total = sum(sum(by_part.values()) for by_part in sizes) or 1
    return [_bar(group, by_part, total) for group, by_part in zip(report.groups, sizes, strict=True)]


def distribution_of_other(report: OtherReport) -> tuple[str, list[Bar]]:
    """What the bars of an adapter of another type show, and its shares by layer.

    The squared change, where the adapter is a difference of weights; else the squared norm of its tensors.
    """
    changed = [group for group in report.groups if group.change is not None]  # of heads there is no change
    groups = changed or report.groups
    sizes = [(group.change if changed else group.norm) ** 2 for group in groups]
    total = sum(sizes) or 1
    bars = []
    for group, size in zip(groups, sizes, strict=True):
        stack, _, number = group.name.rpartition(".")
        in_layer = stack if number.isdigit() else ""
        bars.append(Bar(number if in_layer else group.name, in_layer, 0, size / total))
    return "squared change" if changed else "tensors' squared norm", bars


def _sizes(group: LayerGroup, *, of_change: bool) -> Mapping[str, float]:
    return group.squares if of_change else {part: tally.count for part, tally in group.parts.items()}


def _bar(group: LayerGroup, sizes: Mapping[str, float], total: float) -> Bar:
    attention = sizes.get(ATTENTION, 0) if group.layer is not None else 0
    label = group.name if group.layer is None else str(group.layer)
    return Bar(label, group.stack, attention / total, (sum(sizes.values()) - attention) / total)


def draw_bars(ax: Axes, bars: Sequence[Bar], limit: float, *, of_what: str, by_part: bool = True) -> None:
    """Draw the bars of one adapter.

    Args:
        ax: where.
        bars: in the order of the model.
        limit: where the axis ends.
        of_what: what they are shares of.
        by_part: whether attention and the rest of a layer are told apart.
    """
    places = _places(bars)
    for bar, x in zip(bars, places, strict=True):
        if bar.stack:
            ax.bar(x, bar.attention, 0.8, **ATTENTION_COLOURS)
            ax.bar(x, bar.rest, 0.8, bottom=bar.attention, **(_REST if by_part else ATTENTION_COLOURS))
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
    if by_part:
        _label_segments(ax, bars, places, limit)


def _places(bars: Sequence[Bar]) -> list[float]:
    """Positions of the bars, with a gap where one list of layers ends."""
    gap = 1.3 + len(bars) / 20
    places: list[float] = []
    for position, bar in enumerate(bars):
        step = 1.0 if position and bars[position - 1].stack == bar.stack else gap
        places.append(places[-1] + step if places else 0.0)
    return places


def limit_of(bars: Sequence[Bar]) -> float:
    """Where the axis ends: embeddings that would flatten all layers are cut off, and their number tells the rest."""
    layers = max((bar.height for bar in bars if bar.stack), default=0.0)
    highest = max((bar.height for bar in bars), default=0.0)
    return (highest if highest < 2 * layers or not layers else 1.25 * layers) or 1.0


def _break_bar(ax: Axes, x: float, limit: float) -> None:
    steps = [-0.5, -0.3, -0.1, 0.1, 0.3, 0.5]
    heights = [limit * (0.86 + 0.02 * (-1) ** number) for number in range(len(steps))]
    ax.plot([x + step for step in steps], heights, color="white", linewidth=5, solid_capstyle="butt", zorder=3)
    for shift in (-0.012, 0.012):
        ax.plot([x + s for s in steps], [h + shift * limit for h in heights], color=LINE, linewidth=0.6, zorder=4)


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
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0},
        )
