"""Pictures of adapters as files: PNG, SVG, or a web page of its own with the tables of the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.adapter_files import in_list
from ..errors import ConfigError
from ..files import write_atomically
from ..tables import Sheet
from . import plots
from .other_types import OtherReport, is_sparse, report_on_other
from .reading import Adapter, read_adapters
from .report import pairwise, report_on
from .sheets import report_sheets
from .tokens import changed_rows, embedding_matrix, load_tokenizer, token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "html")
ALL = "all"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; white-space: nowrap; vertical-align: top; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid #888; } tr.total td { border-top: 1px solid #888; font-weight: bold; }
caption { text-align: left; font-weight: bold; padding: 1rem 0 .3rem; } p.note { color: #555; margin: 0 0 1rem; }
"""


def plot_adapters(
    adapters: Sequence[str | os.PathLike[str] | Adapter] | str | os.PathLike[str],
    *,
    kind: str = ALL,
    tokenizer: str | None = None,
    top: int = 20,
) -> Figure:
    """Picture adapters: how their weights are spread over layers, how far they overlap, which tokens they changed.

    Adapters of other types (bottleneck, MAD-G, Ada-SFT, PEFT's own) have a distribution: of their change to the weights
    (LoRA, SHiRA, Super-Tuning), or of the norm of their tensors.

    Args:
        adapters: folders or Hub ids (or what `read_adapter` gave), or one alone.
        kind: "distribution", "overlap" (two or more sparse adapters), "tokens" (of sparse ones), or "all" that apply.
        tokenizer: folder or Hub id; None looks into the adapters' folders and base models on this machine.
        top: how many tokens are shown at most.

    Returns:
        a matplotlib Figure, which `pyplot` does not know of; `figure.savefig` writes it.

    Raises:
        ConfigError: an unknown kind, one that these adapters do not have, or an adapter that is not found.
        FormatError: a file is damaged, or that of another library.
        ImportError: matplotlib is not installed.
    """
    plots.require_matplotlib()
    return plots.figure_of(_panels(_read(adapters), kind=kind, tokenizer=tokenizer, top=top))


def save_plot(
    adapters: Sequence[str | os.PathLike[str] | Adapter] | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    kind: str = ALL,
    tokenizer: str | None = None,
    top: int = 20,
) -> None:
    """Write pictures of adapters into a file, whose ending says what it will be.

    Args:
        adapters, kind, tokenizer, top: as `plot_adapters`.
        path: .png, .svg (text stays text), or .html (one file with the figures and the tables of `inspect`).

    Raises:
        ConfigError: another ending; and as `plot_adapters`.
        FormatError, ImportError: as `plot_adapters`.
    """
    target = Path(path)
    file_format = target.suffix.lower().removeprefix(".")
    if file_format not in FORMATS:
        endings = ", ".join(f".{known}" for known in FORMATS)
        raise ConfigError(f"the output must end with one of {endings}, got '{path}'")
    plots.require_matplotlib()
    read = _read(adapters)
    panels = _panels(read, kind=kind, tokenizer=tokenizer, top=top)
    if file_format == "html":
        figures = [
            plots.render(plots.figure_of([panel]), "svg", id_prefix=f"{panel.kind}-").decode() for panel in panels
        ]
        sparse, others = _sparse(read), [adapter for adapter in read if isinstance(adapter, OtherReport)]
        sheets = report_sheets([report_on(adapter) for adapter in sparse], pairwise(sparse), others)
        content = html_page([adapter.name for adapter in read], figures, sheets).encode()
    else:
        content = plots.render(plots.figure_of(panels), file_format)
    write_atomically(target, content)


