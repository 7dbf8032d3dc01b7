"""Pictures: what is drawn, read off the figure, and the files that it becomes."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from peft_sparse import ConfigError, inspect_adapter, plot_adapters
from peft_sparse.inspection import plots
from peft_sparse.inspection.layer_bars import Bar, distribution, limit_of
from peft_sparse.inspection.page import save_plot
from peft_sparse.inspection.reading import Adapter, read_adapter
from peft_sparse.inspection.report import report_on
from tests.support.known_adapters import QUERY, WORDS, delta, first, save, second
from tests.unit.inspection.test_tokens import save_tokenizer

METHOD = {"method": "rand"}


@pytest.fixture
def folders(tmp_path):
    base = tmp_path / "base"
    save_tokenizer(base, ["one", "two", "$3$", "four"])
    settings = {"base_model_name_or_path": str(base), "budget": "global"}
    return [save(tmp_path / "task", first(), **settings), save(tmp_path / "language", second(), **settings)]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def bars(ax) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_height()]


def test_distribution():
    assert distribution(report_on(Adapter("a", "", METHOD, first()))) == [
        Bar("embeddings", "", 0.0, 3 / 6),
        Bar("0", "encoder.layer", 2 / 6, 0.0),
        Bar("1", "encoder.layer", 0.0, 1 / 6),
    ]


def test_distribution_is_drawn(folders):
    figure = plot_adapters(folders, kind="distribution")
    task, language = figure.get_axes()
    assert [bar.get_height() for bar in bars(task)] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert [bar.get_height() for bar in bars(language)] == pytest.approx([3 / 5, 2 / 5])
    assert task.get_ylim() == language.get_ylim()
    shown = texts(figure)
    for label in ("task", "language", "embeddings", "attention", "feed-forward,\nnorms, other", "50.0%", "33.3%"):
        assert label in shown
    assert "layers (encoder.layer)" in shown
    assert any(text.endswith("6 weights, density 25.00%") for text in shown)


def test_a_uniform_budget_shows_how_far_the_weights_moved(tmp_path):
    uniform, other = (save(tmp_path / budget, first(), budget=budget) for budget in ("uniform", "global"))
    assert [bar.height for bar in distribution(inspect_adapter(uniform))] == pytest.approx(
        [25 / 30.25, 5 / 30.25, 0.25 / 30.25]
    )
    figure = plot_adapters([uniform], kind="distribution")
    assert figure.subfigs[0].get_suptitle() == "How the change is spread over the layers"
    assert [ax.get_ylabel() for ax in plot_adapters([uniform, other]).get_axes()[:2]] == [
        "share of its squared change",
        "share of its weights",
    ]


def test_a_uniform_budget_without_any_change_shows_the_weights(tmp_path):
    still = {name: type(d)(d.indices, torch.zeros_like(d.values), d.shape) for name, d in first().items()}
    report = inspect_adapter(save(tmp_path / "still", still, budget="uniform"))
    assert [bar.height for bar in distribution(report)] == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_parts_are_told_apart_without_colour(folders):
    (ax,) = plot_adapters([folders[1]], kind="distribution").get_axes()
    attention, rest = bars(ax)
    lightness = [
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(bar.get_facecolor()), strict=True))
        for bar in (attention, rest)
    ]
    assert lightness[1] - lightness[0] > 0.4
    assert rest.get_hatch()
    assert not attention.get_hatch()


def test_embeddings_that_dwarf_the_layers_are_cut_off():
    report = report_on(Adapter("a", "", METHOD, {WORDS: first()[WORDS], QUERY: first()[QUERY]}))
    assert limit_of(distribution(report)) == pytest.approx(3 / 5)
    flat = [Bar("embeddings", "", 0.0, 0.9), Bar("0", "layers", 0.04, 0.06)]
    assert limit_of(flat) == pytest.approx(0.125)
    assert limit_of(flat[:1]) == 0.9
    assert limit_of([]) == 1.0


def test_overlap_is_written_into_the_cells(folders):
    figure = plot_adapters(folders, kind="overlap")
    (ax,) = figure.get_axes()
    (image,) = ax.get_images()
    assert image.get_array().tolist() == [[0.0, 0.6], [0.6, 0.0]]
    shown = texts(figure)
    assert shown.count("60.0%") == 2
    assert shown.count("by chance 32.5%\nopposite signs 33%") == 2
    assert "6\nweights" in shown
    assert "5\nweights" in shown
    assert [label.get_text() for label in ax.get_xticklabels()] == ["task", "language"]


def test_tokens_are_drawn(folders):
    figure = plot_adapters(folders, kind="tokens")
    (ax,) = figure.get_axes()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert [bar.get_width() for bar in bars(ax)] == [5.0, 0.0]
    assert {"2 of 3", "1 of 3"} <= set(texts(figure))


def test_all_takes_what_there_is(folders, caplog):
    titles = [part.get_suptitle() for part in plot_adapters(folders).subfigs]
    assert titles[0] == "Where the tuned weights lie"
    assert len(titles) == 3
    assert len(plot_adapters(folders[:1]).subfigs) == 2
    assert len(plot_adapters(folders[1:]).subfigs) == 1
    assert caplog.text == ""


def test_what_cannot_be_drawn_is_refused(folders, tmp_path):
    with pytest.raises(
        ConfigError, match=r"kind must be one of \['distribution', 'overlap', 'tokens', 'all'\], got 'x'"
    ):
        plot_adapters(folders, kind="x")
    with pytest.raises(ConfigError, match=r"two or more adapters, got \['task'\]"):
        plot_adapters(folders[:1], kind="overlap")
    with pytest.raises(ConfigError, match="no tokens can be shown"):
        plot_adapters(folders[1:], kind="tokens")
    with pytest.raises(ConfigError, match=r"different names, got \['task', 'task'\]"):
        plot_adapters([folders[0], read_adapter(folders[0])])
    with pytest.raises(ConfigError, match="at least one adapter"):
        plot_adapters([])
    with pytest.raises(ConfigError, match=r"must end with one of \.png, \.svg, \.html, got .*out\.gif"):
        save_plot(folders, tmp_path / "out.gif")


def test_png(folders, tmp_path):
    save_plot(folders, tmp_path / "out.png")
    content = (tmp_path / "out.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert content[12:16] == b"IHDR"
    assert int.from_bytes(content[16:20], "big") == 1350


def test_svg_holds_text_as_text(folders, tmp_path):
    save_plot(folders, tmp_path / "out.svg")
    content = (tmp_path / "out.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(content)
    shown = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"attention", "task", "language", "60.0%", "one", "layers (encoder.layer)"} <= shown


def test_html_needs_no_other_file(folders, tmp_path):
    save_plot(folders, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure>(.*?)</figure>", page, flags=re.DOTALL)
    assert len(figures) == 3
    assert all(ElementTree.fromstring(figure).tag == "{http://www.w3.org/2000/svg}svg" for figure in figures)
    assert "attention" in figures[0]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page))
    assert used
    assert {clip or link for clip, link in used} <= set(ids)
    assert '<td class="text">task and language</td><td class="number">3</td><td class="number">60.0%</td>' in page
    assert "<title>Sparse adapters: task, language</title>" in page
    assert not re.search(r'<(script|link|img|iframe)|src=|href="http', page)


def test_html_escapes_what_files_say(folders, tmp_path):
    evil = save(tmp_path / "evil", first(), base_model_name_or_path="<script>alert(1)</script>", revision="$a$ & b")
    save_plot([evil], tmp_path / "out.html", kind="distribution")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_names_with_dollars_are_no_mathematics(tmp_path):
    figure = plot_adapters([Adapter("$\\frac{$", "", METHOD, first())], kind="distribution")
    assert b"\\frac{" in plots.render(figure, "svg")


def test_global_state_is_left_alone(folders, tmp_path):
    before, backend = matplotlib.rcParams.copy(), matplotlib.rcParams._get("backend")
    had_pyplot = "matplotlib.pyplot" in sys.modules
    save_plot(folders, tmp_path / "out.svg")
    assert matplotlib.rcParams == before
    assert matplotlib.rcParams._get("backend") == backend
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_a_failed_write_leaves_the_old_file(folders, tmp_path, monkeypatch):
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    monkeypatch.setattr(plots, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_plot(folders, target)
    assert target.read_bytes() == b"old"


def test_without_matplotlib(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib.*pip install 'peft-sparse\[plots\]'"):
        plot_adapters(folders)


@pytest.mark.parametrize("length", [10, 60, 150])
def test_titles_of_long_names_do_not_collide(length):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(plots._WIDTH, 3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    plots._title(ax, "n" * length, "lottery_ticket, 196,608,123 weights, density 5.00%")
    canvas.draw()
    name, details = (title.get_window_extent() for title in (ax._left_title, ax._right_title))
    lower = ax._left_title.get_window_extent().y0 + details.height
    assert name.x1 < details.x0 or ax._left_title.get_text().endswith("\n ")
    assert lower <= name.y1
    assert name.x1 <= figure.bbox.x1


def test_a_shortened_name_keeps_both_ends():
    assert plots.shortened("abcdefghij", 10) == "abcdefghij"
    assert plots.shortened("abcdefghijk", 7) == "abc…ijk"


def test_a_picture_of_weights_and_of_changes_says_both(tmp_path):
    uniform, given = tmp_path / "uniform", tmp_path / "given"
    save(uniform, {QUERY: delta(QUERY, {0: 1.0, 3: -2.0})}, budget="uniform")
    save(given, first(), budget="global")
    titles = {
        "How the change is spread over the layers": [uniform],
        "Where the tuned weights lie": [given],
        "How weights or the change are spread over the layers": [uniform, given],
    }
    for title, adapters in titles.items():
        (part,) = plot_adapters(adapters, kind="distribution").subfigs
        assert part.get_suptitle() == title
