"""One adapter where several may be given, and folders where names may: what a stranger writes first."""

from __future__ import annotations

import pytest

from peft_sparse import ConfigError, conflicts, plot_adapters
from peft_sparse.inspection.page import save_plot
from peft_sparse.inspection.reading import read_adapter, read_adapters
from tests.support.known_adapters import first, save, second


@pytest.fixture
def folders(tmp_path):
    return save(tmp_path / "first", first()), save(tmp_path / "second", second())


def test_one_adapter_is_not_the_letters_of_its_name(folders, tmp_path):
    one, _ = folders
    for given in (one, str(one), read_adapter(one)):
        (axes,) = plot_adapters(given, kind="distribution").axes
        assert axes.get_title(loc="left").strip() == "first"
    save_plot(str(one), tmp_path / "one.png", kind="distribution")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert [adapter.name for adapter in read_adapters(str(one))] == ["first"]


def test_conflicts_of_a_list_of_folders(folders):
    listed, named = conflicts([str(folder) for folder in folders]), conflicts({f.name: f for f in folders})
    assert listed == named
    assert listed.adapters == ("first", "second")
    with pytest.raises(ConfigError, match=r"two or more different ones of \['first'\], got \['first'\]"):
        conflicts(str(folders[0]))
    with pytest.raises(ConfigError, match=r"ones of \['first', 'second'\], got \['second'\]"):
        conflicts({f.name: f for f in folders}, "second")