def _read(adapters: Sequence[str | os.PathLike[str] | Adapter] | str | os.PathLike[str]) -> list[Adapter | OtherReport]:
    adapters = [adapters] if isinstance(adapters, Adapter) else in_list(adapters)
    if not adapters:
        raise ConfigError("at least one adapter is needed, got none")
    is_other = [not isinstance(adapter, Adapter) and not is_sparse(adapter) for adapter in adapters]
    places = [a for a, other in zip(adapters, is_other, strict=True) if not other and not isinstance(a, Adapter)]
    read = iter(read_adapters(places))
    found: list[Adapter | OtherReport] = []
    for adapter, other in zip(adapters, is_other, strict=True):
        found.append(report_on_other(adapter) if other else adapter if isinstance(adapter, Adapter) else next(read))
    names = [adapter.name for adapter in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"adapters must have different names, got {names}. Use read_adapter(..., name=...)")
    return found


def _sparse(adapters: Sequence[Adapter | OtherReport]) -> list[Adapter]:
    return [adapter for adapter in adapters if isinstance(adapter, Adapter)]


def _panels(
    adapters: Sequence[Adapter | OtherReport], *, kind: str, tokenizer: str | None, top: int
) -> list[plots.Panel]:
    if kind not in (*plots.KINDS, ALL):
        raise ConfigError(f"kind must be one of {[*plots.KINDS, ALL]}, got {kind!r}")
    sparse = _sparse(adapters)
    others = [adapter for adapter in adapters if isinstance(adapter, OtherReport)]
    if others and kind in ("overlap", "tokens"):
        raise ConfigError(
            f"a picture of kind {kind!r} is of sparse adapters, and {others[0].name!r} is of type "
            f"{others[0].peft_type}. Leave it out, or take kind='distribution'"
        )
    panels = []
    if kind in ("distribution", ALL):
        reports = [report_on(adapter) if isinstance(adapter, Adapter) else adapter for adapter in adapters]
        panels.append(plots.distribution_panel(reports))
    if kind == "overlap" or (kind == ALL and len(sparse) > 1):
        counts = [sum(delta.count for delta in adapter.deltas.values()) for adapter in sparse]
        panels.append(plots.overlap_panel([adapter.name for adapter in sparse], counts, pairwise(sparse)))
    if kind in ("tokens", ALL):
        found = [bars for adapter in sparse if (bars := _token_bars(adapter, tokenizer, top)) is not None]
        if found:
            panels.append(plots.token_panel(found))
        elif kind == "tokens":
            raise ConfigError(
                "no tokens can be shown: no adapter tunes an embedding matrix, or no tokenizer is found for it. "
                "Name one (tokenizer)"
            )
    return panels


def _token_bars(adapter: Adapter, given: str | None, top: int) -> plots.TokenBars | None:
    name = embedding_matrix(adapter.deltas)
    tokenizer = load_tokenizer(adapter, given)
    if name is None or tokenizer is None:
        return None
    delta = adapter.deltas[name]
    bars = [(token_text(tokenizer, row.row), row.norm, row.count) for row in changed_rows(delta, top=top)]
    return plots.TokenBars(adapter.name, bars, delta.shape[1])


def html_page(names: Sequence[str], figures: Sequence[str], sheets: Sequence[Sheet]) -> str:
    """One file that needs no other: figures as inline SVG, then the tables.

    Args:
        names: of the adapters.
        figures: SVG documents.
        sheets: the tables.
    """
    title = escape(f"Sparse adapters: {', '.join(names)}")
    body = [f"<figure>{figure[figure.index('<svg') :]}</figure>" for figure in figures]
    body += [_html_table(sheet) for sheet in sheets]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _html_table(sheet: Sheet) -> str:
    columns = ["text" if is_text else "number" for is_text in sheet.is_text]

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(columns, cells, strict=True)
        )

    rows = [f"<tr>{row(cells, 'td')}</tr>" for cells in sheet.rows]
    if sheet.has_total:
        rows[-1] = rows[-1].replace("<tr>", '<tr class="total">', 1)
    head = f"<thead><tr>{row(sheet.columns, 'th')}</tr></thead>" if any(sheet.columns) else ""
    note = f'<p class="note">{escape(sheet.note)}</p>' if sheet.note else ""
    return f"<table><caption>{escape(sheet.title)}</caption>{head}<tbody>{''.join(rows)}</tbody></table>{note}"
